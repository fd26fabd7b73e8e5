"""Pictures of a report, with matplotlib: the ladder, the heat map, the Taylor plots."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equiv.errors import ArgumentError, MissingExtraError
from equiv.model.sites import LOGITS, OUTPUT
from equiv.report.answer import unsteered
from equiv.report.numbers import figure, scale
from equiv.report.values import Behaviour, Row, Scope, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from equiv.report.report import Report

# Okabe–Ito colours, told apart by people with any colour vision; markers besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#666666"


def _figure(width: float, height: float) -> "Figure":
    """A figure that belongs to nobody's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "Pictures need matplotlib: pip install 'equiv[report]'."
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _clean(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def ladder(report: "Report") -> "Figure":
    """What each way of steering recovers of the update's behaviour, a line per site.

    Raises:
        ArgumentError: If the report has no behaviour.
        MissingExtraError: If matplotlib is not installed.
    """
    none = unsteered(report)
    if none is None:
        raise ArgumentError(
            "This report has no behaviour to plot: expected a check with inputs."
        )
    rows = [row for row in report.behaviour if row.layers == "all" and row.site]
    rungs = ["unsteered", *dict.fromkeys(row.rung for row in rows)]
    made = _figure(9.0, 4.4)
    axes = made.subplots()
    _clean(axes)
    for i, site in enumerate(dict.fromkeys(row.site for row in rows)):
        _ladder_line(axes, [row for row in rows if row.site == site], rungs, i)
    axes.axhline(1, color=_GREY, linewidth=0.8, linestyle=":")
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_xticks(
        range(len(rungs)), [rung.replace(" oracle", "\noracle") for rung in rungs]
    )
    what = "KL to the tuned model" if none.measure == "kl" else "output difference"
    axes.set_ylabel(f"share of the {what} recovered")
    axes.set_title(
        "All layers steered at one site; bars are 95 % bootstrap intervals",
        loc="left",
        fontsize=10,
        color=_GREY,
    )
    axes.legend(frameon=False, loc="best")
    return made


def _ladder_line(
    axes: "Axes", rows: Sequence[Behaviour], rungs: Sequence[str], i: int
) -> None:
    points = [(0.0, 0.0, 0.0, 0.0)]
    for row in rows:
        if row.recovered is None:
            continue
        low = row.recovered if row.recovered_low is None else row.recovered_low
        high = row.recovered if row.recovered_high is None else row.recovered_high
        points.append((rungs.index(row.rung), row.recovered, low, high))
    offset = 0.05 * (i - 1.5)  # sites side by side, so that bars stay apart
    x = [p[0] + offset for p in points]
    y = [p[1] for p in points]
    bars = [
        [max(0.0, p[1] - p[2]) for p in points],
        [max(0.0, p[3] - p[1]) for p in points],
    ]
    style: dict[str, Any] = {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
        "elinewidth": 1,
        "capsize": 2,
        "label": rows[0].site,
    }
    axes.errorbar(x, y, yerr=bars, **style)


def heat_map(report: "Report") -> "Figure":
    """Relative remainder at full size by layer and site, from base and midpoint."""
    rows = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    midpoint = any(row.remainder_midpoint is not None for row in rows)
    titles = ["from the base", "from the midpoint"][: 1 + midpoint]
    layers = list(dict.fromkeys(row.layer for row in rows))
    sites = list(dict.fromkeys(row.site for row in rows))
    # With few layers sites become the rows: better to read than a single long row.
    lines = len(sites) if len(layers) <= 2 else len(layers) + 1
    made = _figure(9.0, max(2.0, 0.6 + 0.32 * lines))
    panels = made.subplots(1, len(titles), squeeze=False)[0]
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        values = {
            (r.layer, r.site): (r.remainder_midpoint if k else r.remainder)
            for r in rows
        }
        _heat_panel(axes, values, layers, sites)
        axes.set_title(f"remainder {title}", loc="left", fontsize=10, color=_GREY)
    return made


def _heat_panel(
    axes: "Axes",
    values: dict[tuple[int, str], float | None],
    layers: Sequence[int],
    sites: Sequence[str],
) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    flip = len(layers) <= 2
    grid = np.full((len(layers), len(sites)), np.nan)
    for (layer, site), value in values.items():
        if value is not None:
            grid[layers.index(layer), sites.index(site)] = max(value, 1e-6)
    grid = grid.T if flip else grid
    axes.imshow(grid, cmap="viridis_r", norm=LogNorm(1e-3, 1), aspect="auto")
    ends = {layer: site for layer, site in values if site in (LOGITS, OUTPUT)}
    named = [ends.get(layer, layer) if not flip else layer for layer in layers]
    down, across = (sites, named) if flip else (named, sites)
    axes.set_yticks(range(len(down)), [str(d) for d in down])
    axes.set_xticks(range(len(across)), [str(a) for a in across])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            if not math.isnan(grid[i, j]):
                dark = grid[i, j] > 0.02
                axes.text(
                    j,
                    i,
                    figure(float(grid[i, j]), 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )


def taylor(report: "Report") -> "Figure":
    """Relative remainder against the scale of the update, per site, lines by layer."""
    rows = [
        row
        for row in report.rows
        if row.scope is Scope.PROPAGATED
        and row.taylor
        and row.order.verdict is not Verdict.NOT_APPLICABLE
    ]
    sites = list(dict.fromkeys(row.site for row in rows))[:6]
    columns = min(3, max(1, len(sites)))
    lines = math.ceil(max(1, len(sites)) / columns)
    made = _figure(9.0, 2.9 * lines)
    panels = made.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, site in zip(panels.flat, sites, strict=False):
        _taylor_panel(axes, [row for row in rows if row.site == site])
        axes.set_title(site, loc="left", fontsize=10)
    for axes in list(panels.flat)[len(sites) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("scale t of the update")
    for axes in panels[:, 0]:
        axes.set_ylabel("relative remainder")
    return made


def _taylor_panel(axes: "Axes", rows: Sequence[Row]) -> None:
    from matplotlib import colormaps

    _clean(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shades = colormaps["viridis"]
    for i, row in enumerate(rows):
        colour = shades(i / max(1, len(rows) - 1) * 0.85)
        floor = 16 * (row.taylor_floor or 0.0)
        kept = [p for p in row.taylor if p.shift > 0 and p.remainder > floor]
        if kept:
            x, y = zip(*((p.scale, p.remainder / p.shift) for p in kept), strict=True)
            axes.plot(x, y, color=colour, linewidth=1.3, label=f"layer {row.layer}")
        middle = [
            p
            for p in row.taylor
            if p.shift > 0 and p.remainder_midpoint and p.remainder_midpoint > floor
        ]
        if middle:
            x, y = zip(
                *((p.scale, (p.remainder_midpoint or 0) / p.shift) for p in middle),
                strict=True,
            )
            axes.plot(x, y, color=colour, linewidth=1.3, linestyle="--")
    tolerance = next((r.radius.tolerance for r in rows if r.radius), 0.1)
    axes.axhline(tolerance, color="#D55E00", linewidth=0.9, linestyle=":")
    axes.annotate(
        f"{scale(100 * tolerance)} %",
        (0.01, tolerance),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        color="#D55E00",
        va="bottom",
    )
