"""Attention and its derivatives against PyTorch's own, on every kind of call."""

import pytest
import torch
import torch.nn.functional as F
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from equiv.model.attention import attention
from equiv.model.precision import arithmetic
from equiv.testing.strategies import seeds


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(call: dict, *moving: Tensor, mask: Tensor | None = None) -> None:
    """Values, tangents and gradients; `mask` moves where it is among the moving."""
    directions = tuple(draw(7 + i, *t.shape) for i, t in enumerate(moving))

    def run(f):  # type: ignore[no-untyped-def]
        def inner(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            return f(q, k, v, attn_mask=rest[0] if rest else mask, **call)

        return inner

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = jvp(run(F.scaled_dot_product_attention), moving, directions)
        found = jvp(run(attention), moving, directions)
        for a, b in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        weights = draw(11, *expected[0].shape)
        pulled = [
            vjp(run(f), *moving)[1](weights)
            for f in (attention, F.scaled_dot_product_attention)
        ]
    for a, b in zip(*pulled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@settings(max_examples=40 * witness.SWEEP)
@given(
    seeds(),
    st.sampled_from([(2, 4, 4), (1, 6, 2), (3, 2, 1)]),
    st.sampled_from(["none", "causal", "bool", "float"]),
    st.sampled_from([None, 0.3]),
)
def test_it_is_pytorchs_attention(
    seed: int, heads: tuple[int, int, int], kind: str, scale: float | None
) -> None:
    batch, many, few = heads
    q = draw(seed, batch, many, 5, 3)
    k, v = draw(seed + 1, batch, few, 5, 3), draw(seed + 2, batch, few, 5, 4)
    mask = None
    if kind == "bool":
        mask = draw(seed + 3, batch, 1, 5, 5) > -0.5
        mask |= torch.eye(5, dtype=torch.bool)  # no row is empty
    if kind == "float":
        mask = draw(seed + 3, 1, many, 5, 5)
    call = {"scale": scale, "is_causal": kind == "causal", "enable_gqa": few != many}
    compare(call, q, k, v, mask=mask)


def test_a_bias_that_moves() -> None:
    q, k, v = (draw(i, 2, 3, 4, 5) for i in range(3))
    compare({}, q, k, v, draw(4, 1, 3, 4, 4))


def test_other_numbers_of_axes_and_sources() -> None:
    compare({}, draw(0, 4, 5), draw(1, 6, 5), draw(2, 6, 5))
    compare({}, draw(0, 2, 4, 5), draw(1, 2, 6, 5), draw(2, 2, 6, 5))
    compare({}, draw(0, 2, 3, 2, 4, 5), draw(1, 2, 3, 2, 6, 5), draw(2, 2, 3, 2, 6, 5))


def test_rows_that_see_nothing_are_zero_and_do_not_move() -> None:
    q, k, v = (draw(i, 1, 1, 3, 2) for i in range(3))
    mask = torch.tensor(
        [[True, False, True], [False, False, False], [True, True, True]]
    )
    with torch.no_grad():
        value, tangent = jvp(
            lambda q, k, v: attention(q, k, v, mask), (q, k, v), (q, k, v)
        )[:2]
    assert not value[0, 0, 1].any() and not tangent[0, 0, 1].any()
    assert torch.isfinite(value).all() and torch.isfinite(tangent).all()
    compare({}, q, k, v, mask=mask)


@pytest.mark.parametrize("which", range(3))
def test_only_one_argument_moves(which: int) -> None:
    fixed = [draw(i, 2, 2, 4, 3) for i in range(3)]

    def along(f):  # type: ignore[no-untyped-def]
        def run(x: Tensor) -> Tensor:
            return f(*(x if i == which else t for i, t in enumerate(fixed)))

        return run

    direction = (draw(9, 2, 2, 4, 3),)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = jvp(
            along(F.scaled_dot_product_attention), (fixed[which],), direction
        )
        found = jvp(along(attention), (fixed[which],), direction)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-13)
    x = fixed[which].requires_grad_()  # the other arguments have no gradient
    along(attention)(x).sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(
            along(F.scaled_dot_product_attention)(x).sum(), x
        )
    torch.testing.assert_close(x.grad, gradient, rtol=1e-12, atol=1e-13)


def test_it_is_what_runs_inside_a_measurement() -> None:
    q, k, v = (draw(i, 1, 2, 4, 3).float() for i in range(3))
    with torch.no_grad(), pytest.raises(NotImplementedError):
        jvp(F.scaled_dot_product_attention, (q, k, v), (q, k, v))
    with torch.no_grad(), arithmetic(torch.float32):
        jvp(F.scaled_dot_product_attention, (q, k, v), (q, k, v))
