"""Claim 16: what an affine steer leaves does not vanish with the update."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from equiv.model.batches import split
from equiv.report.numbers import figure, percent
from equiv.theory.judging import VISIBLE, identity
from equiv.theory.registry import claim
from equiv.theory.scales import Scaled, at_scales
from equiv.theory.setting import Setting
from equiv.theory.shared_maps import best_map, misfit, misfit_through, with_one
from equiv.theory.toys import Draw, Weights, glu, glu_jvp, glu_slopes
from equiv.theory.values import ClaimResult, Value, Verdict

# What is read; written is block_out, where the whole update shows.
READS = ("mlp_in", "mlp_out", "block_out")
WRITES = "block_out"
FORMS: dict[str, int | None] = {"rank 8": 8, "affine": None}
SCALES = (1.0, 1e-2, 1e-4)
HELD_OUT = 0.25
# From its limit a misfit is off by O(t): by this much of itself at the least t.
CONSTANT = 1e-2
WIDTH, INNER, TOKENS = 8, 20, 64


@claim(
    16,
    title="what an affine steer leaves does not vanish with the update",
    formula=(
        "‖Δ_t − δ_t‖²/‖δ_t‖² → the misfit of the first-order shift, > 0, as t → 0; "
        "Δ_t the best affine or rank-r map for tΔW"
    ),
    assumptions=(
        "more than d + 1 tokens; not ΔW_{g,u} = W_{g,u} M read at mlp_in, nor "
        "ΔW_d = C W_d read at mlp_out"
    ),
    source="this project",
    falsified_by="a misfit that goes to zero, or does not settle",
    derivation="""
        First order is in ΔW, not in h: δ_t = t D(h) + O(t²), and D, the derivative
        along ΔW, is as nonlinear in h as the block. The relative misfit of a linear
        problem does not change with the scale of its targets, so it tends to that of D,
        which has no reason to be zero.

        Two structured updates are exceptions: ΔW_g = W_g M and ΔW_u = W_u M are the
        linear steer M u at mlp_in, and ΔW_d = C W_d is C y at mlp_out (claims 3, 4).
    """,
)
def constant_misfit(setting: Setting) -> ClaimResult:
    """Held-out misfits at scales down to 1e-4, and of the first-order shift."""
    toy = of_toys(Draw(setting.seed))
    if toy.verdict is Verdict.FAILS:
        return toy
    batches = split(setting.few, HELD_OUT, setting.seed)
    found: dict[str, dict[str, float]] = {}
    for scaled in at_scales(setting, batches, SCALES, (0.0,)):
        found |= dict(of_layer(scaled))
    if not found:
        return ClaimResult(
            Verdict.INCONCLUSIVE,
            "no site with more fitted tokens than an affine map has free vectors",
        )
    return judge(found, dict(toy.evidence), random=setting.random)


def of_layer(scaled: Scaled) -> Iterator[tuple[str, dict[str, float]]]:
    """(case, misfit by t and of first order) of one layer."""
    if WRITES not in scaled.base:
        return
    targets = {f"t = {t:g}": scaled.shift[t][WRITES] for t in SCALES}
    targets["first order"] = scaled.slope[0.0][WRITES]
    out, keep = scaled.held_out, ~scaled.held_out
    for reads in READS:
        x = scaled.base.get(reads)
        if x is None or int(keep.sum()) <= x.shape[1] + 1 or not bool(out.any()):
            continue
        for form, rank in FORMS.items():
            maps = {
                name: best_map(x[keep], y[keep], rank) for name, y in targets.items()
            }
            own = {n: misfit(maps[n], x[out], y[out]) for n, y in targets.items()}
            y = targets["first order"][keep]
            own["first order, fitted"] = misfit(maps["first order"], x[keep], y)
            yield f"layer {scaled.layer}, reading {reads}, {form}", own


def judge(
    found: Mapping[str, Mapping[str, float]], toys: dict[str, Value], *, random: bool
) -> ClaimResult:
    """Whether all misfits settle, above zero."""
    least = f"t = {SCALES[-1]:g}"
    limits = {case: own["first order"] for case, own in found.items()}
    off = {case: abs(own[least] / limits[case] - 1) for case, own in found.items()}
    wrong = [n for n, own in found.items() if not own["first order, fitted"] > VISIBLE]
    wrong += [case for case, x in off.items() if not x <= CONSTANT]
    full = [own["t = 1"] for own in found.values()]
    evidence = {
        "held-out misfit, and fitted": {case: dict(own) for case, own in found.items()}
    }
    evidence |= {"largest distance from the limit at the least t": max(off.values())}
    if wrong:
        case = wrong[0]
        says = f"{case}: misfit {figure(limits[case])} to first order, "
        says += f"{figure(found[case][least])} at {least}"
        return ClaimResult(Verdict.FAILS, says, {}, {**evidence, **toys})
    lowest = min(limits, key=lambda case: limits[case])
    return ClaimResult(
        Verdict.CONDITIONAL if random else Verdict.HOLDS,
        f"held-out misfits are {percent(min(full))} to {percent(max(full))} at t = 1 "
        f"and {percent(limits[lowest])} to {percent(max(limits.values()))} to first "
        f"order; at {least} they are off that by {percent(max(off.values()))} at most",
        {"inputs": "random token ids"} if random else {},
        {**evidence, **toys},
    )


def of_toys(draw: Draw) -> ClaimResult:
    """A gated MLP read at mlp_in, through A, and at mlp_out: both exceptions."""
    w, update = (draw.glu(WIDTH, INNER) for _ in range(2))
    u = draw.normal(TOKENS, WIDTH)
    reads, slopes = with_one(u), glu_slopes(w, u)[1]
    y = glu(w, u)

    def steered(along: Weights) -> float:
        return misfit_through(slopes, reads, glu_jvp(w, along, u))

    def written(along: Weights, t: float) -> float:
        shift = glu(w.plus(along, t), u) - y
        return misfit(best_map(y, shift, None), y, shift)

    return identity(
        {
            "toy: ΔW_g, ΔW_u = W_g M, W_u M, read at mlp_in": steered(
                readers(w, draw.matrix(WIDTH, WIDTH))
            ),
            "toy: ΔW_d = C W_d, read at mlp_out": written(
                writer(w, draw.matrix(WIDTH, WIDTH)), 1.0
            ),
        },
        "the two exceptions are exact",
        differ={
            "toy: drawn update, read at mlp_in": steered(update),
            "toy: drawn update, read at mlp_out, t = 1": written(update, 1.0),
            "toy: drawn update, read at mlp_out, t = 1e-4": written(update, 1e-4),
        },
    )


def readers(w: Weights, turn: Tensor) -> Weights:
    """ΔW_g = W_g M and ΔW_u = W_u M."""
    moved = {"gate": w.gate @ turn - w.gate, "up": w.up @ turn - w.up}
    return w.only("gate", "up").moved(moved)


def writer(w: Weights, turn: Tensor) -> Weights:
    """ΔW_d = C W_d."""
    return w.only("down").moved({"down": turn @ w.down - w.down})
