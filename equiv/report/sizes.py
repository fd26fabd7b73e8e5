"""What each layer adds to the output, and what steering of every size leaves there."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from equiv.report.answer import best
from equiv.report.grid import Grid
from equiv.report.naming import at, end
from equiv.report.numbers import figure, percent
from equiv.report.prose import Prose
from equiv.report.values import Spectrum

if TYPE_CHECKING:
    from equiv.report.report import Report

_SHOWN = (1, 2, 4, 8, 16, 32, 64)


def shown_ranks(report: "Report") -> list[int]:
    """The ranks that tables have columns for."""
    widest = max((len(s.affine) for s in report.spectra), default=0)
    return [rank for rank in _SHOWN if rank <= widest]


def sizes(report: "Report") -> Iterator[RenderableType]:
    """A line per layer, at the site of the best fitted steering."""
    row = best(report)
    found = [s for s in report.spectra if row is not None and s.site == row.site]
    if not found:
        return
    ranks = [rank for rank in _SHOWN if rank <= len(found[0].affine)]
    header = ["layer", "adds", "vector", *(f"r{rank}" for rank in ranks)]
    lines = [[str(s.layer), _adds(report, s.layer), *_left(s, ranks)] for s in found]
    title = "Share of the shift's effect on the output that is left by steering"
    yield Grid(f"{title} {at(found[0].site)}, by rank (held out)", header, lines)
    if (outside := _outside(report)) is not None:
        yield Prose(
            "Adds: share of the output's first-order change that the layer's own "
            f"update makes; {percent(outside)} comes from the embedding and the "
            f"{end(report)}."
        )
    yield Text("")


def _left(spectrum: Spectrum, ranks: list[int]) -> list[str]:
    shares = [spectrum.output_vector, *(spectrum.output_affine[r - 1] for r in ranks)]
    return [figure(share, 2) for share in shares]


def _adds(report: "Report", layer: int) -> str:
    parts = report.contributions
    return "–" if parts is None else percent(parts.share(layer))


def _outside(report: "Report") -> float | None:
    """What no block adds."""
    if (parts := report.contributions) is None:
        return None
    return parts.share(-1) + parts.share(report.subject.num_layers)
