"""Steering trained for behaviour: exact cases, the live model, and what it promises."""

import copy
import json
from typing import Any

import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equiv
from equiv.behaviour.outputs import Outputs
from equiv.behaviour.trainable import as_trainable
from equiv.behaviour.training import HELD_OUT, fit_behaviour
from equiv.model.batches import split
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.steering.applying.apply import by_layer
from equiv.steering.forms.form import Steering
from equiv.testing.models import FAMILIES, mlp, transformer
from equiv.testing.strategies import Case, transformer_cases
from equiv.update.low_rank import LowRank

IDS = torch.randint(3, 32, (8, 5), generator=torch.Generator().manual_seed(0))
F64 = torch.float64
WIDTH = 16


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64)


def drawn(form: str, seed: int, width: int = WIDTH, rank: int = 2) -> Steering:
    """A random steering of a form, as strong as the activations."""
    down, up, bias = (
        draw(seed, rank, width),
        draw(seed + 1, width, rank),
        draw(seed, width),
    )
    down = down / width**0.5
    if form == "vector":
        return equiv.Vector(bias)
    if form == "loreft":
        rotation = torch.linalg.qr(draw(seed + 2, width, rank)).Q.T
        return equiv.LoReFT(rotation, down, draw(seed + 3, rank))
    if form == "mlp":
        return equiv.LowRankMLP(down, up, draw(seed + 3, rank), bias, "tanh")
    if form == "heads":
        return equiv.Heads(up.T.reshape(2, -1)[:, :8], 0.1 * draw(seed + 3, 2, 8))
    if form == "custom":
        module = nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, width))
        with torch.no_grad():
            for i, part in enumerate(module.parameters()):
                part.copy_(0.3 * draw(seed + i, *part.shape))
        return equiv.Custom(module.double())
    return equiv.Affine(down, up, bias)


FORMS = ("vector", "affine", "loreft", "mlp", "custom")


def kl(tuned: Tensor, other: Tensor) -> float:
    """Mean per token, from probabilities."""
    p, q = tuned.softmax(-1), other.softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def chosen_on(model: nn.Module, inputs: Any, seed: int = 0) -> Tensor:
    """The sequences that are held out."""
    batches = split(from_inputs(model, inputs), HELD_OUT, seed)
    return torch.cat([b.arguments["input_ids"] for b in batches if b.held_out])


def about(found: equiv.SteeringSet) -> dict[str, Any]:
    said = found.about["behaviour"]
    assert isinstance(said, dict)
    return said


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_an_output_bias_is_found(start: float) -> None:
    """A bias of the attention's projection is a vector at attn_out, exactly."""
    model = transformer("gpt2", seed=1)
    bias = 0.3 * draw(1, WIDTH)
    update = {"transformer.h.0.attn.c_proj.bias": bias}
    opening = {(0, "attn_out"): equiv.Vector(start * bias)}
    found = fit_behaviour(model, update, IDS, opening, dtype=F64)
    said = about(found)
    assert said["unsteered"] > 1e-2
    assert said["steered"] < 1e-8 * said["unsteered"]
    steer = found[0, "attn_out"]
    assert isinstance(steer, equiv.Vector)
    off = steer.vector - bias
    # The same for every coordinate is what no LayerNorm lets through.
    torch.testing.assert_close(off, off.mean().expand(WIDTH), rtol=0, atol=1e-5)
    with torch.no_grad(), equiv.steer(model, found):
        steered = model(input_ids=IDS).logits
    tuned = witness.tuned_activations(
        model, equiv.Update.from_dict(update), {"input_ids": IDS}
    )
    assert kl(tuned["logits"], steered) < 1e-8 * said["unsteered"]


@settings(max_examples=12 * witness.SWEEP)
@given(
    transformer_cases(relative_norms=(0.05, 0.2)),
    st.sampled_from(FORMS),
    st.sampled_from([1e-2, 0.3, 3.0]),
)
def test_it_is_never_worse_than_nothing_or_than_the_start(
    case: Case, form: str, size: float
) -> None:
    """On the sequences that choose, measured on the live model by other means."""
    ids = IDS[: max(2, len(case.inputs))]
    model: Any = case.model
    start = {(1, "block_out"): drawn(form, 3).scaled(size)}
    found = fit_behaviour(model, case.update, ids, start, steps=4, dtype=F64)
    held, said = chosen_on(model, ids), about(found)
    call = {"input_ids": held}
    tuned = witness.tuned_activations(model, case.update, call)["logits"]
    for name, steering in (("unsteered", {}), ("start", start), ("steered", found)):
        with torch.no_grad(), witness.own_arithmetic(), equiv.steer(model, steering):
            live = witness.activations(model, {}, call)["logits"]
        assert said[name] == pytest.approx(kl(tuned, live), rel=1e-6, abs=1e-12)
    assert said["steered"] <= min(said["unsteered"], said["start"])
    assert bool(found) == (said["strength"] > 0)


def test_what_chooses_is_not_trained_on() -> None:
    """Only held-out sequences are changed by the update: there is nothing to learn."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    x = torch.stack([torch.arange(16, dtype=F64), torch.zeros(16, dtype=F64)], 1)
    parts = split(from_inputs(model, x), HELD_OUT, 0)
    held = {
        float(row[0])
        for part in parts
        if part.held_out
        for row in next(iter(part.arguments.values()))
    }
    assert len(held) == 4
    x[:, 1] = torch.tensor([float(row[0]) in held for row in x])
    update = {"0.weight": torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=F64)}
    start = {(0, "0"): equiv.Vector(torch.zeros(2, dtype=F64))}
    said = about(fit_behaviour(model, update, x, start, dtype=F64))
    assert said["steered"] == said["unsteered"] > 0
    x[:, 1] = 1 - x[:, 1]  # now only what is trained on, and it would do harm
    said = about(fit_behaviour(model, update, x, start, dtype=F64))
    assert said["steered"] == said["unsteered"] == 0
    x[:, 1] = 1
    said = about(fit_behaviour(model, update, x, start, dtype=F64))
    assert said["steered"] < 1e-6 * said["unsteered"]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_live_model(family: str) -> None:
    """Steered through the stages, against PyTorch's attention under `equiv.steer`."""
    model = transformer(family, seed=2)
    update = equiv.Update.random(model, 0.1, seed=0)
    parts = {
        (0, "attn_out"): as_trainable((0, "attn_out"), drawn("affine", 1), F64),
        (1, "mlp_in"): as_trainable((1, "mlp_in"), drawn("mlp", 5), F64),
    }
    batches = from_inputs(model, IDS)
    leaves = [t for part in parts.values() for t in part.parameters.values()]
    weights = draw(9, *IDS.shape, 32)
    sites = ("attn_out", "mlp_in")
    with measured(model), staged(model, batches, F64, sites=sites) as cut:
        outputs = Outputs(cut, update, [])
        tuned = outputs.tuned(0)
        with torch.enable_grad():
            current = {key: part.current() for key, part in parts.items()}
            steered = outputs.steered(0, by_layer(current))
            own = torch.autograd.grad((steered * weights).sum(), leaves)
    model.requires_grad_(False)
    current = {key: part.current() for key, part in parts.items()}
    with witness.own_arithmetic(), equiv.steer(model, current):
        live = model(input_ids=IDS).logits
        expected = torch.autograd.grad((live * weights).sum(), leaves)
    witness.close(steered.detach(), live.detach())
    for found, right in zip(own, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-9)
    right = witness.tuned_activations(model, update, {"input_ids": IDS})["logits"]
    witness.close(tuned, right)


@pytest.mark.parametrize("form", [*FORMS, "heads"])
def test_every_form_is_trained_and_the_start_left_alone(form: str) -> None:
    model = transformer("llama", seed=3)
    update = equiv.Update.random(model, 0.15, seed=0)
    site = "attn_heads" if form == "heads" else "block_out"
    start = {(layer, site): drawn(form, layer).scaled(0.05) for layer in (0, 1)}
    before = copy.deepcopy(start)
    found = fit_behaviour(model, update, IDS, start, steps=12, dtype=F64)
    said = about(found)
    assert said["steered"] < 0.995 * min(said["unsteered"], said["start"])
    for key, steering in found.items():
        assert type(steering) is type(start[key])
        assert steering.num_parameters == start[key].num_parameters
        h = draw(1, 3, WIDTH)
        assert torch.equal(start[key](h), before[key](h))
        assert not torch.equal(steering(h), start[key](h))
        assert not steering(h).requires_grad
        if isinstance(steering, equiv.LoReFT):
            gram = steering.rotation @ steering.rotation.T
            torch.testing.assert_close(
                gram, torch.eye(2, dtype=F64), rtol=0, atol=1e-12
            )


def test_it_is_the_same_every_time_and_the_seed_matters() -> None:
    model = transformer("llama", seed=4, dtype=torch.float32)
    update = equiv.Update.random(model, 0.1, seed=0)
    start = {(0, "mlp_out"): drawn("affine", 1).scaled(0.1)}
    runs = [
        fit_behaviour(model, update, IDS, start, steps=6, seed=seed)
        for seed in (0, 0, 1)
    ]
    first, again, other = (run[0, "mlp_out"] for run in runs)
    for name in ("down", "up", "bias"):
        one, two = getattr(first, name), getattr(again, name)
        assert one.dtype == torch.float32 and torch.equal(one, two)
    assert runs[0].about == runs[1].about
    assert not torch.equal(first.down, other.down)  # pyright: ignore


def test_the_model_is_left_as_it_was() -> None:
    model = transformer("qwen2", seed=5, dtype=torch.float32)
    update = equiv.Update.random(model, 0.1, seed=0)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    fit_behaviour(model, update, IDS, {(0, "block_out"): drawn("affine", 1)}, steps=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_low_rank_updates_stay_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("llama", seed=6)
    name = "model.layers.0.mlp.down_proj.weight"
    delta = LowRank(0.3 * draw(1, WIDTH, 2), draw(2, 2, 24))
    start = {(0, "mlp_out"): drawn("affine", 3).scaled(0.1)}
    dense = fit_behaviour(model, {name: delta.dense()}, IDS, start, steps=3, dtype=F64)

    def refuse(self: LowRank) -> Tensor:
        raise AssertionError("made dense")

    monkeypatch.setattr(LowRank, "dense", refuse)
    found = fit_behaviour(model, {name: delta}, IDS, start, steps=3, dtype=F64)
    for key in ("unsteered", "start", "steered"):
        assert about(found)[key] == pytest.approx(about(dense)[key], rel=1e-6)


def test_what_only_harms_is_not_used() -> None:
    """Wild steering of a late layer, and no step that could tame it."""
    model = transformer("llama", seed=7)
    update = equiv.Update.random(model, 0.01, seed=0)
    start = {(1, "block_out"): equiv.Vector(1e3 * draw(1, WIDTH))}
    found = fit_behaviour(model, update, IDS, start, steps=1, dtype=F64)
    said = about(found)
    assert not found and said["strength"] == 0
    assert said["steered"] == said["unsteered"] < said["start"]


def test_a_start_that_is_too_strong_is_weakened_first() -> None:
    model = mlp((4, 6, 3), seed=1)
    bias = draw(1, 3)
    start = {(0, "2"): equiv.Vector(4 * bias)}
    found = fit_behaviour(
        model, {"2.bias": bias}, draw(2, 12, 4), start, steps=1, dtype=F64
    )
    assert about(found)["steered"] < 1e-20  # a quarter of the start is the answer
    steer = found[0, "2"]
    assert isinstance(steer, equiv.Vector)
    torch.testing.assert_close(steer.vector, bias)


@pytest.mark.parametrize("kind", ["encoder", "module"])
def test_without_logits_it_is_the_output_difference(kind: str) -> None:
    if kind == "module":
        model: Any = mlp((4, 6, 3), seed=1)
        inputs, site = draw(2, 12, 4), "1"
    else:
        model, inputs, site = transformer("bert", seed=1).bert, IDS, "block_out"
    update = equiv.Update.random(model, 0.2, seed=0)
    width = 6 if kind == "module" else WIDTH
    start = {(0, site): drawn("affine", 1, width).scaled(0.05)}
    found = fit_behaviour(model, update, inputs, start, steps=10, dtype=F64)
    said = about(found)
    batches = split(from_inputs(model, inputs), HELD_OUT, 0)
    held = torch.cat([next(iter(b.arguments.values())) for b in batches if b.held_out])
    for name, steering in (("start", start), ("steered", found)):
        measured_by = equiv.evaluate(model, update, held, steering, dtype=F64)
        assert said["measure"] == measured_by.measure == "output"
        assert said[name] == pytest.approx(measured_by.steered, rel=1e-9)
    assert said["steered"] < said["start"]


def test_what_is_known_is_kept_and_can_be_written() -> None:
    model = transformer("llama", seed=8)
    update = equiv.Update.random(model, 0.1, seed=0)
    start = equiv.fit_sequential(model, update, IDS, rank=2)
    found = fit_behaviour(model, update, IDS, start, steps=2, seed=3)
    assert found.about["target"] == "behaviour"
    assert found.about["fits"] == start.about["fits"]
    said = about(found)
    assert said["seed"] == 3 and 0 <= said["steps"] <= 2
    json.dumps(dict(found.about))


def test_progress_is_shown_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = mlp((4, 6, 3), seed=1)
    start = {(0, "1"): drawn("vector", 1, 6)}
    for progress in (False, True):
        fit_behaviour(
            model,
            {"2.bias": draw(1, 3)},
            draw(2, 8, 4),
            start,
            steps=2,
            progress=progress,
        )
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("equiv fit_behaviour" in shown.err) == progress


ONE = {(0, "block_out"): drawn("vector", 1)}
OFFSET = equiv.Offset(draw(0, 8, 5, 16))
LAST = equiv.SteeringSet(ONE, positions="last")


@pytest.mark.parametrize(
    ("start", "asked", "error", "says"),
    [
        ({}, {}, equiv.ArgumentError, "steering to start from"),
        (3, {}, equiv.ArgumentError, "Expected a mapping"),
        ({(0, "block_out"): OFFSET}, {}, equiv.ArgumentError, "to train"),
        ({(0, "block_out"): nn.Tanh()}, {}, equiv.ArgumentError, "equiv.Custom"),
        ({(5, "block_out"): drawn("vector", 1)}, {}, equiv.SiteError, "0…1"),
        ({(0, "nowhere"): drawn("vector", 1)}, {}, equiv.SiteError, "nowhere"),
        (LAST, {}, equiv.ArgumentError, "all positions"),
        (ONE, {"steps": 0}, equiv.ArgumentError, "`steps`"),
        (ONE, {"dtype": torch.half}, equiv.ArgumentError, "`dtype`"),
        (ONE, {"seed": -1}, equiv.ArgumentError, "`seed`"),
    ],
)
def test_wrong_calls_say_so(start: Any, asked: Any, error: Any, says: str) -> None:
    model = transformer("llama", seed=8)
    update = equiv.Update.random(model, 0.1, seed=0)
    with pytest.raises(error, match=says):
        fit_behaviour(model, update, IDS, start, **asked)


def test_one_sequence_is_too_few() -> None:
    model = transformer("llama", seed=8)
    update = equiv.Update.random(model, 0.1, seed=0)
    with pytest.raises(equiv.InputsError, match="at least two sequences"):
        fit_behaviour(model, update, IDS[:1], {(0, "block_out"): drawn("vector", 1)})
