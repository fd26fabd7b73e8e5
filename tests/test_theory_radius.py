"""How far first order reaches: claim 41, against roots found by SciPy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import witness
from scipy.optimize import brentq
from torch import Tensor
from torch.func import hessian

import equiv
from equiv.testing.models import transformer
from equiv.theory import Judged, Verdict
from equiv.theory.claims import claim_41_radius as claim
from equiv.theory.toys import Draw, glu

IDS = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(1))
PLACES = [(0, "mlp_in"), (0, "mlp_out"), (1, "attn_out"), (1, "block_out")]


def judged(model: Any, update: Any) -> Judged:
    return equiv.theory.run([41], model, update, IDS)[41]


def ratios(found: Judged) -> dict[str, dict[str, float]]:
    return found.to_dict()["evidence"]["predicted/measured"]


@pytest.mark.claim(41)
@pytest.mark.parametrize("key", PLACES, ids=str)
def test_ratios_are_those_of_brute_force(key: tuple[int, str]) -> None:
    """Derivatives by differences of values, the crossing by a root finder."""
    model = transformer("llama")
    update = equiv.Update.random(model, 0.05, seed=0)

    def h(t: float) -> Tensor:
        call = {"input_ids": IDS}
        return witness.tuned_activations(model, update, call, t=t)[key]

    e, base = 1e-4, h(0.0)
    first = (h(e) - h(-e)) / (2 * e)
    second = (h(e) - 2 * base + h(-e)) / e**2

    def excess(t: float, tolerance: float) -> float:
        shift = h(t) - base
        return float((shift - t * first).norm() / shift.norm()) - tolerance

    found = ratios(judged(model, update))
    for name, tolerance in (("10 %", 0.1), ("1 %", 0.01)):
        root: Any = brentq(excess, 1e-3, 2.5, args=(tolerance,), xtol=1e-6)
        expected = 2 * tolerance * float(first.norm() / second.norm()) / root
        got = found[name][f"layer {key[0]}, {key[1]}"]
        assert got == pytest.approx(expected, rel=1e-2)


@pytest.mark.claim(41)
def test_the_verdict_is_that_of_the_update() -> None:
    model = transformer("llama")
    small = judged(model, equiv.Update.random(model, 0.02, seed=0))
    assert small.verdict is Verdict.HOLDS, small.says
    bias = {"transformer.h.1.mlp.c_proj.bias": torch.ones(16).double()}
    # Affine in the blocks, and a norm takes it away before the logits.
    assert judged(transformer("gpt2"), bias).verdict is Verdict.NOT_APPLICABLE


@pytest.mark.claim(41)
def test_kinks_are_no_second_derivative() -> None:
    """ReLU's remainder has no D² that would predict it."""
    model = transformer("llama", hidden_act="relu", hidden_size=16)
    update = equiv.Update.random(model, 0.2, seed=0).restricted(names="*0.mlp.gate*")
    assert judged(model, update).verdict is Verdict.FAILS


@pytest.mark.claim(41)
def test_the_closed_second_derivative_is_the_hessians() -> None:
    draw = Draw(3)
    w, update, u = draw.glu(5, 7), draw.glu(5, 7), draw.normal(2, 5)

    def along(t: Tensor) -> Tensor:
        moved = [a + t * b for a, b in zip(w, update, strict=True)]
        return glu(type(w)(*moved), u)

    expected = hessian(along)(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(claim.second_of_glu(w, update, u), expected)


BROKEN: list[tuple[str, Callable[[Any], Any]]] = [
    ("predicted", lambda f: lambda *args: f(*args) / 2),
    ("predicted", lambda f: lambda *args: 1.1 * f(*args)),
    ("second", lambda f: lambda *args: 1.1 * f(*args)),
    ("crossing", lambda f: lambda shares, t: f(shares, 2 * t)),
    ("second_of_glu", lambda f: lambda *args: 1.001 * f(*args)),
]


@pytest.mark.claim(41)
@pytest.mark.parametrize(
    ("name", "broken"),
    BROKEN,
    ids=[f"{n} {name}" for n, (name, _) in enumerate(BROKEN)],
)
def test_it_fails_when_broken(
    name: str, broken: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, name, broken(getattr(claim, name)))
    model = transformer("llama")
    found = judged(model, equiv.Update.random(model, 0.05, seed=0))
    assert found.verdict is Verdict.FAILS, found.says
