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

# Numbers of one chunk of rows of an elementwise shift: one megabyte in float32.
_CHUNK = 2**18
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
    full = spread(index, rows)
    if out is h:
        live = torch.nonzero(full >= 0)[:, 0]
        for at in live.split(chunk):
            v = _vectors(bank, full[at], strength, at, h.dtype)
            out.index_copy_(0, at, v.add_(h[at]).to(h.dtype))
        return
    step = chunk if each < _FEW else each
    for start in range(0, rows, step):
        for first in range(start, min(start + step, rows), chunk):
            at = slice(first, min(first + chunk, start + step, rows))
            number = full[at] if each < _FEW else full[first : first + 1]
            _add_to(h[at], _vectors(bank, number, strength, at, h.dtype), out[at])
    none = torch.nonzero(full < 0)[:, 0]
    for at in none.split(chunk):
        out.index_copy_(0, at, h[at])


def _vectors(
    bank: Tensor,
    number: Tensor,
    strength: Tensor | None,
    at: slice | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · bank[number], new, [rows, d]; of one number maybe [1, d]."""
    v = bank.index_select(0, number.clamp_min(0)).to(wide(dtype))
    return v if strength is None else v * strength[at][:, None].to(v.dtype)


def _add_to(h: Tensor, v: Tensor, out: Tensor) -> None:
    """Out = h + v, in the dtype of v, and rounded once."""
    if h.dtype == v.dtype:
        torch.add(h, v, out=out)
    else:
        out.copy_(h.to(v.dtype).add_(v))


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
    (_, r, e), number = up.shape, -1
    thin, thick, inner = down[0], up[0], None
    for one, at in grouped(full, TILE):
        if one != number:
            number, thin = one, _even(down[one].to(to)).T
            thick = _even(up[one].to(to))
            inner = None if bias is None else _even(bias[one, None].to(to))[0]
        found = _even(x[at].to(to), TILE) @ thin
        count = at.stop - at.start if isinstance(at, slice) else len(at)
        if inner is not None:
            found += inner
        if z is not None:
            z[at] = found[:count, :r]
        if gate is None:
            a = ACTIVATIONS[activation](found)
        else:
            a = found * _even(SLOPES[activation](gate[at]), TILE)
        if strength is not None:
            a[:count] *= strength[at][:, None]
        if base is not None and isinstance(at, slice) and _whole(base[at], thick):
            torch.addmm(base[at], a, thick, out=out[at])
            continue
        first = None if base is None else _even(base[at].to(to), TILE)
        total = a @ thick if first is None else torch.addmm(first, a, thick)
        out[at] = total[:count, :e].to(out.dtype)


def _whole(base: Tensor, up: Tensor) -> bool:
    """Whether a product is added to these rows as they are."""
    return base.dtype == up.dtype and base.shape == (TILE, up.shape[1])


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
    chunk, v = max(1, _CHUNK // h.shape[1]), bank.to(wide(h.dtype))
    if scale is not None:
        v = v * scale[:, None].to(v.dtype)
    for first in range(0, h.shape[0], chunk):
        part = h[first : first + chunk].to(v.dtype)
        for number in range(len(v)):
            to = out[number, first : first + chunk]
            if to.dtype == v.dtype:
                torch.add(part, v[number], out=to)
            else:
                to.copy_(part + v[number])


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
