"""The one shape that everything below uses, and which rows go together.

Activations are [rows, d]. What is said of rows (`index`, `scale`) comes as [entries],
where every entry is of rows / entries consecutive rows: a batch [32, 100, d] with an
index per sequence has 3200 rows and 32 entries, and nobody writes the index out.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.errors import ArgumentError

# Rows in one matrix product. Every product has this many, padded with zeros, so that
# the library below sums a row's terms in one order, whatever rows are beside it.
TILE = 32


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: at least float32."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def uncast(h: Tensor) -> AbstractContextManager[object]:
    """Autocast, if it is on, stays out of what is computed in here."""
    kind = h.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def entries(name: str, value: Tensor, leading: tuple[int, ...]) -> Tensor:
    """What is said of rows, [entries], from what broadcasts to the leading axes.

    Raises:
        ArgumentError: If it does not.

    Example:
        >>> per_sequence = torch.tensor([[1], [0]])
        >>> entries("index", per_sequence, (2, 100))  # 100 rows each
        tensor([1, 0])
        >>> entries("index", torch.tensor([1, 0]), (3, 2))
        tensor([1, 0, 1, 0, 1, 0])
    """
    shape = (1,) * (len(leading) - value.ndim) + tuple(value.shape)
    fits = len(shape) == len(leading)
    if not fits or any(
        s not in (1, own) for s, own in zip(shape, leading, strict=True)
    ):
        raise ArgumentError(
            f"Expected `{name}` to broadcast to the leading axes {tuple(leading)} of "
            f"`h`, got {tuple(value.shape)}."
        )
    said = len(shape)
    while said and shape[said - 1] == 1:
        said -= 1
    return value.reshape(shape[:said]).expand(leading[:said]).reshape(-1)


def spread(value: Tensor, rows: int) -> Tensor:
    """What is said of rows, once for each of them, [rows]."""
    return value[:, None].expand(-1, rows // value.shape[0]).reshape(rows)


def grouped(index: Tensor, tile: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Rows that get one steer, at most `tile` at a time; a slice where they are one.

    Args:
        index: Which steer each row gets, [rows]; −1 for none, which is left out.
        tile: How many rows go together at most.

    Example:
        >>> list(grouped(torch.tensor([1, 1, -1, 0, 1]), 2))
        [(0, slice(3, 4, None)), (1, slice(0, 2, None)), (1, slice(4, 5, None))]
    """
    order = torch.argsort(index, stable=True)
    numbers, counts = torch.unique_consecutive(index[order], return_counts=True)
    at = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        for first in range(at, at + count if number >= 0 else at, tile):
            rows = order[first : min(first + tile, at + count)]
            low, high = int(rows[0]), int(rows[-1]) + 1
            yield number, slice(low, high) if high - low == len(rows) else rows
        at += count


@dataclass(frozen=True)
class Tiles:
    """Rows in tiles of one steer each; the number of tiles depends on shapes alone.

    Attributes:
        rows: Which rows, [tiles, TILE]; of lanes that are not live, any.
        live: Which lanes hold a row, bool [tiles, TILE].
        number: The steer of each tile, [tiles]; −1 where the tile is empty.
        lane: Where each row is, counted through all tiles, [rows]; 0 if it gets none.
    """

    rows: Tensor
    live: Tensor
    number: Tensor
    lane: Tensor

    @classmethod
    def of(cls, index: Tensor, count: int) -> "Tiles":
        """Without waiting for the device, and in operations of every transform.

        Args:
            index: Which of the steers each row gets, [rows]; −1 for none.
            count: How many steers there are.
        """
        total = index.shape[0]
        key = torch.where(index < 0, count, index.long())  # those of none come last
        order = torch.argsort(key, stable=True)
        own = key[:, None] == torch.arange(count + 1, device=index.device)
        counts = own.sum(0)
        start = counts.cumsum(0) - counts
        tiles = (counts[:count] + TILE - 1) // TILE
        end = tiles.cumsum(0)
        number = torch.arange(min(total, total // TILE + count), device=index.device)
        group = (number[:, None] >= end[None]).sum(1)  # `count` where the tile is empty
        at = group.clamp_max(count - 1)
        offset = (number - (end - tiles)[at]) * TILE
        lanes = offset[:, None] + torch.arange(TILE, device=index.device)
        live = (lanes < counts[at][:, None]) & (group < count)[:, None]
        place = (start[at][:, None] + lanes).clamp(0, total - 1)
        first = torch.cat([(end - tiles) * TILE - start[:count], start[:1] * 0])
        sorted_lane = torch.arange(total, device=index.device) + first[key[order]]
        lane = sorted_lane[torch.argsort(order)]
        return cls(
            rows=order[place],
            live=live,
            number=torch.where(group < count, group, -1),
            lane=torch.where(index < 0, 0, lane),
        )
