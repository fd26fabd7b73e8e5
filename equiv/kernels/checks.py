"""Checks of what a batched shift is given, and the one shape it is brought to."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from equiv.errors import ArgumentError
from equiv.kernels.rows import entries


def underived(*tensors: Tensor | None) -> bool:
    """Whether nothing is derived, mapped or traced: the operator can be called alone.

    Only to save time: binding the arguments of an `autograd.Function` takes longer than
    many a launch.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    graded = any(t is not None and t.requires_grad for t in tensors)
    return not (graded and torch.is_grad_enabled())


def forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken, of anything."""
    return forward_ad._current_level >= 0


def arguments(
    h: Tensor,
    parts: Mapping[str, Tensor],
    bank: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is computed with: rows [rows, d], index [entries], scale [entries].

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit.
    """
    check_parts(h, parts, read)
    leading = tuple(h.shape[:-1])
    if index is None and bank.shape[0] != 1:
        raise ArgumentError(
            f"Expected `index` with a bank of {bank.shape[0]} steers: which of them "
            "each row gets."
        )
    if index is None:
        index = torch.zeros((), dtype=torch.long, device=h.device)
    for name, value in (("index", index), ("scale", scale)):
        if value is not None and value.device != h.device:
            raise ArgumentError(
                f"Expected `{name}` on {h.device}, where `h` is, got {value.device}."
            )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ArgumentError(f"Expected `index` of integers, got {index.dtype}.")
    number = entries("index", index, leading)
    strength = None if scale is None else entries("scale", scale, leading)
    return h.reshape(-1, h.shape[-1]).contiguous(), number, strength


def check_parts(
    h: Tensor, parts: Mapping[str, Tensor], read: Tensor | None = None
) -> None:
    """Check the shapes, dtypes and devices of a bank.

    Raises:
        ArgumentError: If they do not fit.
    """
    if h.ndim < 1 or not h.is_floating_point():
        raise ArgumentError(
            "Expected activations [*batch, d] of a floating dtype, got "
            f"{tuple(h.shape)} of {h.dtype}."
        )
    if read is not None and (
        (read.shape[:-1], read.dtype) != (h.shape[:-1], h.dtype)
        or read.device != h.device
    ):
        raise ArgumentError(
            f"Expected `read` like `h` but for its last axis, {tuple(h.shape)} of "
            f"{h.dtype} on {h.device}, got {tuple(read.shape)} of {read.dtype} on "
            f"{read.device}."
        )
    d, first = h.shape[-1], next(iter(parts.values()))
    n, r = first.shape[0] if first.ndim else 0, first.shape[1] if first.ndim > 1 else 0
    e = d if read is None else read.shape[-1]
    width = {"down": e}
    shapes = {"bank": (n, d), "down": (n, r, e), "up": (n, r, d), "bias": (n, r)}
    for name, part in parts.items():
        if tuple(part.shape) != shapes[name] or n == 0:
            wanted = {"bank": "[n, d]", "bias": "[n, r]"}.get(name, "[n, r, d]")
            own = width.get(name, d)
            raise ArgumentError(
                f"Expected `{name}` of shape {wanted}, n ≥ 1, with d = {own}"
                f"{f', n = {n} and r = {r}' if 'down' in parts else ''}, got "
                f"{tuple(part.shape)}."
            )
        if part.device != h.device or not part.is_floating_point():
            raise ArgumentError(
                f"Expected `{name}` of a floating dtype on {h.device}, where `h` is, "
                f"got {part.dtype} on {part.device}."
            )


def check_in_place(h: Tensor, *parts: Tensor | None) -> None:
    """Check that `h` may be overwritten.

    Raises:
        ArgumentError: If it is not contiguous, or a derivative is being taken.
    """
    if not h.is_contiguous():
        raise ArgumentError("Expected contiguous activations to shift in place.")
    asked = [h, *(part for part in parts if part is not None)]
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in asked)
    if graded or forward_mode():
        raise ArgumentError(
            "Shifting in place has no derivative: use it without gradients, or the "
            "function that returns its result."
        )
