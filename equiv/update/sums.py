"""Sums of updates: factors stay factors, what is deferred stays deferred."""

from collections.abc import Mapping

import torch

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.entries import Deferred, Entry, factored_at, shape_at
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
        all(factored_at(deltas, name) for deltas in held),
    )


def _sum(name: str, first: Mapping[str, Delta], second: Mapping[str, Delta]) -> Delta:
    if name not in second:
        return first[name]
    if name not in first:
        return second[name]
    a, b = aligned(name, first[name], second[name])
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = torch.cat([a.left.double(), b.left.double()], dim=1)
        right = torch.cat([a.right.double(), b.right.double()], dim=0)
        return LowRank(left, right, a.as_linear)
    return _dense(a) + _dense(b)


def aligned(name: str, a: Delta, b: Delta) -> tuple[Delta, Delta]:
    """Two entries of one parameter, both in the direction of the weight.

    Raises:
        UpdateMismatchError: If they have two shapes or devices.
        UpdateError: If factors from a folder lie on a square weight and the other entry
            does not say which way round it is.
    """
    if _direction(a) != _direction(b):
        a, b = _turned(name, a, b), _turned(name, b, a)
    if tuple(a.shape) != tuple(b.shape):
        raise UpdateMismatchError(
            f"`{name}` is of shape {tuple(a.shape)} here and of "
            f"{tuple(b.shape)}: the two updates belong to different models."
        )
    if (one := _device(a)) != (other := _device(b)):
        raise UpdateMismatchError(
            f"`{name}` is on {one} here and on {other} there: move one of the updates."
        )
    return a, b


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
            f"`{name}` cannot be compared: the adapter's folder does not say which "
            "side of this square weight is its input. Read it with its base: "
            "`Update.from_peft(path, base)`."
        )
    if tuple(other.shape) == (inside, out):
        return LowRank(delta.right.T, delta.left.T)
    return LowRank(delta.left, delta.right)


def _device(delta: Delta) -> torch.device:
    return delta.left.device if isinstance(delta, LowRank) else delta.device


def _dense(delta: Delta) -> torch.Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta.double()
