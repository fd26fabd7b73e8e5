"""Claim 3: an affine steer at mlp_in is an update of W_g and W_u."""

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import ACTIVATIONS, Draw, Weights, glu
from equiv.theory.values import ClaimResult


@claim(
    3,
    title="an affine steer at mlp_in is an update of W_g, W_u and their biases",
    formula="GLU(u + M u + v) = GLU with W (I + M) for W_g, W_u and biases b + W v",
    assumptions="none: any activation, any size of M and v",
    source="this project: from the blog's sufficient condition W_g Δ = ΔW_g u",
    falsified_by="any mismatch beyond rounding",
    kind="exact",
    derivation="""
        W (u + M u + v) + b = W (I + M) u + (b + W v) for W_g and for W_u alike, and
        what follows sees only these two products. Nothing is expanded, so it holds at
        any size and for any activation.

        The converse: an update is a linear steer at mlp_in when ΔW_g = W_g M and
        ΔW_u = W_u M with the same M. The blog reads its condition W_g Δ = ΔW_g u,
        W_u Δ = ΔW_u u as 2f equations in d unknowns, hence as hopeless; for such
        updates Δ = M u solves all of them. It is sufficient, not necessary.
    """,
)
def mlp_in_steer(seed: int) -> ClaimResult:
    """Steered and updated, for three activations; a large M on purpose."""
    gaps = {}
    for name, phi in ACTIVATIONS.items():
        draw = Draw(seed)
        w = draw.glu(16, 40, biases=True)
        u, matrix, vector = draw.normal(5, 16), draw.normal(16, 16), draw.normal(16)
        steered = glu(w, u + u @ matrix.T + vector, phi)
        gaps[name] = relative(glu(updated(w, matrix, vector), u, phi), steered)
    return identity(gaps, "Steered and updated MLP agree, with ‖M‖ several times ‖I‖")


def updated(w: Weights, matrix: Tensor, vector: Tensor) -> Weights:
    """The weights that do what the steer M u + v at mlp_in does."""
    whole = torch.eye(len(matrix), dtype=matrix.dtype) + matrix
    return Weights(
        w.gate @ whole,
        w.up @ whole,
        w.down,
        w.gate_bias + w.gate @ vector,
        w.up_bias + w.up @ vector,
        w.down_bias,
    )
