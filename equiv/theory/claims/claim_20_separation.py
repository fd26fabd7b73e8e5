"""Claim 20: what block_out can do and mlp_out cannot."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw, glu, rms_norm
from equiv.theory.values import ClaimResult

WIDTH, RANK, TOKENS = 8, 3, 20
SCALE, EPS = 3.0, 1e-3


@claim(
    20,
    title="with W_d = 0 a steer at mlp_out is constant; an RMS norm hides the scale",
    formula="W_d = 0: y = b_d for all tokens; y(c x′) = y(x′) for c > 0",
    assumptions="ε = 0 in the norm; without biases the adapter is dead, not constant",
    source="blog: separation of the sites",
    falsified_by="a steer at mlp_out that tells such tokens apart",
    kind="exact",
    derivation="""
        W_d = 0 makes y the same for every token, so whatever is computed from y is a
        constant. Without biases y = 0, and the bias-free adapter U φ(D y) is 0, as are
        its gradients: φ(0) = 0 stops that of U, and y = 0 that of D. It can never
        learn. At block_out the steer reads x′ and fits any linear target.

        The second case needs no zero weights. N(c x′) = N(x′), so tokens that differ by
        scale alone are one token at mlp_out. With ε > 0 there is a floor: to first
        order the norm's output moves by ε/(2ρ²) · |1 − 1/c²|.
    """,
)
def separation(seed: int) -> ClaimResult:
    """An MLP with W_d = 0, and tokens at two scales."""
    draw = Draw(seed)
    w, x = draw.glu(WIDTH, 2 * WIDTH, biases=True), draw.normal(TOKENS, WIDTH)
    constant = glu(w.only("gate", "up", "gate_bias", "up_bias", "down_bias"), x)
    nothing = glu(w.only("gate", "up"), x)
    stopped, added = adapter_gradients(draw, nothing)
    alive, _ = adapter_gradients(draw, x + nothing)
    target = x @ draw.matrix(WIDTH, WIDTH).T
    fitted = x @ torch.linalg.lstsq(x, target).solution
    y, scaled = glu(w, rms_norm(x)), glu(w, rms_norm(SCALE * x))
    return identity(
        {
            "W_d = 0: y over tokens": relative(constant, constant[:1].expand_as(x)),
            "W_d = 0, no bias: adapter output": float(added.norm()),
            "W_d = 0, no bias: adapter gradients": stopped,
            "block_out: misfit of a linear target": relative(fitted, target),
            "y(c x′) against y(x′)": relative(scaled, y),
        },
        "mlp_out is blind where block_out sees",
        differ={"block_out: adapter gradients": alive},
        evidence={"floor by ε, found over formula": floor(x)},
    )


def floor(x: Tensor) -> float:
    """How far the norm of c x and x differ for the sake of ε, over the formula."""
    found = rms_norm(SCALE * x, EPS) - rms_norm(x, EPS)
    rho2 = x.square().mean(1, keepdim=True)
    formula = rms_norm(x, EPS) * EPS / (2 * rho2) * (1 - 1 / SCALE**2)
    return float(found.norm() / formula.norm())


def adapter_gradients(draw: Draw, read: Tensor) -> tuple[float, Tensor]:
    """Of the bias-free adapter U silu(D read), for a loss that asks for change.

    Returns:
        The norm of its gradients, and what it adds.
    """
    up, down = draw.matrix(WIDTH, RANK), draw.matrix(RANK, WIDTH)
    up, down = up.requires_grad_(), down.requires_grad_()
    added = silu(read @ down.T) @ up.T
    found = torch.autograd.grad((added - 1).square().sum(), (up, down))
    return float(torch.cat([g.flatten() for g in found]).norm()), added.detach()
