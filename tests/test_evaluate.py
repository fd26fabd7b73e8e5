"""`equiv.evaluate` against the live model, steered and tuned by plain means."""

import copy

import pytest
import torch
import witness
from torch import Tensor

import equiv
from equiv.testing.models import transformer

IDS = torch.randint(3, 32, (10, 7), generator=torch.Generator().manual_seed(0))


def tuned_copy(model: torch.nn.Module, update: equiv.Update) -> torch.nn.Module:
    tuned = copy.deepcopy(model)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta
    return tuned


def kl(tuned: Tensor, other: Tensor) -> Tensor:
    """Per token, from probabilities."""
    p, q = tuned.softmax(-1), other.softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("site", ["block_out", "resid_mid->block_out", "attn_heads"])
@torch.no_grad()
def test_it_measures_what_the_live_model_does(site: str) -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    steering = equiv.fit_sequential(
        model, update, IDS[:6], site=site, rank=2, dtype=torch.float64
    )
    unseen = IDS[6:]
    found = equiv.evaluate(model, update, unseen, steering, dtype=torch.float64)
    call = {"input_ids": unseen}
    with witness.own_arithmetic():
        base = witness.activations(model, witness.parameters(model), call)
        with equiv.steer(model, steering):
            steered = witness.activations(model, witness.parameters(model), call)
        tuned = witness.activations(tuned_copy(model, update), {}, call)
    for key, expected in (("unsteered", base), ("steered", steered)):
        distance = float(kl(tuned["logits"], expected["logits"]).mean())
        assert getattr(found, key) == pytest.approx(distance, rel=1e-9)
    for layer, misfit in found.misfits:
        t, s, b = (run[layer, "block_out"] for run in (tuned, steered, base))
        left = float((t - s).square().sum() / (t - b).square().sum())
        assert misfit == pytest.approx(left, rel=1e-9)
    same = tuned["logits"].argmax(-1) == steered["logits"].argmax(-1)
    assert found.same_top == pytest.approx(float(same.double().mean()))
    assert found.recovered == pytest.approx(1 - found.steered / found.unsteered)
    assert (found.sequences, found.tokens) == (4, 28)
    assert found.num_parameters == steering.num_parameters


@torch.no_grad()
def test_no_steering_recovers_nothing_and_the_exact_one_all() -> None:
    model = transformer("gpt2", seed=1)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    update = {"transformer.h.1.mlp.c_proj.bias": bias}
    none = equiv.evaluate(model, update, IDS, {}, dtype=torch.float64)
    assert none.recovered == 0
    assert none.steered == none.unsteered > 0
    exact = {(1, "mlp_out"): equiv.Vector(bias)}
    found = equiv.evaluate(model, update, IDS, exact, dtype=torch.float64)
    assert found.recovered == pytest.approx(1, abs=1e-12)
    assert [layer for layer, _ in found.misfits] == [1]
    assert found.misfits[0][1] < 1e-20
    assert (found.num_parameters, found.update_parameters) == (16, 16)


def test_wrong_steering_is_refused() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    v = equiv.Vector(torch.ones(16))
    for key in ((2, "block_out"), (0, "nowhere"), (0, "block_out->mlp_in")):
        with pytest.raises(equiv.SiteError):
            equiv.evaluate(model, update, IDS, {key: v})
    first = equiv.SteeringSet({(0, "block_out"): v}, positions="last")
    with pytest.raises(equiv.ArgumentError, match="all positions"):
        equiv.evaluate(model, update, IDS, first)


@torch.no_grad()
def test_calibration_finds_the_strength_and_allows_none() -> None:
    model = transformer("gpt2", seed=1)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    update = {"transformer.h.1.mlp.c_proj.bias": bias}
    for factor, strength in ((1.0, 1.0), (4.0, 0.25), (-1.0, 0.0)):
        steering = {(1, "mlp_out"): equiv.Vector(bias * factor)}
        found = equiv.calibrate(model, update, IDS, steering, dtype=torch.float64)
        assert found.about["strength"] == strength
        assert len(found) == (strength > 0)
        best = equiv.evaluate(model, update, IDS, found, dtype=torch.float64)
        assert best.recovered == pytest.approx(float(strength > 0), abs=1e-12)
    with pytest.raises(equiv.ArgumentError, match="at least one strength"):
        equiv.calibrate(model, update, IDS, {}, strengths=())
