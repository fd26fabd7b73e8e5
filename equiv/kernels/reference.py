"""The reference: PyTorch alone, eager, and what a CPU runs.

Rows that get one steer are taken together, a tile at a time: its weights are read where
they are, never written out per row, and a tile stays in the cache between what is done
to it, so that activations are read and written about once. Every product has the same
number of rows; what a row comes to does not depend on how many others got its steer.

What is written may be what is read (`out is h`): rows that get no steer are then not
touched at all.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from equiv.errors import ArgumentError
from equiv.kernels.activations import ACTIVATIONS, SLOPES
from equiv.kernels.rows import TILE, grouped, spread, wide

# Numbers of one chunk of rows of an elementwise shift: half a megabyte in float32.
_CHUNK = 2**17
# Entries of fewer rows are taken row by row, of more one after the other.
_FEW = 8


def vector_shift(
    h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, out: Tensor
) -> None:
    """Out = h + scale · bank[index]; shapes as in `equiv.kernels.rows`."""
    check_index(index, len(bank))
    if not h.numel():
        return
    rows, d = h.shape
    chunk, each = max(1, _CHUNK // d), rows // len(index)
    strength = None if scale is None else spread(scale, rows)
    numbers = spread(index, rows) if each < _FEW else index
    for start in range(0, rows, chunk if each < _FEW else each):
        if each < _FEW:
            number = numbers[start : start + chunk]
            _shift_rows(h, bank, strength, number, start, out)
            continue
        one = int(numbers[start // each])
        for first in range(start, start + each, chunk):
            at = slice(first, min(first + chunk, start + each))
            if one >= 0:
                out[at] = _shifted(h, bank[one], strength, at)
            elif out is not h:
                out[at] = h[at]


def _shift_rows(
    h: Tensor,
    bank: Tensor,
    strength: Tensor | None,
    number: Tensor,
    start: int,
    out: Tensor,
) -> None:
    """A chunk of rows that begins at `start`, each with its own steer."""
    live = torch.nonzero(number >= 0)[:, 0]
    at = slice(start, start + len(number))
    if len(live) == len(number):
        out[at] = _shifted(h, bank[number.long()], strength, at)
        return
    if out is not h:
        out[at] = h[at]
    if len(live):
        picked = live + start
        out[picked] = _shifted(h, bank[number[live].long()], strength, picked)


def _shifted(
    h: Tensor, v: Tensor, strength: Tensor | None, at: slice | Tensor
) -> Tensor:
    to = wide(h.dtype)
    v = v.to(to)
    if strength is not None:
        v = v * strength[at][:, None].to(to)
    return (h[at].to(to) + v).to(h.dtype)


def low_rank(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
    out: Tensor,
    z: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Out = base + scale · upᵀ a, where a = φ(z) and z = down x + bias.

    Args:
        x: What is read, [rows, d].
        base: What is added to, [rows, e]; `None` for zero.
        down: Of each steer, [n, r, d].
        up: Of each steer, [n, r, e].
        bias: Of each steer, [n, r].
        scale: Strength, [entries].
        index: Steer, [entries]; −1 for none.
        activation: The name of φ.
        out: What is written, [rows, e].
        z: What takes z, [rows, r]; zero where there is no steer.
        gate: With it the map is linear, a = φ′(gate) z: the tangent, and with `down`
            and `up` exchanged the gradient. [rows, r].
    """
    check_index(index, len(down))
    if z is not None:
        z.zero_()
    if not x.shape[0]:
        return
    rows, to = x.shape[0], wide(x.dtype)
    full = spread(index, rows)
    strength = None if scale is None else spread(scale, rows).to(to)
    if out is not base:
        _copy_unshifted(full, base, out)
    (_, r, e), number, weights = up.shape, -1, (down[0], up[0])
    for one, at in grouped(full, TILE):
        if one != number:
            number, weights = one, (_even(down[one].to(to)), _even(up[one].to(to)))
        found = _even(x[at].to(to), TILE) @ weights[0].T
        count = at.stop - at.start if isinstance(at, slice) else len(at)
        if bias is not None:
            found[:, :r] += bias[one].to(to)
        if z is not None:
            z[at] = found[:count, :r]
        if gate is None:
            a = ACTIVATIONS[activation](found)
        else:
            a = found * _even(SLOPES[activation](gate[at]), TILE)
        if strength is not None:
            a[:count] *= strength[at][:, None]
        total = (a @ weights[1])[:count, :e]
        if base is not None:
            total += base[at]
        out[at] = total.to(out.dtype)


def _even(matrix: Tensor, rows: int = 0) -> Tensor:
    """With zeros as many rows as asked, and both sides multiples of 16.

    Of other widths, the library below sums a row in an order that depends on where in
    the matrix it stands.
    """
    missing = max(rows - matrix.shape[0], -matrix.shape[0] % 16)
    narrow = -matrix.shape[1] % 16
    return pad(matrix, (0, narrow, 0, missing)) if missing or narrow else matrix


def _copy_unshifted(full: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Rows that get no steer, as they are."""
    none = torch.nonzero(full < 0)[:, 0]
    for first in range(0, len(none), TILE):
        at = none[first : first + TILE]
        out[at] = 0 if base is None else base[at]


def candidate_shifts(
    h: Tensor, bank: Tensor, scale: Tensor | None, out: Tensor
) -> None:
    """Out [n, rows, d] = h + scale[k] · bank[k]: a chunk of h is read once for all."""
    if not h.numel():
        return
    to, chunk = wide(h.dtype), max(1, _CHUNK // h.shape[1])
    v = bank.to(to)
    if scale is not None:
        v = v * scale[:, None].to(to)
    for first in range(0, h.shape[0], chunk):
        part = h[first : first + chunk].to(to)
        for number in range(len(v)):
            out[number, first : first + chunk] = part + v[number]


def check_index(index: Tensor, count: int) -> None:
    """Refuse numbers that the bank does not have.

    Raises:
        ArgumentError: If there are any.
    """
    if index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < -1 or high >= count:
            raise ArgumentError(
                f"Expected `index` within −1…{count - 1}, one of the {count} steers of "
                f"the bank or −1 for none, got {low}…{high}."
            )
