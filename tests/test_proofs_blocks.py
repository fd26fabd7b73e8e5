"""The theorems about many blocks, on a small network with attention."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theorem_tensors import EXACT, cases, derivative, dims, draw, glu, seeds
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close
from witness import SWEEP

Params = dict[str, Tensor]


L_TOY, D_TOY, T_TOY = 3, 4, 3


def toy_params(seed: int) -> Params:
    """Three blocks with attention and a gated MLP; `gain` is shared by all of them."""
    axes = {"emb": "dT", "gain": "d1", "g": "Lnd", "u": "Lnd", "d": "Ldn"}
    axes |= dict.fromkeys("qkvo", "Ldd")
    tensors = draw(seed, " ".join(axes.values()), L=L_TOY, d=D_TOY, n=5, T=T_TOY)
    return {name: 0.5 * x for name, x in zip(axes, tensors, strict=True)}


def block(layer: int, w: Params, h: Tensor) -> Tensor:
    """Pre-norm block on all tokens: attention, then a gated MLP."""

    def norm(x: Tensor) -> Tensor:
        return (1 + w["gain"]) * x / (x.pow(2).mean(0) + 1e-2).sqrt()

    x = norm(h)
    pattern = torch.softmax((w["k"][layer] @ x).T @ (w["q"][layer] @ x), dim=0)
    h = h + w["o"][layer] @ (w["v"][layer] @ x) @ pattern
    return h + glu(silu, w["g"][layer], w["u"][layer], w["d"][layer], norm(h))


def block_of_params(layer: int, h: Tensor, w: Params) -> Tensor:
    return block(layer, w, h)


def run_toy(w: Params) -> list[Tensor]:
    """h_0, ..., h_L."""
    states = [w["emb"]]
    for layer in range(L_TOY):
        states.append(block(layer, w, states[-1]))
    return states


def add(w: Params, dw: Params, t: float) -> Params:
    return {name: w[name] + t * dw[name] for name in w}


def local_shifts(w: Params, dw: Params) -> list[Tensor]:
    """e_l: the JVP of block l in its own parameters, its input held fixed."""
    states = run_toy(w)
    return [
        derivative(partial(block_of_params, layer, h), (w,), (dw,))
        for layer, h in enumerate(states[:-1])
    ]


def carry(w: Params, start: int, end: int, v: Tensor) -> Tensor:
    """J_(end <- start) v."""
    states = run_toy(w)
    for layer in range(start, end):
        v = derivative(partial(block, layer, w), (states[layer],), (v,))
    return v


def steered_toy(w: Params, o_emb: Tensor, offsets: list[Tensor], t: float) -> Tensor:
    h = w["emb"] + t * o_emb
    for layer, offset in enumerate(offsets):
        h = block(layer, w, h) + t * offset
    return h


toy_cases = settings(max_examples=10 * SWEEP)


@pytest.mark.theorem("superposition.recursion", "superposition.jvp")
@toy_cases
@given(seeds)
def test_superposition(seed: int) -> None:
    w, dw = toy_params(seed), toy_params(seed + 1)
    local = local_shifts(w, dw)
    tangents = derivative(run_toy, (w,), (dw,))
    for n in range(L_TOY + 1):
        terms = [carry(w, 0, n, dw["emb"])] + [
            carry(w, layer + 1, n, local[layer]) for layer in range(n)
        ]
        assert_close(tangents[n], sum(terms), **EXACT)
    # the recursion delta_(l+1) = J_l delta_l + e_l gives the same
    delta = dw["emb"]
    for layer in range(L_TOY):
        delta = carry(w, layer, layer + 1, delta) + local[layer]
    assert_close(delta, tangents[-1], **EXACT)


@pytest.mark.theorem("equivalence.steered-derivative", "equivalence.first-order")
@toy_cases
@given(seeds)
def test_first_order_equivalence(seed: int) -> None:
    w, dw = toy_params(seed), toy_params(seed + 1)
    local = local_shifts(w, dw)
    tangents = derivative(run_toy, (w,), (dw,))
    zero, one = torch.zeros(()), torch.ones(())
    slope = derivative(lambda t: steered_toy(w, dw["emb"], local, t), (zero,), (one,))
    assert_close(slope, tangents[-1], **EXACT)

    def gap(t: float) -> Tensor:
        return (
            run_toy(add(w, dw, t))[-1] - steered_toy(w, dw["emb"], local, t)
        ).norm() / t

    # gap(t) -> 0; it is of order t here, so a quarter of t gives about a quarter
    assert gap(2.5e-4) <= 0.5 * gap(1e-3) + 1e-9


@pytest.mark.theorem("equivalence.steering-error")
@toy_cases
@given(seeds)
def test_steering_error(seed: int) -> None:
    w, dw = toy_params(seed), toy_params(seed + 1)
    local = local_shifts(w, dw)
    o_emb, *offsets = draw(seed + 2, "dT " * (L_TOY + 1), d=D_TOY, T=T_TOY)
    zero, one = torch.zeros(()), torch.ones(())
    steered = derivative(lambda t: steered_toy(w, o_emb, offsets, t), (zero,), (one,))
    error = derivative(run_toy, (w,), (dw,))[-1] - steered
    misfits = [carry(w, 0, L_TOY, dw["emb"] - o_emb)] + [
        carry(w, layer + 1, L_TOY, local[layer] - offsets[layer])
        for layer in range(L_TOY)
    ]
    assert_close(error, torch.stack(misfits).sum(0), **EXACT)


@pytest.mark.theorem("over-count.sum", "over-count.excess", "over-count.derivative")
@toy_cases
@given(seeds)
def test_over_count(seed: int) -> None:
    w, dw = toy_params(seed), toy_params(seed + 1)
    dw["emb"] = torch.zeros_like(dw["emb"])
    local = local_shifts(w, dw)
    tangents = derivative(run_toy, (w,), (dw,))
    zero, one = torch.zeros(()), torch.ones(())
    slope = derivative(
        lambda t: steered_toy(w, dw["emb"], tangents[1:], t), (zero,), (one,)
    )
    carried = [carry(w, layer + 1, L_TOY, local[layer]) for layer in range(L_TOY)]
    assert_close(
        slope, sum((L_TOY - layer) * c for layer, c in enumerate(carried)), **EXACT
    )
    excess = sum((L_TOY - layer - 1) * c for layer, c in enumerate(carried))
    assert_close(slope - tangents[-1], excess, **EXACT)


@pytest.mark.theorem("over-count.example")
@cases
@given(seeds, dims)
def test_over_count_example(seed: int, d: int) -> None:
    h, a = draw(seed, "d d", d=d)
    base = [lambda x: x, lambda x: x]
    tuned = [lambda x: x + a, lambda x: x + a]
    tuned_states = list(itertools.accumulate(tuned, lambda x, f: f(x), initial=h))
    base_states = list(itertools.accumulate(base, lambda x, f: f(x), initial=h))
    x = h
    for layer in range(2):
        x = base[layer](x) + (tuned_states[layer + 1] - base_states[layer + 1])
    assert_close(x, h + 3 * a, **EXACT)
    assert_close(tuned_states[-1], h + 2 * a, **EXACT)


@pytest.mark.theorem("oracle.exact", "oracle.sequential")
@toy_cases
@given(seeds)
def test_sequential_oracle(seed: int) -> None:
    base, tuned = toy_params(seed), toy_params(seed + 1)
    tuned["emb"] = base["emb"]
    target = run_toy(tuned)
    h = base["emb"]
    for layer in range(L_TOY):
        own = block(layer, base, h)
        h = own + (target[layer + 1] - own)
        assert_close(h, target[layer + 1], **EXACT)


@pytest.mark.theorem("oracle.one-layer", "oracle.one-layer-exact")
@toy_cases
@given(seeds, st.integers(0, L_TOY - 1))
def test_one_oracle(seed: int, oracle_layer: int) -> None:
    base, tuned = toy_params(seed), toy_params(seed + 1)
    tuned["emb"] = base["emb"]
    target = run_toy(tuned)
    h = hybrid = base["emb"]
    for layer in range(L_TOY):
        h = block(layer, base, h)
        if layer == oracle_layer:
            h = h + (target[layer + 1] - h)
        hybrid = block(layer, tuned if layer <= oracle_layer else base, hybrid)
    assert_close(h, hybrid, **EXACT)
    if oracle_layer == L_TOY - 1:
        assert_close(h, target[-1], **EXACT)


def error_bound(eps: list[float], lipschitz: list[float]) -> float:
    total = 0.0
    for error, gain in zip(eps, lipschitz, strict=True):
        total = gain * total + error
    return total


@pytest.mark.theorem("error.bound", "error.bound-tuned")
@cases
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_error_control(seed: int, d: int, L: int, on_tuned_states: bool) -> None:
    Ws, noise, h = draw(seed, "Ldd Ldd d", L=L, d=d)
    Vs = Ws + 0.3 * noise

    def tuned(layer: int, x: Tensor) -> Tensor:
        return torch.tanh(Ws[layer] @ x)

    def steered(layer: int, x: Tensor) -> Tensor:
        return torch.tanh(Vs[layer] @ x)

    a = b = h
    eps, gains = [], []
    for layer in range(L):
        here, f = (b, steered) if on_tuned_states else (a, tuned)
        eps.append(float((steered(layer, here) - tuned(layer, here)).norm()))
        # what f does to the distance of the two visited states, no more
        stretched = (f(layer, a) - f(layer, b)).norm()
        gains.append(float(stretched / (a - b).norm().clamp(min=1e-300)))
        a, b = steered(layer, a), tuned(layer, b)
    closed = sum(e * torch.tensor(gains[i + 1 :]).prod() for i, e in enumerate(eps))
    assert_close(torch.tensor(error_bound(eps, gains)), closed, **EXACT)
    assert (a - b).norm() <= error_bound(eps, gains) * (1 + 1e-9) + 1e-12


@pytest.mark.theorem("error.mixed-fails")
@cases
@given(st.floats(0, 100))
def test_mixed_bound_fails(a: float) -> None:
    tuned = [lambda x: x, lambda x: 0.0]
    steered = [lambda x: x + 1, lambda x: a * x]
    at_tuned = list(itertools.accumulate(tuned, lambda x, f: f(x), initial=0.0))
    at_steered = list(itertools.accumulate(steered, lambda x, f: f(x), initial=0.0))
    eps = [abs(s(x) - f(x)) for s, f, x in zip(steered, tuned, at_tuned, strict=False)]
    assert error_bound(eps, [1.0, 0.0]) == 0  # the tuned blocks' constants
    assert abs(at_steered[-1] - at_tuned[-1]) == a


@pytest.mark.theorem("error.tight")
@cases
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=6))
def test_error_control_tight(blocks: list[tuple[float, float]]) -> None:
    a = b = 0.0
    for error, gain in blocks:
        a, b = gain * a + error, gain * b
    bound = error_bound([error for error, _ in blocks], [gain for _, gain in blocks])
    assert_close(torch.tensor(abs(a - b)), torch.tensor(bound), **EXACT)
