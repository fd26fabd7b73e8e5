"""Claim 22: a SiLU adapter with small inputs is half the linear one."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiv.report.numbers import figure
from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw
from equiv.theory.values import ClaimResult

WIDTH, RANK, TOKENS = 8, 3, 20
SCALES = tuple(2.0**-k for k in range(6, 12))
# The next term of SiLU, −e⁴/48, is e²/12 of the leading deviation e²/4: 1e-3 where the
# largest activation is 7, as it never is among sixty.
SLOPE = 2e-3


@claim(
    22,
    title="a SiLU adapter with small inputs is half the linear one",
    formula="|silu(e) − e/2| ≤ e²/4; silu(s e) = ½ s e + Θ(s²)",
    assumptions="none",
    source="code: adapters start at up = 0, down × 1e-3",
    falsified_by="a deviation above e²/4, or one that is not proportional to s",
    kind="exact",
    derivation="""
        silu(e) = e σ(e) and σ(e) = ½ + e/4 − e³/48 + …, with |σ(e) − ½| ≤ |e|/4. So the
        adapter is half its linear form up to a relative deviation of half its input,
        and a learning rate found for one is off by 2 for the other. With U = 0 nothing
        is added at all, bit for bit.
    """,
)
def silu_adapter(seed: int) -> ClaimResult:
    """The bound on a grid, the rate by halving the input, and U = 0."""
    draw = Draw(seed)
    h = draw.normal(TOKENS, WIDTH)
    up, down = draw.matrix(WIDTH, RANK), draw.matrix(RANK, WIDTH)
    grid = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    excess = (adapter(grid) - grid / 2).abs() - grid.square() / 4
    deviations = []
    for scale in SCALES:
        half = scale * h @ down.T / 2
        deviations.append(relative(adapter(2 * half), half))
    rates = [float(torch.tensor(a / b).log2()) for a, b in pairwise(deviations)]
    start = h + adapter(h @ down.T) @ torch.zeros_like(up).T
    return identity(
        {
            "beyond e²/4": float(excess.clamp_min(0).max()),
            "U = 0 against no steering": float((start - h).abs().max()),
            "rate against 1": max(0.0, max(abs(r - 1) for r in rates) - SLOPE),
        },
        f"Half the linear adapter, within {figure(deviations[-1])} of it at inputs of "
        f"size {figure(SCALES[-1])}",
        evidence={
            "rates by halving": rates,
            "scales": list(SCALES),
            "relative deviation": deviations,
        },
    )


def adapter(e: Tensor) -> Tensor:
    """What the adapter does to its inner activations."""
    return silu(e)
