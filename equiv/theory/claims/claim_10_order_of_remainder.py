"""Claim 10: the first-order remainder is of order two, and its constant is known."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import linear, relu

from equiv.report.numbers import figure
from equiv.theory.judging import TOLERANCE, relative
from equiv.theory.mlps import MLP, find_mlps
from equiv.theory.orders import SCALES, decay
from equiv.theory.registry import claim
from equiv.theory.remainders import orders_of, spoken
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.toys import (
    ACTIVATIONS,
    Activation,
    Draw,
    Weights,
    curvature,
    glu,
    glu_jvp,
    slope,
)
from equiv.theory.values import ClaimResult, Value, Verdict

LOWEST, HIGHEST = 1.9, 2.1
# Second derivatives by differences of first ones, e²/6 = 6e-10 off, and 1e-16 / e.
STEP = 2.0**-14
DIFFERENCED = 1e-6
# Updates are brought to this share of the weights for that: Q₂ is quadratic in them.
SIZE = 0.1
TOKENS = 32


@claim(
    10,
    title="what first order misses shrinks as the square of the update",
    formula="‖h(W + tΔW) − h(W) − t Dh[ΔW]‖ = Θ(t²); at a GLU = t² ‖Q₂‖ + O(t³)",
    assumptions="smooth activations; 0 instead where h is affine in t (claim 2)",
    source="this project",
    falsified_by=f"an order outside {LOWEST}…{HIGHEST}, or another constant",
    derivation="""
        Taylor's theorem in t: the rest after first order is t²/2 D²h + O(t³) where
        activations are twice differentiable. At a gated MLP with its input held,

            Q₂ = ΔW_d [φ′(a_g) ⊙ a_u ⊙ ΔW_g u + φ(a_g) ⊙ ΔW_u u]
               + W_d [φ′(a_g) ⊙ ΔW_g u ⊙ ΔW_u u + ½ φ″(a_g) ⊙ a_u ⊙ (ΔW_g u)²]

        is half of that second derivative. W_d alone, W_u alone, W_o alone and W_v alone
        leave nothing at their own output.

        At a kink the theorem does not hold. Of the units of a ReLU network a share in
        proportion to t changes sign, each off by an amount in proportion to t, so over
        many units the norm of the rest falls as t^1.5.
    """,
)
def order_of_remainder(setting: Setting) -> ClaimResult:
    """Orders at every layer and site, and Q₂ of the model's gated MLPs and of toys."""
    orders, exact = orders_of(setting.curves)
    if not orders and not exact:
        return ClaimResult(
            Verdict.INCONCLUSIVE, "the update is too small to be seen above rounding"
        )
    gaps = constants(setting)
    wrong = [
        f"{name}: order {order:.2f}"
        for name, order in orders.items()
        if not LOWEST <= order <= HIGHEST
    ]
    wrong += [
        f"{name}: Q₂ off by {figure(gap)}"
        for name, gap in gaps.items()
        if not gap <= DIFFERENCED
    ]
    evidence: dict[str, Value] = {
        "orders": orders,
        "no remainder at": exact,
        "Q₂ against differences": gaps,
        "order of a toy with ReLU, W_g alone": relu_order(Draw(setting.seed)),
    }
    if wrong:
        says = f"{len(wrong)} of {len(orders) + len(gaps)} are not: {wrong[0]}"
        found = ClaimResult(Verdict.FAILS, says, {}, evidence)
        return of_smooth(found, setting.model)
    says = f"{spoken(orders, exact)}; Q₂ is right to {figure(max(gaps.values()), 2)}"
    return ClaimResult(Verdict.HOLDS, says, {}, evidence)


def constants(setting: Setting) -> dict[str, float]:
    """How far Q₂ is from half a second derivative: toys', and the model's own MLPs."""
    gaps = {}
    for name, phi in ACTIVATIONS.items():
        draw = Draw(setting.seed)
        w, update, u = draw.glu(16, 40), draw.glu(16, 40), draw.normal(5, 16)
        ends = [glu_jvp(w.plus(update, e), update, u, phi) for e in (STEP, -STEP)]
        half = (ends[0] - ends[1]) / (4 * STEP)
        gaps[f"toy, {name}"] = relative(second_order(w, update, u, phi), half)
    for mlp in find_mlps(setting, TOKENS):
        parts = gated(sized(mlp))
        if parts is not None:
            found = second_order(*parts)
            gaps[f"layer {mlp.layer}"] = relative(found, half_bend(sized(mlp)))
    return gaps


def gated(mlp: MLP) -> tuple[Weights, Weights, Tensor, Activation] | None:
    """Weights, update, input and φ of an MLP that is a GLU of three matrices."""
    names = ("gate_proj", "up_proj", mlp.last.removesuffix(".weight"))
    phi = getattr(mlp.module, "act_fn", None)
    if mlp.crossed or phi is None or not mlp.changes:
        return None
    if not all(f"{name}.weight" in mlp.weights for name in names):
        return None

    def of(tensors: Mapping[str, Tensor]) -> Weights:
        matrices, biases = [], []
        for name in names:
            like = torch.zeros_like(mlp.weights[f"{name}.weight"])
            matrices.append(tensors.get(f"{name}.weight", like))
            biases.append(tensors.get(f"{name}.bias", like[:, 0]))
        return Weights(*matrices, *biases)

    w = of(mlp.weights)
    if not relative(glu(w, mlp.u, phi), mlp.run(mlp.u)[1]) < TOLERANCE:
        return None
    return w, of(mlp.changes), mlp.u, phi


def sized(mlp: MLP) -> MLP:
    """The same with its update brought to `SIZE` of the weights."""
    sizes = [
        sum(float(tensor.square().sum()) for tensor in tensors.values()) ** 0.5
        for tensors in (mlp.weights, mlp.changes)
    ]
    scale = SIZE * sizes[0] / (sizes[1] or 1.0)
    return replace(mlp, changes={n: scale * d for n, d in mlp.changes.items()})


def half_bend(mlp: MLP) -> Tensor:
    """Half of the second derivative of its output along the update, by differences."""
    step = torch.ones((), dtype=torch.float64)

    def at(t: float) -> Tensor:
        def output(s: Tensor) -> Tensor:
            moved = {n: mlp.weights[n] + (t + s) * d for n, d in mlp.changes.items()}
            return replace(mlp, weights={**mlp.weights, **moved}).run(mlp.u)[1]

        return jvp(output, (torch.zeros_like(step),), (step,))[1]

    return (at(STEP) - at(-STEP)) / (4 * STEP)


def second_order(w: Weights, update: Weights, u: Tensor, phi: Activation) -> Tensor:
    """Q₂, [tokens, d]."""
    gate, up = linear(u, w.gate, w.gate_bias), linear(u, w.up, w.up_bias)
    gate_shift = linear(u, update.gate, update.gate_bias)
    up_shift = linear(u, update.up, update.up_bias)
    first = slope(phi, gate) * up * gate_shift + phi(gate) * up_shift
    second = slope(phi, gate) * gate_shift * up_shift
    second = second + curvature(phi, gate) * up * gate_shift**2 / 2
    return linear(first, update.down) + linear(second, w.down)


def relu_order(draw: Draw) -> float | None:
    """The order of a toy's remainder where W_g moves many units over their kinks."""
    w, u = draw.glu(16, 40), draw.normal(500, 16)
    update = draw.glu(16, 40).only("gate")
    first = glu_jvp(w, update, u, relu)
    rests = {
        t: float((glu(w.plus(update, t), u, relu) - glu(w, u, relu) - t * first).norm())
        for t in SCALES
    }
    found = decay(rests)
    return found and found.order
