"""SymPy expands a gated MLP; torch's derivatives agree with what it finds.

One hidden unit with scalar weights is enough: an output is a sum over hidden units, and
the expansion of a sum is the sum of the expansions. Nothing here is typed in twice: the
second-order term that is compared with torch is the one SymPy derives.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from symbolic import ACTIVATIONS, SECOND, TORCH, central_difference, x
from theorem_tensors import (
    EXACT,
    cases,
    derivative,
    dims,
    draw,
    glu,
    kinds,
    seeds,
    spoilt,
)
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.testing import assert_close

t, ag, au, eg, eu, wd, dwd = sp.symbols("t a_g a_u e_g e_u w dw", real=True)
names = st.sampled_from(list(ACTIVATIONS))


def phi_of(name: str) -> Callable[[sp.Expr], sp.Expr]:
    """The activation as a function of a SymPy expression; "any" is an unknown one."""
    if name == "any":
        return sp.Function("phi")
    return lambda z: ACTIVATIONS[name][0].subs(x, z)


def coefficient(curve: Any, order: int) -> sp.Expr:
    """The coefficient of t to that power in the Taylor series of the curve at 0."""
    return (sp.diff(curve, t, order).subs(t, 0).doit()) / sp.factorial(order)


def update_curve(name: str) -> sp.Expr:
    """One hidden unit's part of an output while all three weights move by t."""
    return (wd + t * dwd) * phi_of(name)(ag + t * eg) * (au + t * eu)


def steer_curve(name: str) -> sp.Expr:
    """The same while the input moves by t v, which moves a_g and a_u only."""
    return wd * phi_of(name)(ag + t * eg) * (au + t * eu)


def stated(name: str, order: int, moved: Any) -> sp.Expr:
    """The terms as the theory states them; `moved` is what W_d moves by."""
    p = phi_of(name)(x)
    phi, phi1, phi2 = (sp.diff(p, x, k).subs(x, ag).doit() for k in range(3))
    first_of_m = phi1 * au * eg + phi * eu
    if order == 1:
        return moved * phi * au + wd * first_of_m
    return moved * first_of_m + wd * (phi1 * eg * eu + phi2 * au * eg**2 / 2)


@cache
def derived(name: str, order: int) -> Callable[..., Tensor]:
    """A derived term as a function of tensors a_g, a_u, e_g, e_u, w, dw."""
    term = coefficient(update_curve(name), order)
    return sp.lambdify((ag, au, eg, eu, wd, dwd), term, modules=TORCH, cse=True)


@pytest.mark.claim("1, by activation", "10, second-order term")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["any", *ACTIVATIONS])
def test_update_terms_are_those_of_the_theory(name: str, order: int) -> None:
    found = coefficient(update_curve(name), order)
    assert sp.expand(found - stated(name, order, dwd)).doit().equals(0)


@pytest.mark.claim("13, second-order term")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["any", *ACTIVATIONS])
def test_steer_terms_are_those_of_the_theory(name: str, order: int) -> None:
    found = coefficient(steer_curve(name), order)
    assert sp.expand(found - stated(name, order, 0)).doit().equals(0)


@pytest.mark.claim("2, higher orders")
def test_which_updates_leave_no_remainder() -> None:
    # every order from the second on, for an unknown activation
    curve = update_curve("any")
    alone = {"W_d": {eg: 0, eu: 0}, "W_u": {eg: 0, dwd: 0}, "W_g": {eu: 0, dwd: 0}}
    for matrix, still in alone.items():
        orders = [sp.simplify(coefficient(curve.subs(still), k)) for k in (2, 3)]
        assert all(term == 0 for term in orders) == (matrix != "W_g")
    together = curve.subs(eg, 0)
    cross = dwd * phi_of("any")(ag) * eu
    assert sp.simplify(coefficient(together, 2) - cross) == 0
    assert sp.simplify(coefficient(together, 3)) == 0


def units(name: str, order: int, weights: list[Tensor], moves: list[Tensor]) -> Tensor:
    """A derived term summed over hidden units: one value for every output."""
    Wd, dWd = weights
    return derived(name, order)(*moves, Wd, dWd).sum(1)


@pytest.mark.claim("1, by activation", "10, second-order term")
@cases
@given(seeds, dims, dims, dims, names, kinds)
def test_update_terms_match_torch(
    seed: int, d: int, n: int, o: int, name: str, kind: str
) -> None:
    Wg, Wu, Wd, dWg, dWu, dWd, u = draw(seed, "nd nd on nd nd on d", n=n, d=d, o=o)
    Wg, Wu, Wd = (spoilt(kind, weights) for weights in (Wg, Wu, Wd))
    moves = [Wg @ u, Wu @ u, dWg @ u, dWu @ u]

    def output(Wg: Tensor, Wu: Tensor, Wd: Tensor) -> Tensor:
        return glu(ACTIVATIONS[name][1], Wg, Wu, Wd, u)

    at, along = (Wg, Wu, Wd), (dWg, dWu, dWd)
    first, second = (units(name, k, [Wd, dWd], moves) for k in (1, 2))
    assert_close(first, derivative(output, at, along), **EXACT)
    measured = central_difference(output, at, along) / 2
    assert_close(second, measured, **SECOND)


@pytest.mark.claim("13, second-order term")
@cases
@given(seeds, dims, dims, dims, names, kinds)
def test_steer_terms_match_torch(
    seed: int, d: int, n: int, o: int, name: str, kind: str
) -> None:
    Wg, Wu, Wd, u, v = draw(seed, "nd nd on d d", n=n, d=d, o=o)
    Wg, Wu, Wd = (spoilt(kind, weights) for weights in (Wg, Wu, Wd))
    moves = [Wg @ u, Wu @ u, Wg @ v, Wu @ v]
    still = torch.zeros_like(Wd)

    def output(u: Tensor) -> Tensor:
        return glu(ACTIVATIONS[name][1], Wg, Wu, Wd, u)

    first, second = (units(name, k, [Wd, still], moves) for k in (1, 2))
    assert_close(first, derivative(output, (u,), (v,)), **EXACT)
    measured = central_difference(output, (u,), (v,)) / 2
    assert_close(second, measured, **SECOND)
