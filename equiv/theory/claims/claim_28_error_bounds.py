"""Claim 28: how local errors and changes of weights grow, from above."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from equiv.report.numbers import percent
from equiv.theory.judging import identity
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import kl
from equiv.theory.toys import Draw, Weights, glu, rms_norm
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, INNER, TRIALS, VOCABULARY, LAYERS = 8, 16, 100, 11, 3
SLOPE = 1.0998  # sup|silu'|, rounded up


@claim(
    28,
    title="errors grow at most by √n and n, by Lipschitz constants, and KL by δz²/4",
    formula=(
        "‖GLU u − GLU v‖ ≤ (1 + c₁) √n ‖W_d‖‖W_g‖‖W_u‖ ‖u − v‖; ‖N′(x)‖ ≤ ‖γ‖∞/ρ; "
        "‖h̃_L − h_L‖ ≤ Σ_l ε_l Π_(k>l) L_k; KL ≤ osc(δz)²/8 and ≤ ‖δz‖²/4"
    ),
    assumptions="‖u‖ ≤ √n, as after an RMS norm with γ = 1; ρ with its ε",
    source="blog: error control; exact form and proofs by this project",
    falsified_by="any violation",
    kind="exact",
    as_written="tuned defects with tuned Lipschitz constants bound the error",
    derivation="""
        m = φ(a_g) ⊙ a_u is a product, so its difference is one factor's difference
        times the other factor; |φ(x)| ≤ |x|, |φ′| ≤ c₁ and ‖u‖ ≤ √n give the first
        line. A change of weights is one more difference, and both factors are then of
        size √n: n [‖ΔW_d‖‖W_g'‖‖W_u'‖ + ‖W_d‖(c₁‖ΔW_g‖‖W_u'‖ + ‖W_g‖‖ΔW_u‖)], primes
        tuned. N′ = γ (1 − xxᵀ/(nρ²))/ρ is a scaled projection.

        Errors travel: what block l is off by reaches the end through the blocks after
        it. Defects measured on the tuned stream go with the constants of the steered
        blocks, and the reverse; defects and constants of the same run bound nothing.

        All of these are worst cases, attained by aligned weights. The figures say how
        far random ones stay below.
    """,
)
def error_bounds(seed: int) -> ClaimResult:
    """A hundred random cases of each bound: found over bound must stay below 1."""
    draw = Draw(seed)
    cases = {
        "stretch of a GLU": stretch,
        "change of a GLU": change,
        "stretch of an RMS norm": norm_stretch,
        "errors through blocks": through_blocks,
        "KL by range": kl_by_range,
        "KL by norm": kl_by_norm,
    }
    found = {name: [case(draw) for _ in range(TRIALS)] for name, case in cases.items()}
    aligned = stretch_of(*_aligned())
    return identity(
        {f"{name}, beyond": max(0.0, max(r) - 1) for name, r in found.items()},
        f"No bound is ever exceeded; the GLU's closest case reaches {percent(aligned)}",
        evidence={
            **{f"{name}, largest share": max(r) for name, r in found.items()},
            **{f"{name}, median": statistics.median(r) for name, r in found.items()},
            "stretch of a GLU, aligned weights": aligned,
        },
        as_written=_as_written(),
    )


def stretch(draw: Draw) -> float:
    """‖GLU u − GLU v‖ over its bound."""
    w = draw.glu(WIDTH, INNER)
    u = rms_norm(draw.normal(1, WIDTH))
    return stretch_of(w, u, rms_norm(u + draw.normal(1, WIDTH)))


def stretch_of(w: Weights, u: Tensor, v: Tensor) -> float:
    """The same for given weights and inputs of norm √n."""
    sizes = _norm(w.down) * _norm(w.gate) * _norm(w.up)
    bound = (1 + SLOPE) * WIDTH**0.5 * sizes * float((u - v).norm())
    return float((glu(w, u) - glu(w, v)).norm()) / bound


def change(draw: Draw) -> float:
    """‖GLU_FT u − GLU u‖ over its bound."""
    w, delta = draw.glu(WIDTH, INNER), draw.glu(WIDTH, INNER)
    tuned, u = w.plus(delta, 0.3), rms_norm(draw.normal(1, WIDTH))
    d = delta.plus(delta, -0.7)
    bound = WIDTH * (
        _norm(d.down) * _norm(tuned.gate) * _norm(tuned.up)
        + _norm(w.down)
        * (SLOPE * _norm(d.gate) * _norm(tuned.up) + _norm(w.gate) * _norm(d.up))
    )
    return float((glu(tuned, u) - glu(w, u)).norm()) / bound


def norm_stretch(draw: Draw) -> float:
    """‖N′(x)‖ over ‖γ‖∞/ρ."""
    x, gain, eps = draw.normal(WIDTH), draw.normal(WIDTH), 1e-3
    slope = torch.func.jacrev(lambda z: gain * rms_norm(z, eps))(x)
    rho = float((x.square().mean() + eps).sqrt())
    return _norm(slope) * rho / float(gain.abs().max())


def through_blocks(draw: Draw) -> float:
    """‖h̃_L − h_L‖ over Σ_l ε_l Π_(k>l) L_k, linear blocks, defects on the tuned run."""
    tuned = [draw.matrix(WIDTH, WIDTH) for _ in range(LAYERS)]
    steered = [w + 0.3 * draw.matrix(WIDTH, WIDTH) for w in tuned]
    h = draw.normal(WIDTH)
    return _end_error(tuned, steered, h) / bound(tuned, steered, h)


def bound(tuned: Sequence[Tensor], steered: Sequence[Tensor], h: Tensor) -> float:
    """Defects on the tuned run, each times the steered blocks' constants after it."""
    total = 0.0
    for own, other in zip(tuned, steered, strict=True):
        defect = float((own @ h - other @ h).norm())
        total = total * _norm(other) + defect
        h = own @ h
    return total


def kl_by_range(draw: Draw) -> float:
    """KL over osc(δz)²/8."""
    z, move = draw.normal(1, VOCABULARY), draw.normal(1, VOCABULARY)
    return kl(z, z + move) / (float(move.max() - move.min()) ** 2 / 8)


def kl_by_norm(draw: Draw) -> float:
    """KL over ‖δz‖²/4."""
    z, move = draw.normal(1, VOCABULARY), draw.normal(1, VOCABULARY)
    return kl(z, z + move) / (float(move.square().sum()) / 4)


def _aligned() -> tuple[Weights, Tensor, Tensor]:
    """Rank one, W_g and W_u along the input: a large gate, its slope near 1."""
    direction = torch.ones(WIDTH, dtype=torch.float64) / WIDTH**0.5
    first = torch.eye(INNER, 1, dtype=torch.float64)[:, 0]
    w = Draw(0).glu(WIDTH, INNER).only()
    w = replace(
        w,
        gate=torch.outer(first, direction),
        up=torch.outer(first, direction),
        down=torch.outer(direction, first),
    )
    u = direction[None] * WIDTH**0.5
    return w, u, u * (1 - 1e-3)


def _as_written() -> AsWritten:
    """Numbers from 0: tuned x → x, x → 0; steered x → x + 1, x → 100 x.

    Defects at the tuned states, which are 0: 1 and 0. Tuned constants: 1 and 0.
    """
    defects, tuned_constants, steered_constants = (1.0, 0.0), (1.0, 0.0), (1.0, 100.0)
    truth = 100 * (0.0 + 1)
    mixed = defects[0] * tuned_constants[1] + defects[1]
    right = defects[0] * steered_constants[1] + defects[1]
    return AsWritten(
        Verdict.FAILS if mixed < truth <= right else Verdict.HOLDS,
        "the sources do not name the pairing; defects and constants of one run bound "
        "nothing",
        {
            "tuned blocks": "x, 0",
            "steered blocks": "x + 1, 100 x",
            "bound with tuned constants": mixed,
            "bound with steered constants": right,
            "true error": truth,
        },
    )


def _end_error(tuned: Sequence[Tensor], steered: Sequence[Tensor], h: Tensor) -> float:
    own, other = h, h
    for a, b in zip(tuned, steered, strict=True):
        own, other = a @ own, b @ other
    return float((own - other).norm())


def _norm(matrix: Tensor) -> float:
    return float(matrix_norm(matrix, 2))
