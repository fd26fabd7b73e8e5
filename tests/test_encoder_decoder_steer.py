"""Steering both stacks of an encoder–decoder: where it is read, and which tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from two_stacks import F64, padded

import equiv
from benchmarks.support_witness import OUTPUT, activations, places_of
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.precision import KeepFloat64
from equiv.model.stages import staged
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.vector import Vector
from equiv.steering.jacobian.later import as_later
from equiv.steering.jacobian.passage import Passage, part_of, way
from equiv.testing.models import example, transformer


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_a_steer_reads_the_middle_of_a_decoder_block_behind_cross_attention(
    family: str,
) -> None:
    """In Whisper no module is given that sum and returns it: it is formed."""
    model, seen = transformer(family, seed=5), []
    call = example(model)
    places = places_of(family, model.config)
    base = dict(model.named_parameters())
    with torch.no_grad():
        before = activations(model, places, base, call)
        v = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()

        def shift(h: Tensor) -> Tensor:
            seen.append(h)
            return v.expand_as(h)

        with equiv.steer(model, {(3, "resid_mid"): shift}):  # type: ignore[dict-item]
            after = activations(model, places, base, call)
    expected = before[3, "x"] + before[3, "attn_out"] + before[3, "cross_out"]
    if family == "bart":  # its norms end the sums
        block = model.model.decoder.layers[3 - 2]
        middle = block.self_attn_layer_norm(before[3, "x"] + before[3, "attn_out"])
        expected = block.encoder_attn_layer_norm(middle + before[3, "cross_out"])
    torch.testing.assert_close(seen[0], expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(after[3, "attn_out"], before[3, "attn_out"])
    assert not torch.equal(after[3, "mlp_out"], before[3, "mlp_out"])


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_the_engine_steers_both_stacks_as_the_live_model_does(family: str) -> None:
    model = transformer(family, seed=6)
    update = equiv.Update.random(model, 0.05, seed=1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64) / 4

    sites = [(0, "attn_out"), (1, "block_out"), (2, "cross_out"), (3, "resid_mid")]
    sites += [(3, "cross_out->block_out")]
    steering = {key: Affine(drawn(2, 16), drawn(16, 2), drawn(16)) for key in sites}
    call = padded(model)
    found = equiv.evaluate(model, update, call, steering, dtype=F64)
    tuned = {n: p + update.deltas[n] for n, p in model.named_parameters()}
    with torch.no_grad(), KeepFloat64():
        with equiv.steer(model, steering):
            live = model(**call).logits
        expected = torch.func.functional_call(model, tuned, (), call).logits
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(live, -1)
    kl = (p.exp() * (p - q)).sum(-1)[call["decoder_attention_mask"].bool()]
    assert found.tokens == 7
    assert abs(found.steered - float(kl.mean())) < 1e-10
    assert found.steered != found.unsteered


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_positions_are_counted_in_the_stack_they_belong_to(family: str) -> None:
    model = transformer(family, seed=7)
    call, blocks = padded(model), places_of(family, model.config)
    base = dict(model.named_parameters())
    v = Vector(torch.ones(16, dtype=F64))

    def moved(layer: int, positions: Any) -> list[list[bool]]:
        with torch.no_grad():
            before = activations(model, blocks, base, call)
            with equiv.steer(model, {(layer, "block_out"): v}, positions=positions):
                after = activations(model, blocks, base, call)
        key = layer, "block_out"
        return (after[key] != before[key]).any(-1).tolist()

    last = [[False, False, False, True], [False, False, True, False]]
    assert moved(3, "last") == last
    assert moved(3, torch.tensor(last)) == last
    if family == "t5":
        assert moved(1, "last") == [
            [False, False, False, True, False, False],
            [False] * 5 + [True],
        ]
    else:  # sounds have no padding
        assert moved(1, "last") == [[False] * 5 + [True]] * 2
    with (
        pytest.raises(equiv.ArgumentError, match="steering of one stack"),
        equiv.steer(
            model,
            {(0, "block_out"): v, (2, "block_out"): v},
            positions=torch.tensor(last),
        ),
    ):
        pass


@pytest.mark.parametrize("family", ["t5", "whisper"])
@pytest.mark.parametrize("begun", [False, True], ids=["start token", "given tokens"])
@pytest.mark.parametrize("positions", ["generated", "last", "first 2 + generated"])
def test_generated_tokens_are_those_after_what_the_decoder_is_given(
    family: str, begun: bool, positions: str
) -> None:
    """Against a steer that counts columns by itself, in forwards without a cache."""
    model = transformer(family, seed=8)
    call, widths = example(model), []
    if not begun:
        call.pop("decoder_input_ids")
    call |= {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    v = 2 * torch.randn(16, generator=torch.Generator().manual_seed(3)).double()
    with equiv.steer(model, {(3, "block_out"): Vector(v)}, positions=positions):
        cached = model.generate(**call, pad_token_id=0)
        plain = model.generate(**call, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)

    def chosen(h: Tensor) -> Tensor:
        widths.append(h.shape[1])
        column, width = torch.arange(h.shape[1]), widths[0]
        picked = {
            "generated": column >= width,
            "last": column == width - 1,
            "first 2 + generated": (column < 2) | (column >= width),
        }[positions]
        return torch.where(picked[:, None], v, 0.0).expand_as(h)

    with equiv.steer(model, {(3, "block_out"): chosen}):  # type: ignore[dict-item]
        expected = model.generate(**call, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, expected)


def test_rows_get_their_own_steers_in_both_stacks_also_as_beams() -> None:
    model = transformer("bart", seed=8)
    ids = example(model)["input_ids"]
    drawn = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)).double()
    bank = [{(1, "block_out"): Vector(v), (2, "mlp_in"): Vector(v)} for v in 2 * drawn]
    call: Any = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    call |= {"eos_token_id": None, "pad_token_id": 0}

    def generated(rows: Tensor) -> Tensor:
        return model.generate(rows, attention_mask=torch.ones_like(rows), **call)

    with equiv.steer(model, bank, index=[1, 0]):
        together = generated(ids)
    for row, own in ((0, bank[1]), (1, bank[0])):
        with equiv.steer(model, own):
            assert torch.equal(generated(ids[row : row + 1])[0], together[row])
    assert not torch.equal(generated(ids), together)


@pytest.mark.parametrize(
    ("key", "at"),
    [
        ((1, "mlp_out"), (3, "cross_out")),
        ((0, "block_out"), "logits"),
        ((2, "cross_out"), (3, "block_out")),
    ],
)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_jacobian_between_sites_of_either_stack(
    family: str, key: tuple[int, str], at: Any
) -> None:
    """Products with it against derivatives of the live model under a steer."""
    model, later = transformer(family, seed=12), as_later(at)
    call, places = padded(model), places_of(family, model.config)
    base = dict(model.named_parameters())
    end = OUTPUT if at == "logits" else at
    batches = from_inputs(model, call)
    with (
        measured(model),
        staged(model, batches, F64, sites=(key[1], *later.captured)) as cut,
    ):
        hidden = None
        for stage in cut.stages:
            if stage.layer == key[0]:
                break
            hidden, _ = cut.run(stage, cut.tensors(stage), hidden, 0)
        part = part_of(way(cut, key[0], key[1], later), 0, hidden)
        passage = Passage(way(cut, key[0], key[1], later), (part,))
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(passage.size, generator=generator, dtype=F64)
        w = torch.randn(part.base.shape, generator=generator, dtype=F64)
        pushed, pulled = passage.push(v), passage.pull(w)
    mask = call["decoder_attention_mask"].bool()
    assert torch.equal(part.keep, mask) and len(pushed) == 7

    def live(t: Tensor) -> Tensor:
        added = t * part.spread(v)
        with equiv.steer(model, {key: lambda h: added}):  # type: ignore[dict-item]
            return activations(model, places, base, call)[end][mask]

    with sdpa_kernel(SDPBackend.MATH), KeepFloat64():
        one = torch.ones((), dtype=F64)
        expected = jvp(live, (0 * one,), (one,))[1]
    torch.testing.assert_close(pushed, expected, rtol=1e-9, atol=1e-11)
    assert pushed.norm() > 1e-3
    # The reverse is the transpose of that.
    assert abs(float((pulled * v).sum() - (w * pushed).sum())) < 1e-10


def test_an_encoders_steer_is_fitted_to_what_the_decoder_does() -> None:
    """It leaves less of the update's effect than none does."""
    model, at = transformer("t5", seed=12), (3, "block_out")
    update = equiv.Update.random(model, 0.05, seed=1).restricted(names="encoder.*")
    fitted = equiv.fit_downstream(
        model,
        update,
        padded(model),
        site="block_out",
        at=at,
        layers=[1],
        rank=2,
        iterations=8,
        rounds=1,
        dtype=F64,
    )
    found = equiv.evaluate(model, update, padded(model), fitted, dtype=F64)
    assert found.recovered is not None and found.recovered > 0.5
