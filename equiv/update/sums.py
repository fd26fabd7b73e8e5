"""Sums of updates: factors stay factors, what is deferred stays deferred."""

from collections.abc import Mapping

import torch

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.entries import Deferred, Entry, shape_at
from equiv.update.low_rank import Delta, LowRank


def added(
    first: Mapping[str, Delta], second: Mapping[str, Delta]
) -> Mapping[str, Delta]:
    """Entry by entry, first + second; an entry that one of them lacks is zero there.

    Raises:
        UpdateMismatchError: If an entry has two shapes or devices.
    """
    names = dict.fromkeys((*first, *second))
    if isinstance(first, Deferred) or isinstance(second, Deferred):
        return Deferred({name: _later(name, first, second) for name in names})
    return {name: _sum(name, first, second) for name in names}


def _later(name: str, first: Mapping[str, Delta], second: Mapping[str, Delta]) -> Entry:
    held = [deltas for deltas in (first, second) if name in deltas]
    held.sort(key=lambda deltas: isinstance(deltas, Deferred), reverse=True)
    source = held[0]  # what is on disk is in the weight's own shape
    known = source.entries[name].norm if isinstance(source, Deferred) else None
    return Entry(
        lambda: _sum(name, first, second),
        shape_at(source, name),
        known if len(held) == 1 else None,
    )


def _sum(name: str, first: Mapping[str, Delta], second: Mapping[str, Delta]) -> Delta:
    if name not in second:
        return first[name]
    if name not in first:
        return second[name]
    a, b = first[name], second[name]
    if _direction(a) != _direction(b):
        a, b = _turned(name, a, b), _turned(name, b, a)
    if tuple(a.shape) != tuple(b.shape):
        raise UpdateMismatchError(
            f"Cannot add `{name}` of shape {tuple(a.shape)} to one of shape "
            f"{tuple(b.shape)}: the two updates belong to different models."
        )
    if (one := _device(a)) != (other := _device(b)):
        raise UpdateMismatchError(
            f"Cannot add `{name}` on {one} to one on {other}: move one of the updates."
        )
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = torch.cat([a.left.double(), b.left.double()], dim=1)
        right = torch.cat([a.right.double(), b.right.double()], dim=0)
        return LowRank(left, right, a.as_linear)
    return _dense(a) + _dense(b)


def _direction(delta: Delta) -> bool:
    return isinstance(delta, LowRank) and delta.as_linear


def _turned(name: str, delta: Delta, other: Delta) -> Delta:
    """Factors read from a file, in the direction of the weight that the other is of.

    The file does not say whether the layer keeps its weight transposed, as GPT-2's do.
    """
    if not isinstance(delta, LowRank) or not delta.as_linear:
        return delta
    out, inside = delta.shape
    if out == inside:
        raise UpdateError(
            f"Cannot add to `{name}`: the adapter's folder does not say which side of "
            "this square weight is its input. Read it with its base: "
            "`Update.from_peft(path, base)`."
        )
    if tuple(other.shape) == (inside, out):
        return LowRank(delta.right.T, delta.left.T)
    return LowRank(delta.left, delta.right)


def _device(delta: Delta) -> torch.device:
    return delta.left.device if isinstance(delta, LowRank) else delta.device


def _dense(delta: Delta) -> torch.Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta.double()
