"""Claim 20: what block_out can do and mlp_out cannot."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw, glu, rms_norm
from equiv.theory.values import ClaimResult

WIDTH, RANK, TOKENS = 8, 3, 20


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
    """An MLP with W_d = 0, and one token at two scales."""
    draw = Draw(seed)
    w, x = draw.glu(WIDTH, 2 * WIDTH, biases=True), draw.normal(TOKENS, WIDTH)
    off = w.only("gate", "up", "gate_bias", "up_bias", "down_bias")
    constant = glu(off, rms_norm(x))
    bare = w.only("gate", "up")
    gradients, moved = adapter_gradients(draw, glu(bare, rms_norm(x)))
    alive, _ = adapter_gradients(draw, x + glu(bare, rms_norm(x)))
    target = x @ draw.matrix(WIDTH, WIDTH).T
    fit = torch.linalg.lstsq(x, target).solution
    c = 3.0
    eps = 1e-3
    rho2 = x.square().mean(1, keepdim=True)
    floor = rms_norm(x, eps) * eps / (2 * rho2) * (1 - 1 / c**2)
    near = rms_norm(c * x, eps) - rms_norm(x, eps)
    return identity(
        {
            "W_d = 0: y over tokens": relative(constant, constant[:1].expand_as(x)),
            "W_d = 0, no bias: adapter output": float(moved.norm()),
            "W_d = 0, no bias: adapter gradients": gradients,
            "block_out: misfit of a linear target": relative(x @ fit, target),
            "y(c x′) against y(x′)": relative(
                glu(w, rms_norm(c * x)), glu(w, rms_norm(x))
            ),
        },
        "mlp_out is blind where block_out sees",
        differ={"block_out: adapter gradients": alive},
        evidence={
            "floor by ε, found over formula": float(near.norm() / floor.norm()),
            "x′ at two scales": relative(c * x, x),
        },
    )


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
