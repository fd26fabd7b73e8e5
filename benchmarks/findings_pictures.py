"""Pictures of docs/findings.md: small SVG files, the same bytes from the same results.

Each has its own background and is readable on a light and on a dark page: a style
inside the file swaps the colours where the reader's system asks for dark ones.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.findings_results import AbsentError, Results
from equiv.report.drawing import COLOURS, MARKERS, blank, clean
from equiv.theory.trained import certainty

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
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
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


def _dress(axes: "Axes", title: str, x: str, y: str) -> None:
    clean(axes)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def oracles(results: Results) -> "Figure":
    """How far from the tuned state a steered run is, block by block."""
    evidence = results.holds(7)["evidence"]
    figure = blank(9.0, 3.5)
    axes, steered = figure.subplots(1, 2, width_ratios=(5, 4))
    title = "Distance to the tuned run, by block"
    _dress(axes, title, "after block", "unsteered run = 1")
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
            zorder=3,
        )
    axes.set_ylim(0, 1.3 * max(evidence["simultaneous, by block"]))
    axes.set_xticks(range(len(evidence["sequential, by block"])))
    axes.legend(loc="upper left")
    _offsets(steered, results.holds(12)["evidence"])
    return figure


def _offsets(axes: "Axes", evidence: Mapping[str, Any]) -> None:
    """KL that first-order offsets leave at full size, over that of no steering."""
    kinds = ("all blocks, propagated", "last block, propagated", "all blocks, local")
    _dress(axes, "KL left by first-order offsets", "no steering = 1", "")
    axes.grid(axis="y", visible=False)
    axes.axvline(1, color=SOFT, linewidth=1, linestyle=":")
    for k, (update, found) in enumerate(evidence.items()):
        whole = found["unsteered"]["KL at full size"]
        axes.plot(
            [found[kind]["KL at full size"] / whole for kind in kinds],
            [place + 0.16 * k - 0.08 for place in range(len(kinds))],
            color=(BLUE, ORANGE)[k],
            marker=MARKERS[k],
            linestyle="",
            label=update,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(-0.5, len(kinds) - 0.5)
    axes.invert_yaxis()
    axes.legend(loc="upper left")


def orders(results: Results) -> "Figure":
    """Orders of remainders at every site, and what is missed at full size."""
    base, middle = results.holds(10)["evidence"], results.holds(48)["evidence"]
    figure = blank(9.0, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    _dress(left, "Order of the remainder, every site", "block", "")
    for k, (found, name) in enumerate(((base, "base"), (middle, "midpoint"))):
        points = [
            (int(key.split(",")[0].removeprefix("layer ")), order)
            for update in found.values()
            for key, order in update["orders"].items()
        ]
        layers, values = zip(*_beside(points), strict=True)
        left.scatter(
            layers,
            values,
            s=9,
            color=(ORANGE, BLUE)[k],
            marker=MARKERS[k],
            linewidth=0,
            label=f"from the {name}",
        )
    left.set_ylim(1, 4)
    ends = next(iter(middle.values()))["left at full size"]["by"]
    left.set_xticks(range(len(ends)), [end.removeprefix("block ") for end in ends])
    left.legend(loc="upper left", ncols=2, columnspacing=1, handletextpad=0.2)
    _dress(right, "Missed at full size, share of the shift", "", "")
    for update, style in zip(middle, ("-", "--"), strict=True):
        missed = dict(middle[update]["left at full size"])
        places = missed.pop("by")
        for k, (name, shares) in enumerate(missed.items()):
            colour = (ORANGE, BLUE, GREEN, PINK, SOFT)[k]
            right.plot(
                places,
                shares,
                style,
                color=colour,
                marker=MARKERS[k],
                markersize=4,
                label=_derivatives(name) if style == "-" else None,
            )
    right.set_yscale("log")
    right.plot([], [], "--", color=SOFT, label=f"dashed: {[*middle][1]}")
    right.legend(bbox_to_anchor=(1, 1), loc="upper left", title="derivative at")
    return figure


def _beside(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Points of one layer next to each other instead of above each other."""
    of_layer = {n: [y for x, y in points if x == n] for n, _ in points}
    return [
        (n + 0.7 * ((i + 0.5) / len(found) - 0.5), y)
        for n, found in of_layer.items()
        for i, y in enumerate(found)
    ]


def _derivatives(name: str) -> str:
    """What a derivative is taken at, in the words of the legend."""
    count = name.split()[0]
    known = {"the": "base", "1": "midpoint"}
    return known.get(count, f"{count} points")


def reach(results: Results) -> "Figure":
    """What a steer at mlp_in costs at one token, and how many tokens it reaches."""
    tokens, shares = results.holds(14)["evidence"], results.holds(46)["evidence"]
    figure = blank(9.0, 3.5)
    left, right = figure.subplots(1, 2)
    _dress(left, "The first-order Δ, applied", "condition number of A", "error/target")
    left.set_xscale("log")
    left.set_yscale("log")
    left.axhline(1, color=SOFT, linewidth=1, linestyle=":")
    _dress(right, "Tokens that some ‖Δ‖ ≤ ‖u‖ reaches", "size t of the target", "")
    for k, update in enumerate(tokens):
        layers = tokens[update]["each token"].values()
        left.scatter(
            [x for layer in layers for x in layer["cond A"]],
            [y for layer in layers for y in layer["error when applied"]],
            color=(BLUE, ORANGE)[k],
            marker=MARKERS[k],
            s=12,
            alpha=0.6,
            linewidth=0,
            label=update,
        )
        reached = shares[update]["mean over layers"]
        right.plot(
            [float(size) for size in reached],
            [100 * share for share in reached.values()],
            color=(BLUE, ORANGE)[k],
            marker=MARKERS[k],
            clip_on=False,
            zorder=3,
        )
    right.set_ylim(0, 100)
    right.yaxis.set_major_formatter("{x:.0f} %")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def coverage(results: Results) -> "Figure":
    """The MLP's share of a block, in four meanings, with intervals over seeds."""
    results.claim(21)
    found = results.study("fine_tunes")["coverage"]
    figure = blank(9.0, 4.0)
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (update, scopes) in zip(panels, found.items(), strict=True):
        _dress(axes, update, "block", "")
        for k, (label, name) in enumerate(MEANINGS.items()):
            of_update = name.startswith("δ")
            for scope, style in (("propagated", "-"), ("local", "--")):
                if scope == "local" and not of_update:
                    continue
                rows = scopes[scope][name]
                if name == "δskip share":
                    rows = [[1 - share for share in row] for row in rows]
                _with_intervals(
                    axes,
                    rows,
                    k,
                    linestyle=style,
                    label=f"{label}, local" if scope == "local" else label,
                )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(_percent)
    panels[0].set_ylabel("the MLP's share")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


# What the MLP's share of a block is called here → the name in the study.
MEANINGS = {
    "‖δMLP‖/‖δblock‖": "δMLP over δblock",
    "‖δMLP‖/(‖δMLP‖ + ‖δskip‖)": "δskip share",
    "‖MLP‖/(‖MLP‖ + ‖Attn‖)": "MLP share",
    "‖MLP‖/‖block‖": "MLP over block",
}


def sites(results: Results) -> "Figure":
    """What reading a site leaves beyond what reading block_out does, seed by seed."""
    results.claim(17)
    found = results.study("fine_tunes")
    updates = {**found["misfit"], "W_d of all weights alone": found[W_D]}
    figure = blank(9.0, 3.8)
    panels = figure.subplots(1, len(updates), sharey=True)
    for axes, (update, by_site) in zip(panels, updates.items(), strict=True):
        _dress(axes, update, "block", "")
        axes.axhline(0, color=SOFT, linewidth=1)
        best = by_site["block_out"][RANK]
        others = [site for site in by_site if site != "block_out"]
        for k, site in enumerate(others):
            _with_intervals(
                axes,
                _less(by_site[site][RANK], best),
                k,
                shift=0.1 * (k - 1.5),
                label=site,
            )
        axes.yaxis.set_major_formatter(_percent)
    panels[0].set_ylabel(f"misfit less block_out's, rank {RANK}")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = {"loc": "outside lower center", "ncols": len(labels)}
    figure.legend(handles, labels, title="the steer reads", **legend)
    return figure


Table = Sequence[Sequence[float]]  # a list per seed, a figure per layer


def _less(first: Table, second: Table) -> Table:
    """First − second."""
    rows = zip(first, second, strict=True)
    return [[x - y for x, y in zip(a, b, strict=True)] for a, b in rows]


W_D, RANK = "misfit of W_d alone", "8"


def joint(results: Results) -> "Figure":
    """How adapter and LoRA overlap, a point per seed, beside chance."""
    evidence = results.claim(31)["evidence"]
    found = results.study("adapting")["overlap"]
    figure = blank(9.0, 3.3)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"output": "Both write: B and U", "input": "The adapter reads: B and D"}
    kinds = {"none": "naive", "output": "U projected", "input": "D projected"}
    chance, spread = evidence["chance"], evidence["spread of chance"]
    for axes, (side, title) in zip(panels, titles.items(), strict=True):
        _dress(axes, title, "", "")
        axes.axhspan(chance - 2 * spread, chance + 2 * spread, color=LINE, linewidth=0)
        for k, name in enumerate(kinds):
            seeds = [mean(layers) for layers in found[f"joint {name}"][side]]
            axes.scatter(
                [k + 0.05 * (i - (len(seeds) - 1) / 2) for i in range(len(seeds))],
                seeds,
                color=(ORANGE, BLUE, GREEN)[k],
                marker=MARKERS[k],
                s=22,
                clip_on=False,
                zorder=3,
            )
        axes.set_xticks(range(len(kinds)), [*kinds.values()])
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("overlap, mean over layers")
    panels[1].annotate(
        " chance", (1, chance), xycoords=("axes fraction", "data"), va="center"
    )
    return figure


def methods(results: Results) -> "Figure":
    """Held-out loss of every method: seeds, and their mean with its interval."""
    results.claim(35)
    found = results.study("adapting")
    ranked = sorted(found["loss"], key=lambda name: mean(found["loss"][name]))
    losses = {name: found["loss"][name] for name in ranked if name != "base"}
    figure = blank(9.0, 0.9 + 0.24 * len(losses))
    axes = figure.subplots()
    _dress(axes, "Loss of the answers on held-out expressions", "nats", "")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    for place, by_seed in enumerate(losses.values()):
        m = certainty.mean(by_seed)
        colour = _KINDS.get([*losses][place].split()[0].rstrip(","), SOFT)
        axes.scatter(by_seed, [place] * len(by_seed), color=colour, s=9, alpha=0.5)
        axes.errorbar(
            m.mean,
            place,
            xerr=[[m.mean - m.low], [m.high - m.mean]],
            color=colour,
            marker="D",
            markersize=4.5,
            elinewidth=1.2,
        )
    names = [f"{name}, {found['parameters'][name]:,}" for name in losses]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return figure


# First word of a method's name → its colour.
_KINDS = {"linear": BLUE, "silu": BLUE, "loreft": ORANGE, "LoRA": GREEN, "joint": PINK}


def _with_intervals(
    axes: "Axes",
    by_seed: Table,
    which: int,
    shift: float = 0.0,
    **style: Any,
) -> None:
    """Means over seeds by layer, with Student's intervals."""
    found = [certainty.mean(layer) for layer in zip(*by_seed, strict=True)]
    axes.errorbar(
        [n + shift for n in range(len(found))],
        [m.mean for m in found],
        [[m.mean - m.low for m in found], [m.high - m.mean for m in found]],
        color=(BLUE, ORANGE, GREEN, PINK, SOFT)[which],
        marker=MARKERS[which],
        markersize=4.5,
        elinewidth=1,
        linewidth=1.4,
        **style,
    )
    axes.set_xticks(range(len(found)))


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


PICTURES: dict[str, Callable[[Results], "Figure"]] = {
    "orders": orders,
    "oracles": oracles,
    "reach": reach,
    "coverage": coverage,
    "sites": sites,
    "joint": joint,
    "methods": methods,
}
