"""What steering does to activations, written once: the specification.

Symbols: h [batch, *rest, e] is the activation where a steer writes, `seen` what it may
read, by site. A steer's forms are summed: h + Σ shift(x), x = seen[read].

- Everything is computed in at least float32 and rounded to the dtype of h once.
- A bank numbers its steers; `index` says which of them a row or token gets. What gets
  none keeps its bits: it is chosen by `torch.where`, not by adding zero (−0 + 0 = +0).
- A row's result depends on its own activations, its own number and the shape of the
  batch, never on what steers its neighbours: every steer of the bank is computed for
  all rows, in one shape.

The last point costs as many shifts as the bank has steers. `bank` computes the same
function from one pass per form.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from equiv.errors import ArgumentError
from equiv.model.sites import Sites

Shift = Callable[[Tensor], object]  # what is read, in at least float32 → shift
Steers = Mapping[str, Shift]  # site that is read → shift
Bank = Mapping[int, Steers]  # number → what that steer adds here


def steered(h: Tensor, seen: Sites, steers: Steers) -> Tensor:
    """Every row of `h` with one steer added.

    Args:
        h: The activation that is written, [batch, *rest, e].
        seen: Site → activation that is read, [batch, *rest, d].
        steers: Site that is read → shift, a function of it.

    Raises:
        ArgumentError: If a shift is no tensor of the shape of `h`.

    Example:
        >>> h = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
        >>> steered(h, {"x": h}, {"x": lambda x: x / 2**9})  # rounded once
        tensor([[1., 2.]], dtype=torch.bfloat16)
    """
    wide = h.dtype if h.dtype.itemsize >= 4 else torch.float32
    # In a running model a cast takes time, also where there is nothing to cast.
    total = h if h.dtype == wide else h.to(wide)
    for read, shift_of in steers.items():
        x = seen[read]
        shift = shift_of(x if x.dtype == wide else x.to(wide))
        total = total + _checked(shift, h, shift_of)
    return total if total.dtype == h.dtype else total.to(h.dtype)


def steered_rows(h: Tensor, seen: Sites, bank: Bank, index: Tensor) -> Tensor:
    """Each row (or token) of `h` with its own steer of a bank added.

    Args:
        h: The activation that is written, [batch, *rest, e].
        seen: Site → activation that is read, [batch, *rest, d].
        bank: Number → steers; a number may be missing, where that steer adds nothing.
        index: Which number each row gets, [batch], or each token, [batch, *rest];
            one that the bank does not hold, such as −1, leaves it as it is, bit for
            bit.

    Raises:
        ArgumentError: If a shift is no tensor of the shape of `h`.

    Example:
        >>> h = torch.tensor([[1.0], [2.0], [-0.0]])
        >>> bank = {0: {"x": lambda x: 10 * x}, 1: {"x": lambda x: x - x + 0.5}}
        >>> steered_rows(h, {"x": h}, bank, torch.tensor([1, 0, -1]))
        tensor([[ 1.5000],
                [22.0000],
                [-0.0000]])
    """
    out = h
    index = index.reshape(*index.shape, *[1] * (h.ndim - index.ndim))
    for number, steers in bank.items():
        out = torch.where(index == number, steered(h, seen, steers), out)
    return out


def _checked(shift: object, h: Tensor, shift_of: object) -> Tensor:
    if isinstance(shift, Tensor) and shift.shape == h.shape:
        return shift
    kind = type(shift).__name__
    raise ArgumentError(
        f"Expected {shift_of!r} to return a tensor shaped as the activations, "
        f"{tuple(h.shape)}, got "
        f"{tuple(shift.shape) if isinstance(shift, Tensor) else kind}."
    )
