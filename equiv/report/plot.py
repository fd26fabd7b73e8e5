"""Pictures of first order, with matplotlib: the heat map and the Taylor plots."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equiv.report.drawing import GREY, blank, clean, shades
from equiv.report.naming import ENDS, has_midpoint, is_plain
from equiv.report.numbers import figure, scale
from equiv.report.values import Row, Scope, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from equiv.report.report import Report

# More layers than these are named in part: the shades between them are in order.
_NAMED_LAYERS = 6
# Remainders outside are coloured like these.
_SHADED = (1e-3, 1.0)


def heat_map(report: "Report") -> "Figure":
    """Relative remainder at full size by layer and site, from base and midpoint."""
    rows = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    titles = ["from the base", "from the midpoint"][: 1 + has_midpoint(report)]
    plain = is_plain(report)
    sites = list(dict.fromkeys(row.site for row in rows))
    # Sites that are all in one layer are better to read as rows than as one long row.
    lines = (
        sites
        if plain
        else list(
            dict.fromkeys(r.site if r.site in ENDS else str(r.layer) for r in rows)
        )
    )
    made = blank(9.0, max(2.0, 0.9 + 0.32 * len(lines)))
    panels = made.subplots(1, len(titles), squeeze=False)[0]
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        grid = [[math.nan] * (1 if plain else len(sites)) for _ in lines]
        for row in rows:
            value = row.remainder_midpoint if k else row.remainder
            named = row.site in lines
            line = lines.index(row.site if named else str(row.layer))
            column = 0 if plain else sites.index(row.site)
            grid[line][column] = math.nan if value is None else value
        _heat_panel(axes, grid)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_xticks(*([], []) if plain else (range(len(sites)), sites))
        axes.set_ylabel("site" if plain else "layer")
        axes.set_title(f"remainder {title}", loc="left", fontsize=10, color=GREY)
    return made


def _heat_panel(axes: "Axes", grid: Sequence[Sequence[float]]) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    colours = np.clip(grid, *_SHADED)
    axes.imshow(colours, cmap="viridis_r", norm=LogNorm(*_SHADED), aspect="auto")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if not math.isnan(value):
                axes.text(
                    j,
                    i,
                    figure(value, 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.02 else "black",
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
    made = blank(9.0, 2.9 * lines + 0.4)
    panels = made.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat:
        clean(axes)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    colours = _layer_colours(rows)
    for axes, site in zip(panels.flat, sites, strict=False):
        _taylor_panel(axes, [row for row in rows if row.site == site], colours)
        axes.set_title(site, loc="left", fontsize=10)
    for i, axes in enumerate(panels.flat):
        axes.set_visible(i < len(sites))
        if i + columns >= len(sites):  # nothing is drawn below
            axes.set_xlabel("scale t of the update")
            axes.tick_params(labelbottom=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("relative remainder")
    _taylor_legend(made, report, rows, colours)
    return made


def _layer_colours(rows: Sequence[Row]) -> dict[int, Any]:
    """A shade per layer; black for the head."""
    found = shades(row.layer for row in rows if row.site not in ENDS)
    return {row.layer: "black" for row in rows} | found


def _taylor_panel(axes: "Axes", rows: Sequence[Row], colours: dict[int, Any]) -> None:
    drawn = False
    for row in rows:
        floor = 16 * (row.taylor_floor or 0.0)
        for style in ("-", "--") if row.order_midpoint else ("-",):
            points = [
                (p.scale, remainder / p.shift)
                for p in row.taylor
                if (remainder := p.remainder if style == "-" else p.remainder_midpoint)
                and p.shift > 0
                and remainder > floor
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, color=colours[row.layer], linewidth=1.3)
                drawn = True
    if not drawn:
        axes.text(
            0.5, 0.5, "zero to rounding", transform=axes.transAxes, ha="center"
        ).set_color(GREY)
    tolerance = next((r.radius.tolerance for r in rows if r.radius), 0.1)
    axes.axhline(tolerance, color="#D55E00", linewidth=0.9, linestyle=":")
    # Also where nothing is drawn: a lone line gives a log axis no extent.
    axes.update_datalim([(p.scale, tolerance) for p in rows[0].taylor] + [(1.0, 1.0)])
    axes.autoscale_view()
    axes.annotate(
        f"{scale(100 * tolerance)} %",
        (0.01, tolerance),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        color="#D55E00",
        va="bottom",
    )


def _taylor_legend(
    made: "Figure", report: "Report", rows: Sequence[Row], colours: dict[int, Any]
) -> None:
    """Which line style is which derivative, and which shade which layer."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=GREY, label="from the base")]
    if has_midpoint(report):
        keys.append(Line2D([], [], color=GREY, ls="--", label="from the midpoint"))
    layers = sorted({row.layer for row in rows if row.site not in ENDS})
    if len(layers) > _NAMED_LAYERS:
        layers = [layers[0], layers[len(layers) // 2], layers[-1]]
    if not is_plain(report):
        keys += [
            Line2D([], [], color=colours[layer], label=f"layer {layer}")
            for layer in layers
        ]
    made.legend(
        handles=keys,
        loc="outside lower center",
        ncols=len(keys),
        frameon=False,
        fontsize=8,
    )
