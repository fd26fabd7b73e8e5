"""The same functions in PyTorch's own operations, which every transform goes through.

They define the derivatives: forward mode and second derivatives are taken of these.
Shapes depend on shapes alone, so that they can be traced. What no row selects is
replaced by zero before it meets anything, since 0 · NaN = NaN in a gradient too.
"""

import torch
from torch import Tensor

from equiv.kernels.activations import ACTIVATIONS
from equiv.kernels.rows import Tiles, spread, wide


def vector_shift(
    h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor
) -> Tensor:
    """H + scale · bank[index]; shapes as in `equiv.kernels.rows`."""
    rows, to = h.shape[0], wide(h.dtype)
    live = index >= 0
    v = bank.to(to)[index.long().clamp_min(0)]
    v = spread_rows(torch.where(live[:, None], v, 0), rows)
    if scale is not None:
        v = v * spread(scale, rows)[:, None].to(to)
    shifted = (h.to(to) + v).to(h.dtype)
    return torch.where(spread(live, rows)[:, None], shifted, h)


def spread_rows(value: Tensor, rows: int) -> Tensor:
    """[entries, d] → [rows, d]."""
    entries, d = value.shape
    return value[:, None].expand(-1, rows // entries, -1).reshape(rows, d)


def low_rank(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
) -> Tensor:
    """Base + scale · upᵀ φ(down x + bias), tile by tile of rows that get one steer.

    Without a base it is x itself.
    """
    base = x if base is None else base
    rows, to = x.shape[0], wide(x.dtype)
    full = spread(index, rows)
    tiles = Tiles.of(full, down.shape[0])
    number, some = tiles.number.clamp_min(0), tiles.number >= 0

    def own(weights: Tensor) -> Tensor:
        return torch.where(some[:, None, None], weights.to(to)[number], 0)

    z = torch.where(tiles.live[..., None], x.to(to)[tiles.rows], 0) @ own(down).mT
    if bias is not None:
        z = z + own(bias[:, None])
    a = ACTIVATIONS[activation](z)
    if scale is not None:
        a = a * spread(scale, rows).to(to)[tiles.rows][..., None]
    shift = (torch.where(tiles.live[..., None], a, 0) @ own(up)).flatten(0, 1)
    shifted = (base.to(to) + shift[tiles.lane]).to(base.dtype)
    return torch.where((full >= 0)[:, None], shifted, base)


def candidate_shifts(h: Tensor, bank: Tensor, scale: Tensor | None) -> Tensor:
    """[rows, d] → [n, rows, d]: h + scale[k] · bank[k]."""
    to = wide(h.dtype)
    v = bank.to(to)
    if scale is not None:
        v = v * scale[:, None].to(to)
    return (h.to(to)[None] + v[:, None]).to(h.dtype)
