"""The entries of an update: held in memory, or read from disk when they are needed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equiv.errors import UpdateError
from equiv.update.low_rank import Delta, LowRank, norm_of


@dataclass(frozen=True)
class Entry:
    """One difference that is made when it is asked for.

    Attributes:
        read: Makes it.
        shape: Its shape.
        norm: Its Frobenius norm, where known.
        factored: Whether it is kept as two factors.
    """

    read: Callable[[], Delta]
    shape: tuple[int, ...]
    norm: float | None = None
    factored: bool = False


class Deferred(Mapping[str, Delta]):
    """Parameter name → difference, made anew at every look: nothing is kept.

    Example:
        >>> entry = Entry(lambda: torch.ones(2), (2,))
        >>> Deferred({"bias": entry})["bias"]
        tensor([1., 1.])
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Delta:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def shape_at(deltas: Mapping[str, Delta], name: str) -> tuple[int, ...]:
    """Shape of one entry, without reading it."""
    if isinstance(deltas, Deferred):
        return deltas.entries[name].shape
    return tuple(deltas[name].shape)


def norm_at(deltas: Mapping[str, Delta], name: str) -> float:
    """Frobenius norm of one entry, without reading it where that is known."""
    known = deltas.entries[name].norm if isinstance(deltas, Deferred) else None
    return norm_of(deltas[name]) if known is None else known


def factored_at(deltas: Mapping[str, Delta], name: str) -> bool:
    """Whether one entry is kept as two factors, without reading it."""
    if isinstance(deltas, Deferred):
        return deltas.entries[name].factored
    return isinstance(deltas[name], LowRank)


def mapped(
    deltas: Mapping[str, Delta],
    change: Callable[[str, Delta], Delta],
    factor: float = 1.0,
) -> Mapping[str, Delta]:
    """Every entry changed; what is deferred stays so.

    Args:
        deltas: The entries.
        change: From a name and its entry to another entry, factors to factors.
        factor: What it multiplies norms by.
    """
    if not isinstance(deltas, Deferred):
        return {name: change(name, delta) for name, delta in deltas.items()}

    def later(name: str, entry: Entry) -> Entry:
        norm = None if entry.norm is None else entry.norm * factor
        return replace(entry, read=lambda: change(name, entry.read()), norm=norm)

    return Deferred({name: later(name, e) for name, e in deltas.entries.items()})


def some(deltas: Mapping[str, Delta], names: Mapping[str, str]) -> Mapping[str, Delta]:
    """Some entries under new names; what is deferred stays so.

    Args:
        deltas: The entries.
        names: New name → name in `deltas`.
    """
    if isinstance(deltas, Deferred):
        return Deferred({new: deltas.entries[old] for new, old in names.items()})
    return {new: deltas[old] for new, old in names.items()}


def check_delta(name: object, delta: object) -> None:
    """Refuse what is no difference of weights.

    Raises:
        UpdateError: If it is no dense floating tensor, or not finite.
    """
    if not isinstance(name, str):
        raise UpdateError(f"Expected parameter names as keys, got {name!r}.")
    parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise UpdateError(
                f"Expected a tensor for `{name}`, got {type(part).__name__}."
            )
        if part.layout != torch.strided:
            raise UpdateError(
                f"Expected a dense tensor for `{name}`, got layout {part.layout}: call "
                "`.to_dense()`."
            )
        if not part.is_floating_point():
            raise UpdateError(
                f"Expected a floating dtype for `{name}`, got {part.dtype}."
            )
        if part.is_meta:
            raise UpdateError(
                f"`{name}` of the update is on the meta device: no values."
            )
        if not bool(torch.isfinite(part).all()):
            raise not_finite(name, int((~torch.isfinite(part)).sum()))


def not_finite(name: str, count: int) -> UpdateError:
    """The refusal of an entry with NaN or infinite numbers."""
    return UpdateError(
        f"`{name}` of the update has {count} NaN or infinite entries. Expected "
        "finite numbers: did the fine-tuning diverge?"
    )
