"""Claim 4: an affine steer or LoReFT at mlp_out is an update of W_d."""

from dataclasses import replace

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw, Weights, glu
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, INNER, RANK, TOKENS = 16, 40, 3, 30


@claim(
    4,
    title="LoReFT at mlp_out is an update of W_d of rank r, and a bias that holds b_d",
    formula="W_d ← W_d + Rᵀ(W − R) W_d, b_d ← b_d + Rᵀb + Rᵀ(W − R) b_d",
    assumptions="no norm after the MLP",
    source="blog: ReFT as an effective update; the bias with b_d is this project's",
    falsified_by="a mismatch, a rank above r, or columns outside the span of Rᵀ",
    kind="exact",
    as_written="Rᵀb has to mimic what W_g and W_u do, where that is linear in y",
    derivation="""
        LoReFT is y + Rᵀ(W y + b − R y) with the rows of R orthonormal. Put y = W_d m +
        b_d: what meets m is W_d + Rᵀ(W − R) W_d, and what is left is constant. The
        update Rᵀ(W − R) W_d is a product through r dimensions and its columns lie in
        the span of Rᵀ. Without the term Rᵀ(W − R) b_d the formula is wrong for models
        whose MLP has an output bias.

        The blog gives the part that W_g and W_u leave to Rᵀb. That vector is the same
        for all tokens; what can follow y is the whole affine map.
    """,
)
def mlp_out_steer(seed: int) -> ClaimResult:
    """LoReFT of rank 3 on an MLP with biases."""
    draw = Draw(seed)
    w, u = draw.glu(WIDTH, INNER, biases=True), draw.normal(TOKENS, WIDTH)
    rotation = draw.orthonormal(RANK, WIDTH)
    source, bias = draw.matrix(RANK, WIDTH), draw.normal(RANK)
    y = glu(w, u)
    steered = y + (y @ (source - rotation).T + bias) @ rotation
    edited = updated(w, rotation, source, bias)
    change = edited.down - w.down
    forgetful = replace(edited, down_bias=w.down_bias + bias @ rotation)
    rank = int(torch.linalg.matrix_rank(change, rtol=1e-10))
    return identity(
        {
            "steered against updated": relative(glu(edited, u), steered),
            "rank beyond r": float(max(0, rank - RANK)),
            "update outside span Rᵀ": relative(rotation.T @ rotation @ change, change),
        },
        "Both agree, the update has rank r and columns in the span of Rᵀ",
        differ={"without b_d in the bias": relative(glu(forgetful, u), steered)},
        as_written=_as_written(),
    )


def updated(w: Weights, rotation: Tensor, source: Tensor, bias: Tensor) -> Weights:
    """The weights that do what LoReFT at mlp_out does."""
    change = rotation.T @ (source - rotation)
    return replace(
        w,
        down=w.down + change @ w.down,
        down_bias=w.down_bias + bias @ rotation + change @ w.down_bias,
    )


def _as_written() -> AsWritten:
    """One dimension, y = 1 and −1, and W_g, W_u ask for δ = y: linear in y."""
    y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    wanted = y
    constant = wanted.mean(0).expand_as(y)  # the best Rᵀb
    left = relative(constant, wanted)
    return AsWritten(
        Verdict.FAILS if left > 0 else Verdict.HOLDS,
        "Rᵀb is one vector for all tokens: the map Rᵀ(W − R) y + Rᵀb has to do it",
        {
            "y": y.flatten().tolist(),
            "wanted δ": wanted.flatten().tolist(),
            "best Rᵀb": float(constant[0]),
            "left by it": left,
            "left by the whole map": relative(y, wanted),
        },
    )
