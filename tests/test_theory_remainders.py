"""Claims 10 and 48: orders of remainders and their constants, against brute force."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from breaking import module_of
from test_theory_orders import drawn
from test_theory_small_updates import judged
from torch import nn
from torch.func import functional_call
from torch.nn.functional import relu
from witness import moved, tuned_activations, whole_jvp

import equiv
from equiv.shift import propagate
from equiv.testing.models import mlp, transformer
from equiv.theory import Setting, Verdict
from equiv.theory.norms import Euclidean
from equiv.theory.remainders import left_by_points
from equiv.theory.setting import setting

ORDERS = {10: 2, 48: 3}


@pytest.fixture(scope="module")
def given() -> Setting:
    return drawn()


def of_module(model: nn.Module, size: float = 0.1) -> Setting:
    update = equiv.Update.random(model, size, seed=0)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return setting("", model, update, inputs.double(), None, Euclidean(), 0)


@pytest.mark.claim(10, 48)
@pytest.mark.parametrize("number", ORDERS)
def test_orders_are_those_of_two_whole_runs(number: int, given: Setting) -> None:
    """Hooks, changed weights and one jvp; the order from two scales."""
    model, update = given.model, given.update
    found = judged(number, given)
    assert found.verdict is Verdict.HOLDS, found.says
    (batch,) = [b for b in given.few if b.mask.shape[1] == 6]
    rests = []
    scales = (2.0**-5, 2.0**-6)
    for t in scales:
        at = 0.0 if number == 10 else t / 2
        base = tuned_activations(model, update, batch.arguments, 0.0)
        tuned = tuned_activations(model, update, batch.arguments, t)
        _, slopes = whole_jvp(model, update, batch.arguments, at)
        rests.append({k: (tuned[k] - base[k] - t * slopes[k]).norm() for k in base})
    for key in rests[0]:
        if isinstance(key, tuple):
            name = f"layer {key[0]}, {key[1]}, propagated"
            order = math.log2(rests[0][key] / rests[1][key])
            assert abs(order - ORDERS[number]) < 0.15
            assert abs(order - found.evidence["orders"][name]) < 0.15


@pytest.mark.claim(10)
def test_the_second_order_term_is_the_models_own(given: Setting) -> None:
    """Three runs of the MLP module itself with changed weights."""
    claim = module_of(10)
    (made,) = claim.find_mlps(given, 4)[:1]
    w, change, u, phi = claim.gated(made)
    module: Any = given.model.get_submodule("model.layers.0.mlp")
    prefix, e = "model.layers.0.mlp.", 1e-3

    def run(t: float) -> torch.Tensor:
        tensors = moved(given.model, given.update, t)
        own = {n.removeprefix(prefix): v for n, v in tensors.items() if prefix in n}
        return functional_call(module, own, (u,))

    with torch.no_grad():
        half = (run(e) - 2 * run(0) + run(-e)) / (2 * e**2)
        found = claim.second_order(w, change, u, phi)
    torch.testing.assert_close(found, half, rtol=1e-4, atol=1e-6)


@pytest.mark.claim(48)
def test_more_points_are_those_of_whole_jvps(given: Setting) -> None:
    left = left_by_points(given, (0, 1, 3))
    nodes = {
        0: [(0.0, 1.0)],
        1: [(0.5, 1.0)],
        3: [(0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)],
    }
    for n, rule in nodes.items():
        rest, whole = np.zeros(2), np.zeros(2)
        for batch in given.few:
            call = batch.arguments
            base, tuned = (
                tuned_activations(given.model, given.update, call, t) for t in (0, 1)
            )
            slopes = [whole_jvp(given.model, given.update, call, s)[1] for s, _ in rule]
            for i, key in enumerate([(0, "block_out"), "logits"]):
                exact = tuned[key] - base[key]
                pairs = zip(slopes, rule, strict=True)
                claimed = sum(w * found[key] for found, (_, w) in pairs)
                rest[i] += float((exact - claimed).square().sum())
                whole[i] += float(exact.square().sum())
        shares = np.sqrt(rest / whole)
        assert math.isclose(left[n]["block 0"], shares[0], rel_tol=1e-6)
        assert math.isclose(left[n]["output"], shares[1], rel_tol=1e-6)


@pytest.mark.parametrize("number", ORDERS)
def test_plain_modules_and_other_families(number: int) -> None:
    for given in (of_module(mlp()), drawn("gpt2")):
        found = judged(number, given)
        assert found.verdict is Verdict.HOLDS, found.says
    linear = judged(number, of_module(nn.Sequential(nn.Linear(4, 4).double())))
    assert linear.verdict is Verdict.HOLDS and not linear.evidence["orders"]
    tiny = judged(number, of_module(mlp(), size=1e-15))
    assert tiny.verdict is Verdict.INCONCLUSIVE


class Hidden(nn.Module):
    """A ReLU that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp((4, 256, 3), "identity")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[2](relu(self.body[0](x)))


def test_blocks_of_two_kinds_have_the_sites_of_both() -> None:
    """DeepSeek's first block has a hidden layer, its mixtures of experts have none."""
    model = transformer("deepseek_v3", seed=1)
    update = equiv.Update.random(model, 0.01, seed=0)
    given = setting("", model, update, None, None, Euclidean(), 0)
    assert {site for _, site in given.shifts} >= {"mlp_in", "mlp_out", "block_out"}
    assert judged(10, given).verdict is Verdict.HOLDS


def test_kinks_are_no_refutation_where_they_are_known() -> None:
    known = judged(10, of_module(mlp((4, 256, 3), "relu")))
    assert known.verdict is Verdict.NOT_APPLICABLE and "(ReLU)" in known.says
    assert min(known.evidence["orders"].values()) < 1.9
    assert abs(known.evidence["order of a toy with ReLU, W_g alone"] - 1.5) < 0.2
    hidden = judged(10, of_module(Hidden()))
    assert hidden.verdict is Verdict.FAILS


@pytest.mark.claim(10, 48)
@pytest.mark.parametrize("number", ORDERS)
def test_a_wrong_derivative_fails(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = propagate.forward

    def wrong(*args: Any) -> Any:
        (out, sites), (dout, dsites) = original(*args)
        dsites = {name: 1.001 * tangent for name, tangent in dsites.items()}
        return (out, sites), (dout, dsites)

    monkeypatch.setattr(propagate, "forward", wrong)
    found = judged(number, drawn())
    assert found.verdict is Verdict.FAILS and "order 1." in found.says


def test_a_wrong_constant_fails(
    given: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = module_of(10)
    for name, broken in (
        ("second_order", lambda f: lambda *args: f(*args) * (1 + 1e-5)),
        ("curvature", lambda _: lambda phi, x: torch.zeros_like(x)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(claim, name, broken(getattr(claim, name)))
            found = judged(10, given)
            assert found.verdict is Verdict.FAILS and "Q₂ off" in found.says


def test_points_in_the_wrong_place_fail(
    given: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equiv.theory import remainders

    original = remainders.gauss
    monkeypatch.setattr(
        remainders, "gauss", lambda n: {s / 2: w for s, w in original(n).items()}
    )
    found = judged(48, given)
    assert found.verdict is Verdict.FAILS and "four points" in found.says
