"""The theorems about one gated MLP, evaluated on tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theorem_tensors import (
    EXACT,
    Activation,
    Function,
    activations,
    cases,
    derivative,
    dims,
    draw,
    gate,
    glu,
    head,
    kinds,
    scales,
    seeds,
    silu1,
    spoilt,
)
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close


def dgate(
    phi: Function, phi1: Function, ag: Tensor, au: Tensor, eg: Tensor, eu: Tensor
) -> Tensor:
    return phi1(ag) * au * eg + phi(ag) * eu


def gate_rem(
    phi: Function, phi1: Function, ag: Tensor, au: Tensor, eg: Tensor, eu: Tensor
) -> Tensor:
    rho = phi(ag + eg) - (phi(ag) + phi1(ag) * eg)
    return phi1(ag) * eg * eu + rho * (au + eu)


def gate_const(
    phi1: Function, K: float, ag: Tensor, au: Tensor, eg: Tensor, eu: Tensor
) -> Tensor:
    return (phi1(ag) * eg * eu).abs() + K * eg**2 * (au.abs() + eu.abs())


def draw_glu(seed: int, d: int, n: int, o: int, kind: str) -> list[Tensor]:
    """Wg, Wu, Wd of that kind, dWg, dWu, dWd, u, v."""
    tensors = draw(seed, "nd nd on nd nd on d d", n=n, d=d, o=o)
    return [spoilt(kind, weights) for weights in tensors[:3]] + tensors[3:]


@pytest.mark.theorem("glu.expansion", "glu.jvp")
@cases
@given(seeds, dims, dims, dims, activations, kinds)
def test_glu_expansion(
    seed: int, d: int, n: int, o: int, activation: Activation, kind: str
) -> None:
    phi, phi1, _ = activation
    Wg, Wu, Wd, dWg, dWu, dWd, u, _ = draw_glu(seed, d, n, o, kind)
    moves = (Wg @ u, Wu @ u, dWg @ u, dWu @ u)
    m, dm = gate(phi, *moves[:2]), dgate(phi, phi1, *moves)
    r = gate_rem(phi, phi1, *moves)
    shift = dWd @ m + Wd @ dm
    remainder = Wd @ r + dWd @ (dm + r)
    tuned = glu(phi, Wg + dWg, Wu + dWu, Wd + dWd, u)
    assert_close(tuned, glu(phi, Wg, Wu, Wd, u) + shift + remainder, **EXACT)
    tangent = derivative(
        lambda Wg, Wu, Wd: glu(phi, Wg, Wu, Wd, u), (Wg, Wu, Wd), (dWg, dWu, dWd)
    )
    assert_close(tangent, shift, **EXACT)


@pytest.mark.theorem("glu.expansion-mlp-in", "glu.jacobian", "glu.jvp-mlp-in")
@cases
@given(seeds, dims, dims, dims, activations, kinds)
def test_glu_expansion_mlp_in(
    seed: int, d: int, n: int, o: int, activation: Activation, kind: str
) -> None:
    phi, phi1, _ = activation
    Wg, Wu, Wd, _, _, _, u, v = draw_glu(seed, d, n, o, kind)
    ag, au = Wg @ u, Wu @ u
    moves = (ag, au, Wg @ v, Wu @ v)
    shift = Wd @ dgate(phi, phi1, *moves)
    remainder = Wd @ gate_rem(phi, phi1, *moves)
    assert_close(
        glu(phi, Wg, Wu, Wd, u + v),
        glu(phi, Wg, Wu, Wd, u) + shift + remainder,
        **EXACT,
    )
    J = torch.diag(phi1(ag) * au) @ Wg + torch.diag(phi(ag)) @ Wu
    assert_close(Wd @ J @ v, shift, **EXACT)
    tangent = derivative(lambda u: glu(phi, Wg, Wu, Wd, u), (u,), (v,))
    assert_close(tangent, shift, **EXACT)


@pytest.mark.theorem("glu.down-exact", "glu.up-exact", "glu.up-down")
@cases
@given(seeds, dims, dims, dims, activations, kinds)
def test_glu_exactness(
    seed: int, d: int, n: int, o: int, activation: Activation, kind: str
) -> None:
    phi, _, _ = activation
    Wg, Wu, Wd, _, dWu, dWd, u, _ = draw_glu(seed, d, n, o, kind)
    base = glu(phi, Wg, Wu, Wd, u)
    down = dWd @ gate(phi, Wg @ u, Wu @ u)
    up = Wd @ gate(phi, Wg @ u, dWu @ u)
    cross = dWd @ gate(phi, Wg @ u, dWu @ u)
    assert_close(glu(phi, Wg, Wu, Wd + dWd, u), base + down, **EXACT)
    assert_close(glu(phi, Wg, Wu + dWu, Wd, u), base + up, **EXACT)
    assert_close(glu(phi, Wg, Wu + dWu, Wd + dWd, u), base + down + up + cross, **EXACT)


@pytest.mark.theorem("attention.value-output")
@cases
@given(seeds, dims, dims, dims)
def test_value_output_cross_term(seed: int, d: int, k: int, T: int) -> None:
    Wo, dWo, Wv, dWv, X, a = draw(seed, "dk dk kd kd dT T", d=d, k=k, T=T)
    first_order = head(dWo, Wv, X, a) + head(Wo, dWv, X, a)
    tuned = head(Wo + dWo, Wv + dWv, X, a)
    assert_close(
        tuned, head(Wo, Wv, X, a) + first_order + head(dWo, dWv, X, a), **EXACT
    )


@pytest.mark.theorem("glu.quadratic", "silu.glu")
@cases
@given(seeds, dims, dims, dims, scales, activations, kinds)
def test_glu_first_order(
    seed: int, d: int, n: int, o: int, t: float, activation: Activation, kind: str
) -> None:
    phi, phi1, K = activation
    Wg, Wu, Wd, dWg, dWu, dWd, u, _ = draw_glu(seed, d, n, o, kind)
    moves = (Wg @ u, Wu @ u, dWg @ u, dWu @ u)
    dm, c = dgate(phi, phi1, *moves), gate_const(phi1, K, *moves)
    shift = dWd @ gate(phi, *moves[:2]) + Wd @ dm
    C = Wd.abs() @ c + dWd.abs() @ (dm.abs() + c)
    tuned = glu(phi, Wg + t * dWg, Wu + t * dWu, Wd + t * dWd, u)
    gap = (tuned - (glu(phi, Wg, Wu, Wd, u) + t * shift)).abs()
    assert (gap <= t**2 * C + 1e-10).all()


@pytest.mark.theorem("glu.quadratic-mlp-in", "silu.glu-mlp-in")
@cases
@given(seeds, dims, dims, dims, scales, activations, kinds)
def test_glu_first_order_mlp_in(
    seed: int, d: int, n: int, o: int, t: float, activation: Activation, kind: str
) -> None:
    phi, phi1, K = activation
    Wg, Wu, Wd, _, _, _, u, v = draw_glu(seed, d, n, o, kind)
    moves = (Wg @ u, Wu @ u, Wg @ v, Wu @ v)
    C = Wd.abs() @ gate_const(phi1, K, *moves)
    shift = Wd @ dgate(phi, phi1, *moves)
    gap = (
        glu(phi, Wg, Wu, Wd, u + t * v) - (glu(phi, Wg, Wu, Wd, u) + t * shift)
    ).abs()
    assert (gap <= t**2 * C + 1e-10).all()


@pytest.mark.theorem("silu.derivative", "silu.quadratic", "silu.half-linear")
@cases
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_silu_quadratic(a: float, e: float) -> None:
    x, step, tiny = torch.tensor(a), torch.tensor(e), torch.tensor(e / 1e5)
    slope = derivative(silu, (x,), (torch.ones(()),))
    assert_close(slope, silu1(x), **EXACT)
    assert (silu(x + step) - (silu(x) + silu1(x) * step)).abs() <= e**2 / 4 + 1e-12
    assert (silu(step) - step / 2).abs() <= e**2 / 4 + 1e-12
    # the constant is sharp: silu''(0) / 2 = 1/4
    assert (silu(tiny) - tiny / 2).abs() >= 0.2499 * tiny**2 - 1e-20


@pytest.mark.theorem("linear.chain", "linear.cross-term")
@cases
@given(seeds, dims, st.integers(1, 5), scales)
def test_chain_expansion(seed: int, d: int, L: int, t: float) -> None:
    Ws, dWs, h, dh = draw(seed, "Ldd Ldd d d", L=L, d=d)
    base, first, rest, tuned = (
        torch.eye(d),
        torch.zeros(d, d),
        torch.zeros(d, d),
        torch.eye(d),
    )
    for W, dW in zip(Ws, dWs, strict=True):
        tuned = (W + t * dW) @ tuned
        base, first, rest = (
            W @ base,
            dW @ base + W @ first,
            W @ rest + dW @ (first + t * rest),
        )
    assert_close(tuned, base + t * first + t**2 * rest, rtol=1e-9, atol=1e-8)
    W, dW = Ws[0], dWs[0]
    assert_close((W + dW) @ (h + dh), W @ h + (dW @ h + W @ dh) + dW @ dh, **EXACT)


@pytest.mark.theorem("midpoint.rule", "midpoint.unit", "midpoint.sharp")
@cases
@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 1))
def test_midpoint_rule(a: float, f: float, c: float, t: float) -> None:
    def wave(s: Tensor) -> Tensor:
        return a * torch.sin(f * s + c)

    M = abs(a * f**3)  # bounds the third derivative
    for end in (torch.tensor(t), torch.tensor(1.0)):
        slope = derivative(wave, (end / 2,), (torch.ones(()),))
        assert (
            wave(end) - wave(torch.zeros(())) - end * slope
        ).abs() <= M * end**3 / 24 + 1e-13
    end = torch.tensor(t)
    slope = derivative(lambda s: s**3, (end / 2,), (torch.ones(()),))
    assert_close(end**3 - end * slope, 6 * end**3 / 24, **EXACT)
