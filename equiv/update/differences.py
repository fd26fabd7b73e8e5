"""Tuned − base of two sets of named weights, in memory or on disk."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.model.packed import unpacked
from equiv.update.entries import Deferred, Entry, not_finite
from equiv.update.low_rank import Delta
from equiv.update.shards import Shards

_CHUNK = 2**22  # entries in float64 at a time, while two weights are compared


def differences(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> tuple[Mapping[str, Delta], dict[str, float]]:
    """Tuned − base in float64 where the two differ, and the norms of the base there.

    Two sets in memory give tensors. If either is on disk, all is read once here, a
    chunk at a time, and an entry again whenever it is looked at.

    Raises:
        UpdateMismatchError: If the two have different names or shapes.
        UpdateError: If they are equal everywhere, or an entry is not finite.
    """
    _check_names(base.keys(), tuned.keys())
    on_disk = isinstance(base, Shards) or isinstance(tuned, Shards)
    entries: dict[str, Entry] = {}
    norms: dict[str, float] = {}
    for name in base:
        shape = _checked_shape(name, base, tuned)
        if (found := _apart(name, base[name], tuned[name])) is None:
            continue
        norm, norms[name] = found
        entries[name] = _entry(name, base, tuned, shape, norm)
    if not entries:
        raise UpdateError("The update is empty: base and tuned are equal everywhere.")
    deferred = Deferred(entries)
    return (deferred if on_disk else dict(deferred)), norms


def _entry(
    name: str,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    shape: tuple[int, ...],
    norm: float,
) -> Entry:
    def read() -> Tensor:
        weight, other = unpacked(base[name]), unpacked(tuned[name])
        if isinstance(tuned, Shards):  # a live base says where its weights are
            other = other.to(weight.device)
        return other.double() - weight.double().to(other.device)

    return Entry(read, shape, norm)


def _apart(name: str, weight: Tensor, other: Tensor) -> tuple[float, float] | None:
    """Norms of the difference and of the base; `None` where the two are equal."""
    weight, other = unpacked(weight), unpacked(other)
    if not weight.is_floating_point() or not other.is_floating_point():
        _check_integers(name, weight, other)
        return None
    apart = whole = 0.0
    for a, b in zip(_chunks(weight), _chunks(other), strict=True):
        first, second = a.double(), b.double().to(a.device)
        difference = second - first
        if not bool(torch.isfinite(difference).all()):
            count = int((~torch.isfinite(second - first)).sum())
            raise not_finite(name, count)
        apart += float(difference.square().sum())
        whole += float(first.square().sum())
    same = apart == 0 and torch.equal(weight, other.to(weight.device, weight.dtype))
    return None if same else (math.sqrt(apart), math.sqrt(whole))


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_CHUNK)


def _check_integers(name: str, weight: Tensor, other: Tensor) -> None:
    """Counters may differ; matrices of integers are packed weights."""
    if weight.ndim < 2 and other.ndim < 2:
        return
    if weight.dtype == other.dtype and torch.equal(weight, other.to(weight.device)):
        return
    raise UpdateError(
        f"`{name}` is {weight.dtype} in base and {other.dtype} in tuned: quantised "
        "weights cannot be subtracted. Pass the checkpoints in full precision."
    )


def _checked_shape(
    name: str, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> tuple[int, ...]:
    mine, theirs = (
        w.shape_of(name) if isinstance(w, Shards) else tuple(w[name].shape)
        for w in (base, tuned)
    )
    if mine == theirs:
        return mine
    if mine[1:] == theirs[1:] and len(mine) == 2:
        what = (
            "Resized embeddings, it seems: tokens that were added have no base to be "
            "compared with. Either resize the base in the same way first, "
            f"`base.resize_token_embeddings({theirs[0]})`, or cut the tuned model's "
            f"rows back to {mine[0]}."
        )
    else:
        what = "The two are no models of one architecture and size."
    raise UpdateMismatchError(
        f"`{name}` has shape {mine} in base and {theirs} in tuned. {what}"
    )


def _check_names(base: Iterable[str], tuned: Iterable[str]) -> None:
    if said := one_sided(base, tuned):
        raise UpdateMismatchError(
            "Expected the same parameters on both sides, but some are on one side "
            f"only: {said}."
        )


def one_sided(base: Iterable[str], tuned: Iterable[str], most: int = 4) -> str:
    """Names that only one side has, in words; empty if there are none.

    Example:
        >>> one_sided(["a", "b"], ["b", "c", "d"], most=1)
        '1 is missing from tuned: `a`; 2 are missing from base: `c`, …'
    """
    mine, theirs = set(base), set(tuned)
    parts = []
    for side, names in (("tuned", mine - theirs), ("base", theirs - mine)):
        if names:
            shown = ", ".join(f"`{name}`" for name in sorted(names)[:most])
            more = ", …" if len(names) > most else ""
            are = "is" if len(names) == 1 else "are"
            parts.append(f"{len(names)} {are} missing from {side}: {shown}{more}")
    return "; ".join(parts)


def check_buffers(base: nn.Module, tuned: nn.Module) -> None:
    """Refuse models whose stored buffers (running means, say) differ.

    Raises:
        UpdateMismatchError: If one differs by more than the rounding of its dtype.
    """
    check_same_buffers(stored_buffers(base), stored_buffers(tuned))


def check_same_buffers(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> None:
    """Refuse buffers that differ by more than the rounding of their dtype.

    Raises:
        UpdateMismatchError: If there is one.
    """
    for name in mine.keys() & theirs.keys():
        a, b = mine[name], theirs[name]
        rounding = max(torch.finfo(x.dtype).eps for x in (a, b))
        same = a.shape == b.shape and torch.allclose(
            a.double(), b.double().to(a.device), rtol=rounding, atol=0, equal_nan=True
        )
        if not same:
            raise UpdateMismatchError(
                f"`{name}` differs between base and tuned, but it is a buffer: it has "
                "no derivative here, and without it the tuned model would be another "
                "one. Copy the base's buffers into the tuned model, or tune with its "
                "norms in eval mode."
            )


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating buffers that belong to a model's state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameters and value.is_floating_point()
    }
