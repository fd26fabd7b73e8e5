"""Pictures of docs/findings.md: small SVG files, the same bytes from the same results.

Each has its own background and is readable on a light and on a dark page: a style
inside the file swaps the colours where the reader's system asks for dark ones.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.findings_results import AbsentError, Results
from equiv.report.drawing import COLOURS, MARKERS, blank, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
BLUE, ORANGE, GREEN, PINK = COLOURS[:4]
# Light → dark, as matplotlib writes them.
_DARK = {
    INK: "#e6edf3",
    SOFT: "#9198a1",
    LINE: "#3d444d",
    PAPER: "#0d1117",
    BLUE: "#58a6e8",
    ORANGE: "#f0883e",
    GREEN: "#3fb984",
    PINK: "#e3a0c6",
}
_LOOK: dict[Any, Any] = {
    "svg.hashsalt": "findings",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "grid.color": LINE,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
}


def drawn(results: Results) -> dict[str, str]:
    """Name → SVG of every picture whose claims are among the results."""
    from matplotlib import rc_context

    found = {}
    for name, draw in PICTURES.items():
        with rc_context(_LOOK):
            try:
                found[name] = _svg(draw(results))
            except AbsentError:
                continue
    return found


def _svg(figure: "Figure") -> str:
    """Without a date, and with the colours of the dark."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f'[style*="{kind}: {light.lower()}"]{{{kind}:{dark}!important}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    head, begin, rest = out.getvalue().partition("<defs>")
    text = f"{head}{style}\n {begin}{rest}"
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _axes(figure: "Figure", title: str, x: str, y: str) -> "Axes":
    axes = figure.subplots()
    clean(axes)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def oracles(results: Results) -> "Figure":
    """How far from the tuned state a steered run is, block by block."""
    evidence = results.holds(7)["evidence"]
    figure = blank(6.4, 3.2)
    axes = _axes(
        figure,
        "Distance to the tuned run, by block",
        "after block",
        "unsteered run = 1",
    )
    axes.axhline(1, color=SOFT, linewidth=1, linestyle=":")
    for k, (name, label) in enumerate(
        {
            "simultaneous, by block": "offsets of the unsteered run, all at once",
            "sequential, by block": "offsets from the steered run",
        }.items()
    ):
        axes.plot(
            evidence[name],
            color=(ORANGE, BLUE)[k],
            marker=MARKERS[k],
            label=label,
            clip_on=False,
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(evidence["sequential, by block"])))
    axes.legend()
    return figure


PICTURES: dict[str, Callable[[Results], "Figure"]] = {"oracles": oracles}
