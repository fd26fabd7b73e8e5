"""Claim 1: the first-order shift of a gated MLP, in closed form."""

from torch import Tensor
from torch.nn.functional import linear

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import ACTIVATIONS, Activation, Draw, Weights, glu_jvp, slope
from equiv.theory.values import ClaimResult

SIZES = ((4, 6), (16, 40), (24, 64))


@claim(
    1,
    title="the first-order shift of a gated MLP is the closed formula",
    formula="δy = ΔW_d m + W_d [φ′(a_g) ⊙ a_u ⊙ ΔW_g u + φ(a_g) ⊙ ΔW_u u]",
    assumptions="same input u before and after; φ differentiable",
    source="blog: weight updates of a GLU",
    falsified_by="a difference from the JVP beyond 1e-10",
    kind="exact",
    derivation="""
        y = W_d m with m = φ(a_g) ⊙ a_u, a_g = W_g u, a_u = W_u u. The product rule over
        the three matrices gives one term each: ΔW_d meets m as it is; ΔW_u moves a_u by
        ΔW_u u, which φ(a_g) passes on; ΔW_g moves a_g by ΔW_g u, which φ moves by
        φ′(a_g) times that, and a_u passes on. Nothing else is of first order.

        The same sum is what forward-mode differentiation along ΔW computes without the
        formula, so both are compared, for SiLU, GELU and GELU's tanh form.
    """,
)
def glu_first_order(seed: int) -> ClaimResult:
    """Both for three activations and three sizes of block."""
    gaps = {}
    for name, phi in ACTIVATIONS.items():
        for width, inner in SIZES:
            draw = Draw(seed)
            w, update = draw.glu(width, inner), draw.glu(width, inner)
            u = draw.normal(5, width)
            expected = glu_jvp(w, update, u, phi)
            found = first_order(w, update, u, phi)
            gaps[f"{name}, {width} × {inner}"] = relative(found, expected)
    return identity(gaps, "The formula is the JVP for SiLU, GELU and its tanh form")


def first_order(w: Weights, update: Weights, u: Tensor, phi: Activation) -> Tensor:
    """The closed formula, [tokens, d]."""
    gate, up = linear(u, w.gate), linear(u, w.up)
    moved = slope(phi, gate) * up * linear(u, update.gate)
    moved = moved + phi(gate) * linear(u, update.up)
    return linear(phi(gate) * up, update.down) + linear(moved, w.down)
