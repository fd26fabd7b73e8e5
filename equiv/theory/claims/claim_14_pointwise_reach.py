"""Claim 14: what mlp_in can bring about at one token, to first order and really."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import relu, silu

from equiv.report.numbers import figure
from equiv.theory.judging import identity, relative
from equiv.theory.mlps import MLP, NONE_FOUND, column_rank, find_mlps, project
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.toys import Activation, Draw, Weights, glu_slopes, hidden
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

TOKENS = 32
WIDTH, INNER, NARROW = 24, 64, 6
PRICES = ("cond A", "‖Δ‖/‖u‖", "error when applied")
# A shift of the wanted size that misses by no more than this has got there.
NEAR = 0.1
# Columns of A are known to rounding times its condition number, up to 1e8 here.
TOLERANCE = 1e-6


@claim(
    14,
    title="at one token, to first order, a steer at mlp_in reaches every target",
    formula=(
        "rank A(u) = min(rank W_d, units on); where rank A = rank W_d, unreachable is "
        "‖(I − P) ΔW_d m‖ / ‖ΔW_d m‖, P onto col W_d"
    ),
    assumptions="infinitesimal, one token; every unit is on where φ is smooth",
    source="this project; on the blog's argument about pre-MLP steering",
    falsified_by="a rank below that",
    as_written=(
        "matching ΔW_d m from before the MLP needs it in col A(u), which is very hard, "
        "if not impossible"
    ),
    derivation="""
        A = W_d J. J has a row for every hidden unit, a combination of its rows of W_g
        and W_u by factors of the token; for weights in general position the product has
        the least rank that its factors allow. With f ≥ d, W_d of full row rank and a
        smooth φ that is d: every target has its Δ = A⁻¹ target, and nothing is
        unreachable. ReLU switches units off, and only those that are on have a row.

        That is about infinitesimal shifts. A is badly conditioned in trained models, so
        that Δ may be longer than u itself, where first order says nothing. What it
        then really does is measured by doing it. This is the Δ that solves A Δ = target
        exactly; shorter ones may come near, and claim 46 searches for them.
    """,
)
def pointwise_reach(setting: Setting) -> ClaimResult:
    """Rank and condition of A at drawn tokens, and the first-order Δ applied."""
    mlps = find_mlps(setting, TOKENS)
    if not mlps:
        return NONE_FOUND
    equal, ranks, prices, tokens = {}, {}, {}, {}
    for mlp in mlps:
        name = f"layer {mlp.layer}"
        inner, whole = mlp.slopes(mlp.u)
        equal[f"{name}: rank A less what it can be"], ranks[name] = rank_gap(
            inner, whole, mlp.down
        )
        if bool(mlp.changes) and bool((target := mlp.target).any()):
            each = price(mlp, whole, target)
            prices[name] = {key: float(x.median()) for key, x in each.items()}
            tokens[name] = {key: rounded(each[key]) for key in PRICES}
        if bool(mlp.down_change.any()):
            narrow = mlp.cut(column_rank(mlp.down) // 2)
            written = mlp.run(mlp.u)[0] @ mlp.down_change.T
            gap = formula_gap(narrow.slopes(mlp.u)[1], narrow.down, written)
            equal[f"{name}, W_d cut to half: unreachable less formula"] = gap
    toy, figures = of_toys(Draw(setting.seed))
    found: dict[str, Value] = {"rank A": ranks, **figures}
    says = "rank A is all that W_d and the units that are on allow"
    conditions: dict[str, Value] = {"infinitesimal": "first order at Δ = 0"}
    if prices:
        found |= {key: {n: p[key] for n, p in prices.items()} for key in PRICES}
        found["each token"] = tokens
        condition, length, error = (spanned(prices, key) for key in PRICES)
        says += (
            f"; at the update's size the first-order Δ is {length} ‖u‖ long and, "
            f"applied, misses by {error} times the target"
        )
        conditions["cond A, medians of layers"] = condition
    return identity(
        equal | toy,
        says,
        conditions=conditions,
        evidence=found,
        as_written=_as_written(prices),
        tolerance=TOLERANCE,
    )


def spanned(prices: Mapping[str, Mapping[str, float]], key: str) -> str:
    """The least and the largest of the layers' medians."""
    found = [own[key] for own in prices.values()]
    ends = dict.fromkeys(figure(end(found), 2) for end in (min, max))
    return " to ".join(ends)


def rank_gap(inner: Tensor, whole: Tensor, down: Tensor) -> tuple[float, list[int]]:
    """How far the ranks of A are from what they can be; their smallest and largest."""
    on = (inner != 0).any(-1).sum(-1)
    expected = on.clamp(max=column_rank(down))
    found = torch.linalg.matrix_rank(whole)
    gap = float((found - expected).abs().max())
    return gap, [int(found.min()), int(found.max())]


def price(mlp: MLP, whole: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What reaching the target by the least Δ of first order costs, [tokens] each."""
    delta = (torch.linalg.pinv(whole) @ target[..., None])[..., 0]
    moved = mlp.run(mlp.u + delta)[1] - mlp.run(mlp.u)[1]
    each = (
        torch.linalg.cond(whole),
        delta.norm(dim=1) / mlp.u.norm(dim=1),
        (moved - target).norm(dim=1) / target.norm(dim=1),
    )
    return dict(zip(PRICES, each, strict=True))


def rounded(figures: Tensor) -> list[float]:
    """Figures to be looked at, with three digits."""
    return [float(f"{x:.3g}") for x in figures.tolist()]


def formula_gap(whole: Tensor, down: Tensor, written: Tensor) -> float:
    """Unreachable by A less unreachable by the formula, at tokens with enough units."""
    enough = torch.linalg.matrix_rank(whole) == column_rank(down)
    if not bool(enough.any()):
        return 0.0
    own = written[enough]
    return abs(unreachable(whole[enough], own) - beyond(down, own))


def unreachable(whole: Tensor, written: Tensor) -> float:
    """What no Δ per token brings about to first order: a share of the target."""
    delta = torch.linalg.pinv(whole) @ written[..., None]
    return relative((whole @ delta)[..., 0], written)


def beyond(down: Tensor, written: Tensor) -> float:
    """‖(I − P) ΔW_d m‖ / ‖ΔW_d m‖."""
    return relative(project(down, written), written)


def of_toys(draw: Draw) -> tuple[dict[str, float], dict[str, Value]]:
    """Gated MLPs: smooth, with a W_d of low rank, and with ReLU at f = d."""
    u, update = draw.normal(TOKENS, WIDTH), draw.matrix(WIDTH, INNER)
    whole = draw.glu(WIDTH, INNER)
    low = draw.matrix(WIDTH, NARROW) @ draw.matrix(NARROW, INNER)
    cases: dict[str, tuple[Weights, Activation]] = {
        "SiLU": (whole, silu),
        f"rank {NARROW} W_d": (whole.moved({"down": low - whole.down}), silu),
        "ReLU, f = d": (draw.glu(WIDTH, WIDTH), relu),
    }
    equal, ranks = {}, {}
    for name, (w, phi) in cases.items():
        inner, full = glu_slopes(w, u, phi)
        gap, _ = rank_gap(inner, full, w.down)
        equal[f"toy, {name}: rank A less what it can be"] = gap
        ranks[name] = int(torch.linalg.matrix_rank(full).median())
        if w.down.shape[1] == INNER:
            written = hidden(w, u, phi) @ update.T
            gap = formula_gap(full, w.down, written)
            equal[f"toy, {name}: unreachable less formula"] = gap
    return equal, {f"toys, d = {WIDTH}: median rank A": ranks}


def _as_written(prices: dict[str, dict[str, float]]) -> AsWritten:
    """Numbers: one unit, W_g = W_u = W_d = u = 1, ΔW_d = 1/8."""
    one = torch.ones(1, 1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    w = Weights(one, one, one, zero, zero, zero)
    written = hidden(w, one) / 8
    slope = glu_slopes(w, one)[1]
    reach = {
        "d = f = 1, ΔW_d m": float(written),
        "A": float(slope),
        "Δ = ΔW_d m / A": float(written / slope),
    }
    errors = [found[PRICES[-1]] for found in prices.values()]
    impossible = "not impossible: to first order a Δ per token reaches it"
    if not errors or max(errors) <= NEAR:
        return AsWritten(Verdict.FAILS, impossible, reach)
    return AsWritten(
        Verdict.CONDITIONAL,
        f"{impossible}; but at this update's size that Δ, applied, misses by "
        f"{spanned(prices, PRICES[-1])} times the target: very hard it is",
        reach,
    )
