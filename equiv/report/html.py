"""A report as one self-contained page: no scripts, nothing fetched from anywhere."""

import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from equiv.report import ladder_plot, naming, numbers, plot
from equiv.report.answer import unsteered
from equiv.report.first_positions import told_apart
from equiv.report.meaning import meaning
from equiv.report.page import page
from equiv.report.prose import joined
from equiv.report.routing import KEPT, split_rows
from equiv.report.sizes import shown_ranks
from equiv.report.values import Scope, Verdict
from equiv.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from equiv.report.report import Report


def write_html(report: "Report", path: Path) -> None:
    """Write the page; the file is whole or absent."""
    write_text(path, to_html(report))


def to_html(report: "Report") -> str:
    """The page as a string.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    return page(
        "equiv.report",
        "report.html.j2",
        {
            "figure": numbers.figure,
            "percent": numbers.percent,
            "joined": joined,
            "reach": naming.reach,
            "listed": naming.listed,
        },
        report=report,
        subject=report.subject,
        facts=naming.subject(report),
        unit=naming.unit(report),
        few=partial(naming.few, report),
        plain=naming.is_plain(report),
        midpoint=naming.has_midpoint(report),
        ends=naming.ENDS,
        pairs=naming.differ(fit.site for fit in report.fits),
        between=numbers.between,
        propagated=[r for r in report.rows if r.scope is Scope.PROPAGATED],
        local=[r for r in report.rows if r.scope is Scope.LOCAL],
        own_shift=_fitted_to_their_own_shift(report),
        ranks=shown_ranks(report),
        apart=told_apart(report),
        kept=KEPT,
        split=split_rows(report),
        meaning=meaning(report),
        pictures=list(_pictures(report)),
    )


def _fitted_to_their_own_shift(report: "Report") -> list[str]:
    """Sites whose steering aims at their own shift though fits aim at the block's."""
    if naming.is_plain(report) or report.subject.target != "block":
        return []
    own = (row.writes for row in report.behaviour if row.target == "shift")
    return list(dict.fromkeys(own))


def _pictures(report: "Report") -> Iterator[tuple[str, str, str]]:
    """(title, caption, SVG) of each picture that the report has figures for."""
    if unsteered(report) is not None and not naming.moves_only_output(report):
        yield (
            "The ladder",
            "Share of the change in behaviour that each way of steering recovers. "
            "Fitted forms on the left, oracles that know the tuned activations on the "
            "right.",
            _svg(ladder_plot.ladder(report), "ladder"),
        )
    if any(row.remainder is not None for row in report.rows):
        where = "site" if naming.is_plain(report) else "layer and site"
        yield (
            "What first order leaves",
            f"Remainder of the exact shift at full size, as a share of it, by {where}.",
            _svg(plot.heat_map(report), "heat"),
        )
    if any(row.order.verdict is not Verdict.NOT_APPLICABLE for row in report.rows):
        yield (
            "The Taylor test",
            "Relative remainder against the scale of the update. From the base it "
            "falls like t"
            + (", from the midpoint like t²" if naming.has_midpoint(report) else "")
            + ". Points below the rounding floor are left out.",
            _svg(plot.taylor(report), "taylor"),
        )


def _svg(made: "Figure", name: str) -> str:
    """The figure as an SVG element whose ids no other figure shares."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return text.replace("url(#", f"url(#{name}-")
