"""SymPy on the bounds of the activations, and on the second derivative of a norm."""

from collections.abc import Callable
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given
from symbolic import ACTIVATIONS, SECOND, TORCH, central_difference, x
from theorem_tensors import cases, derivative, draw, seeds
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.testing import assert_close

# Where phi'' = 0 beside 0: there |phi'| is largest. Starting points for the solver.
TURNS = {"silu": 2.4, "gelu": 1.4, "gelu_tanh": 1.4}
# Beyond 12 every derivative is constant in float64.
GRID = torch.linspace(-12, 12, 100_001, dtype=torch.float64)


def largest_slope(name: str) -> float:
    """sup |phi'|, at the zero of phi'' that SymPy finds."""
    phi = ACTIVATIONS[name][0]
    turn: Any = sp.nsolve(sp.diff(phi, x, 2), x, TURNS[name])
    slope: Any = sp.diff(phi, x).subs(x, turn)
    return float(slope)


@pytest.mark.claim("28, slopes")
@pytest.mark.parametrize(
    ("name", "stated"), [("silu", 1.09984), ("gelu", 1.12890), ("gelu_tanh", 1.12899)]
)
def test_largest_slope(name: str, stated: float) -> None:
    assert abs(largest_slope(name) - stated) < 1e-5  # the theory gives five digits
    slopes = derivative(ACTIVATIONS[name][1], (GRID,), (torch.ones_like(GRID),))
    assert slopes.abs().max() <= largest_slope(name) + 1e-12


@pytest.mark.claim("10, second-order term")
@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        ("silu", sp.Rational(1, 2)),
        ("gelu", sp.sqrt(2 / sp.pi)),
        ("gelu_tanh", sp.sqrt(2 / sp.pi)),
    ],
)
def test_largest_curvature_is_at_zero(name: str, curvature: sp.Expr) -> None:
    # half of it is the K of the quadratic remainder: 1/4 for SiLU, as proved
    second = sp.diff(ACTIVATIONS[name][0], x, 2)
    assert sp.simplify(second.subs(x, 0) - curvature) == 0
    # SymPy's exp(-x) squared would overflow far out; there it is 0 anyway
    values = sp.lambdify(x, second, modules=TORCH)(GRID)
    assert values.abs().max() <= float(curvature) + 1e-12


@pytest.mark.claim("10, second-order term", "28, slopes")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torch_means_the_same_function(name: str) -> None:
    symbolic, function = ACTIVATIONS[name]
    assert_close(sp.lambdify(x, symbolic, modules=TORCH)(GRID), function(GRID))
    assert (function(GRID).abs() <= GRID.abs()).all()


D = 4  # entries of the norm's input: enough for all its terms


def symbolic_layer_norm(order: int) -> Callable[..., list[Tensor]]:
    """The derivative of a layer norm along a direction, as a function of both."""
    t = sp.Symbol("t")
    z, v = sp.symbols(f"z:{D}"), sp.symbols(f"v:{D}")
    moved = [a + t * b for a, b in zip(z, v, strict=True)]
    centred = [a - sum(moved) / D for a in moved]
    scale = sp.sqrt(sum(c**2 for c in centred) / D + sp.Rational(1, 10**5))
    terms = [sp.diff(c / scale, t, order).subs(t, 0) for c in centred]
    return sp.lambdify((*z, *v), terms, modules=TORCH, cse=True)


LAYER_NORM = {order: symbolic_layer_norm(order) for order in (1, 2)}


def norm(z: Tensor) -> Tensor:
    return layer_norm(z, (D,), eps=1e-5)


@pytest.mark.claim(41)
@cases
@given(seeds)
def test_central_differences_are_right_through_layer_norm(seed: int) -> None:
    z, v = draw(seed, "d d", d=D)
    z = z + torch.arange(D)  # away from a constant input, where the norm is steep
    first, second = (torch.stack(LAYER_NORM[k](*z, *v)) for k in (1, 2))
    assert_close(derivative(norm, (z,), (v,)), first)
    assert_close(central_difference(norm, (z,), (v,)), second, **SECOND)


@pytest.mark.claim(41)
def test_nested_jvp_is_silently_wrong_through_layer_norm() -> None:
    # The reason for the differences. When this fails, torch has mended it.
    z, v = torch.tensor([0.3, -1.2, 0.8, 2.0]), torch.tensor([1.0, 0.5, -0.7, 0.2])
    right = torch.stack(LAYER_NORM[2](*z, *v))
    nested = derivative(lambda z: derivative(norm, (z,), (v,)), (z,), (v,))
    assert (nested - right).norm() > 0.1 * right.norm()

    def written_out(z: Tensor) -> Tensor:
        centred = z - z.mean()
        return centred / (centred.pow(2).mean() + 1e-5).sqrt()

    nested = derivative(lambda z: derivative(written_out, (z,), (v,)), (z,), (v,))
    assert_close(nested, right)


@pytest.mark.claim(41)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_of_activations(name: str) -> None:
    symbolic, function = ACTIVATIONS[name]
    points = torch.linspace(-4, 4, 41)
    second = sp.lambdify(x, sp.diff(symbolic, x, 2), modules=TORCH)(points)
    along = torch.ones_like(points)
    assert_close(central_difference(function, (points,), (along,)), second, **SECOND)
