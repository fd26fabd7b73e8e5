"""Tokens of towers: those of the stream, whatever an image or a sound is cut into."""

from typing import Any

import pytest
import torch
import witness
from torch import Tensor, nn
from torch.func import functional_call

import equiv
from equiv.model.inputs import from_inputs
from equiv.testing.models import example, transformer


def tower(family: str) -> Any:
    model = transformer(family, seed=1)
    return model.get_encoder() if family == "whisper" else model


def own_example(model: Any) -> dict[str, Tensor]:
    """What the tower reads, without what a decoder behind it would."""
    name = model.main_input_name
    return {name: example(model)[name]}


def stream(model: Any, call: dict[str, Tensor]) -> Tensor:
    """What the last norm-free stream of the model is, from its own outputs."""
    with torch.no_grad():
        return model(**call, output_hidden_states=True).hidden_states[0]


def output_of_block(
    model: Any, update: equiv.Update, call: dict[str, Tensor], t: float
) -> Tensor:
    """What block 0 returns with t times the update, as the model itself tells it."""
    moved = {n: p.detach() for n, p in model.named_parameters()}
    moved |= {n: moved[n] + t * d for n, d in witness.dense(update).items()}
    asked = {**call, "output_hidden_states": True}
    with torch.no_grad():
        return functional_call(model, moved, (), asked).hidden_states[1]


@pytest.mark.parametrize("family", ["vit", "clip_vision_model", "whisper"])
def test_tokens_are_those_of_the_stream(family: str) -> None:
    model = tower(family)
    call = own_example(model)
    call = {n: torch.cat([v, v.flip(0) + 1, -v]) for n, v in call.items()}
    batch, seq, width = stream(model, call).shape
    assert call[model.main_input_name].shape[1] != seq  # channels, or bands
    batches = from_inputs(model, call)
    assert sum(b.tokens for b in batches) == batch * seq
    assert all(b.mask.shape[1] == seq for b in batches)
    update = equiv.Update.random(model, 0.05, seed=2)
    report = equiv.check(
        model, update, call, sites=("block_out",), forms=("vector",), at="base"
    )
    assert batch == report.subject.sequences == 6
    assert report.subject.tokens == batch * seq
    assert {r.tokens for r in report.rows if r.site == "block_out"} == {batch * seq}
    fitting = (batch - report.subject.held_out_sequences) * seq
    assert report.fits
    for fit in report.fits:
        assert fit.tokens_per_dimension == pytest.approx(fitting / width)
    shift = equiv.shifts(model, update, call, sites=("block_out",))[0, "block_out"]
    assert shift.mask.shape == shift.exact.shape[:2] == (batch, seq)


def test_the_first_position_is_the_class_token() -> None:
    """Without the right tokens there was no first one to leave out."""
    model = tower("vit")
    call = own_example(model)
    update = equiv.Update.random(model, 0.05, seed=2)
    report = equiv.check(model, update, call, sites=("block_out",), at="base")
    base, tuned = (output_of_block(model, update, call, t) for t in (0.0, 1.0))
    row = next(r for r in report.rows if (r.layer, r.site) == (0, "block_out"))
    shift = (tuned - base)[:, 1:]
    assert row.rest is not None
    assert row.rest.norm_exact == pytest.approx(float(shift.norm()), rel=1e-6)


def test_a_model_in_half_precision_is_run_in_its_own() -> None:
    model = tower("vit").to(torch.bfloat16)
    call = {n: v.float() for n, v in own_example(model).items()}
    assert from_inputs(model, call)[0].mask.shape == (2, 5)


def test_nothing_is_left_on_the_model() -> None:
    model = tower("whisper").train()
    before = {n: (id(m.forward.__func__), m.training) for n, m in model.named_modules()}
    from_inputs(model, own_example(model))
    assert before == {
        n: (id(m.forward.__func__), m.training) for n, m in model.named_modules()
    }


def test_images_of_another_size_are_refused_by_shape() -> None:
    model: nn.Module = tower("vit")
    with pytest.raises(equiv.InputsError, match=r"pixel_values.*\(2, 3, 12, 12\)"):
        from_inputs(model, {"pixel_values": torch.randn(2, 3, 12, 12)})
