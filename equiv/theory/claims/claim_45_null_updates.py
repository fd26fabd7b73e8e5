"""Claim 45: updates that change weights and not the model."""

from dataclasses import replace

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Heads, attention, draw_heads
from equiv.theory.toys import Draw, Weights, derivative, glu
from equiv.theory.values import ClaimResult

WIDTH, INNER, TOKENS = 8, 16, 6


@claim(
    45,
    title="W_q, W_k do nothing at the first position; rescalings do nothing anywhere",
    formula="ΔW_u = D W_u, ΔW_d = −W_d D: Dy[ΔW] = 0; likewise W_v with W_o, γ with W",
    assumptions="causal attention; D diagonal, for values one number per head of them",
    source="this project",
    falsified_by="a tangent other than 0",
    kind="exact",
    derivation="""
        The first position sees itself alone: softmax over one score is 1 whatever the
        score. Scaling hidden unit i by c in W_u and by 1/c in W_d leaves the MLP as it
        is, so the derivative along that direction is 0; the same for a head of values
        with W_o, and for a norm's γ with the weights that read it.

        So the norm of an update bounds a shift from above only: an update as large as
        the weights may do nothing at all.
    """,
)
def null_updates(seed: int) -> ClaimResult:
    """Tangents along null directions, and a rescaling by large factors."""
    draw = Draw(seed)
    w, u = draw.glu(WIDTH, INNER), draw.normal(TOKENS, WIDTH)
    heads, turn = draw_heads(draw, WIDTH, 4, 2), draw_heads(draw, WIDTH, 4, 2)
    looks = derivative(
        lambda moved: attention(moved, u), heads, turn.only("query", "key")
    )
    null_mlp, null_heads = up_down(draw, w), value_output(heads)
    plain = draw.glu(WIDTH, INNER)
    size = float(derivative(lambda moved: glu(moved, u), w, plain).norm())
    factors = draw.normal(INNER).exp()
    rescaled = replace(w, up=factors[:, None] * w.up, down=w.down / factors)
    return identity(
        {
            "W_q, W_k at the first position": float(looks[0].norm() / looks.norm()),
            "W_u with W_d": _tangent(w, null_mlp, u) / size,
            "W_v with W_o": float(
                derivative(lambda m: attention(m, u), heads, null_heads).norm()
                / looks.norm()
            ),
            "γ with W_g and W_u": norm_and_readers(draw, w, u) / size,
            "rescaled against itself": relative(glu(rescaled, u), glu(w, u)),
        },
        "Null directions have no tangent",
        differ={"W_q, W_k at the last position": float(looks[-1].norm())},
        evidence={
            "‖ΔW‖/‖W‖ of the null update of W_u, W_d": _size(null_mlp) / _size(w),
            "its tangent": _tangent(w, null_mlp, u),
            "tangent of a random update": size,
        },
    )


def up_down(draw: Draw, w: Weights) -> Weights:
    """ΔW_u = D W_u and ΔW_d = −W_d D."""
    units = draw.normal(len(w.up))
    return replace(w.only(), up=units[:, None] * w.up, down=-w.down * units)


def value_output(w: Heads) -> Heads:
    """Both heads of values scaled, and W_o against it in the heads that read them."""
    factors = torch.tensor([1.0, -2.0], dtype=w.value.dtype)
    rows = factors.repeat_interleave(len(w.value) // 2)
    columns = factors.repeat_interleave(w.output.shape[1] // 2)
    return replace(w.only(), value=rows[:, None] * w.value, output=-w.output * columns)


def norm_and_readers(draw: Draw, w: Weights, u: Tensor) -> float:
    """Of γ ← γ (1 + D) with W_g, W_u ← W (1 − D) to first order, at γ = 1."""
    units = draw.normal(WIDTH)
    against = replace(w.only(), gate=-w.gate * units, up=-w.up * units)
    moved_input = torch.func.jvp(lambda x: glu(w, x), (u,), (u * units,))[1]
    return float((moved_input + derivative(lambda m: glu(m, u), w, against)).norm())


def _tangent(w: Weights, update: Weights, u: Tensor) -> float:
    return float(derivative(lambda moved: glu(moved, u), w, update).norm())


def _size(w: Weights) -> float:
    return float(torch.cat([tensor.flatten() for tensor in w]).norm())
