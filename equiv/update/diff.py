"""Two updates side by side: what only one of them moves, and how alike they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from equiv.update.entries import norm_at
from equiv.update.low_rank import Delta
from equiv.update.spectra import inner
from equiv.update.sums import aligned


@dataclass(frozen=True)
class UpdateDiff:
    """Two updates side by side; printing it says it in words.

    Attributes:
        first: Source of the one.
        second: Source of the other.
        both: Names of the parameters that both move.
        only_first: Names that only the first moves.
        only_second: Names that only the second moves.
        cosine: Cosine of the angle between the two, over all entries of both.
    """

    first: str
    second: str
    both: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    cosine: float

    def __str__(self) -> str:
        lines = [f"in both: {len(self.both)}, cosine {self.cosine:.3g}"]
        for source, names in (
            (self.first, self.only_first),
            (self.second, self.only_second),
        ):
            if names:
                shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                lines.append(f"only in {source}: {len(names)} ({shown})")
        return "\n".join(lines)


def diff_of(
    first: tuple[str, Mapping[str, Delta]], second: tuple[str, Mapping[str, Delta]]
) -> UpdateDiff:
    """Two updates, each its source and its entries, side by side.

    Raises:
        UpdateMismatchError: If an entry has two shapes.
    """
    (source, mine), (other, theirs) = first, second
    both = tuple(name for name in mine if name in theirs)
    product = sum(inner(*aligned(n, mine[n], theirs[n])) for n in both)
    sizes = [math.hypot(*(norm_at(d, n) for n in d)) for d in (mine, theirs)]
    length = sizes[0] * sizes[1]
    return UpdateDiff(
        source,
        other,
        both,
        tuple(name for name in mine if name not in theirs),
        tuple(name for name in theirs if name not in mine),
        product / length if length else 0.0,
    )
