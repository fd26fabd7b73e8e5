"""Claim 30: the projections that keep an adapter and LoRA on W_d apart."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.subspaces import projector
from equiv.theory.toys import Draw, glu, rms_norm
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, INNER, RANK, TOKENS = 12, 24, 3, 10


@claim(
    30,
    title="after projection the adapter is blind to LoRA on W_d, or writes beside it",
    formula="D ← D(1 − VVᵀ): D B = 0; U ← (1 − VVᵀ)U: Bᵀ U = 0; V spans col B",
    assumptions="one block, LoRA on W_d only, no norm after the MLP; the final model",
    source="code: joint/train_orthogonal.py; paper: the output matrix, second-hand",
    falsified_by="D B or Bᵀ U above 1e-6, or directions lost where B = 0",
    kind="exact",
    as_written="projecting the reading matrix D before each step keeps outputs apart",
    derivation="""
        The stream gets B A m from LoRA. With V an orthonormal basis of col B, the
        projected D has D B = 0: it reads h + B A m as h, so the adapter answers as if
        that LoRA were not there. It still sees LoRA elsewhere (gate, up, attention),
        and through a norm after the MLP.

        Projecting U instead makes what the adapter writes orthogonal to what LoRA
        writes. Only singular values of B above rounding may count: at the start B = 0,
        and a full set of singular vectors would delete arbitrary coordinates.

        The published code projects D, not U, and at the beginning of a step: the update
        that follows breaks D B = 0 again, also in the final model.
    """,
)
def joint_constraint(seed: int) -> ClaimResult:
    """One block with LoRA on W_d; and, beside it, on W_g too."""
    draw = Draw(seed)
    w, x = draw.glu(WIDTH, INNER), draw.normal(TOKENS, WIDTH)
    written, read = draw.matrix(WIDTH, RANK), draw.matrix(RANK, INNER)
    up, down = draw.matrix(WIDTH, RANK), draw.matrix(RANK, WIDTH)
    kept = projector(written)
    blind, beside = down @ kept, kept @ up

    def adapted(gate: float, norm: bool) -> Tensor:
        """What the adapter adds with LoRA on W_d, and on W_g if asked for."""
        tuned = replace(w, gate=w.gate + gate * draw_gate, down=w.down + written @ read)
        y = glu(tuned, rms_norm(x))
        return silu((x + (rms_norm(y) if norm else y)) @ blind.T) @ up.T

    draw_gate = draw.matrix(INNER, RANK) @ draw.matrix(RANK, WIDTH)
    alone = silu((x + glu(w, rms_norm(x))) @ blind.T) @ up.T
    behind = silu((x + rms_norm(glu(w, rms_norm(x)))) @ blind.T) @ up.T
    zero = torch.zeros_like(written)
    return identity(
        {
            "D B": float((blind @ written).norm()),
            "Bᵀ U": float((written.T @ beside).norm()),
            "adapter with and without LoRA": relative(adapted(0, False), alone),
            "B = 0: D against D projected": relative(down @ projector(zero), down),
        },
        "Both projections do what they are for, and delete nothing where B = 0",
        differ={
            "with LoRA on W_g too": relative(adapted(1, False), alone),
            "with a norm after the MLP": relative(adapted(0, True), behind),
        },
        as_written=_as_written(),
    )


def _as_written() -> AsWritten:
    """Two dimensions, rank 1: B = e₁, U = (1, 1)ᵀ, D = (1, 1), step −0.1 (1, 0)."""
    written = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    up, down = torch.ones_like(written), torch.ones_like(written).T
    projected = down @ projector(written)
    stepped = projected - 0.1 * written.T
    overlap = float(written.T @ up)
    seen = float(stepped @ written)
    return AsWritten(
        Verdict.FAILS if overlap and seen else Verdict.HOLDS,
        "the projection is on the other matrix, so outputs overlap as before; and one "
        "step late, so the final D reads B again",
        {
            "B": [1, 0],
            "U": [1, 1],
            "D projected": projected.flatten().tolist(),
            "D after the step": stepped.flatten().tolist(),
            "Bᵀ U": overlap,
            "D B after the step": seen,
        },
    )
