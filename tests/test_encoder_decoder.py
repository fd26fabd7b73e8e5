"""Encoder–decoders: both stacks, cross-attention, and a whole check.

The witness is one jvp of the whole model, whose activations plain hooks read off at
the places that `benchmarks.support_witness` has written down by itself.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from two_stacks import EVERY, F64, padded, several, whole

import equiv
from equiv.model.families import find_blocks
from equiv.testing.models import PAIRED, example, transformer


def assert_near(found: Tensor, expected: Tensor) -> None:
    # Some hundred roundings of float64, in sums of a dozen terms.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("family", PAIRED)
def test_shifts_of_both_stacks_are_those_of_the_whole_model(family: str) -> None:
    """Also where tokens are padding, with the table of positions that T5 shares."""
    model = transformer(family, seed=2)
    update = equiv.Update.random(model, 0.05, seed=1)
    deltas = {n: d for n, d in update.deltas.items() if isinstance(d, Tensor)}
    assert set(deltas) == {name for name, _ in model.named_parameters()}
    call = padded(model)
    base, slope = whole(model, deltas, call, 0.0)
    middle = whole(model, deltas, call, 0.5)[1]
    tuned = whole(model, deltas, call, 1.0)[0]
    found = equiv.shifts(model, update, call, sites=EVERY, dtype=F64)
    seen = set()
    for shift in found:
        key = shift.layer, shift.site
        seen.add(key)
        assert_near(shift.base, base[key])
        assert_near(shift.exact, tuned[key] - base[key])
        assert_near(shift.first_order, slope[key])
        assert_near(shift.midpoint, middle[key])
        own = "attention_mask" if shift.layer < 2 else "decoder_attention_mask"
        ones = torch.ones(shift.base.shape[:2], dtype=torch.bool)
        assert torch.equal(shift.mask, call.get(own, ones).bool())
    assert {site for layer, site in seen if layer >= 2} == set(EVERY)
    assert {site for layer, site in seen if layer < 2} == set(EVERY) - {"cross_out"}


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_an_update_of_the_encoder_arrives_by_cross_attention(family: str) -> None:
    model = transformer(family, seed=3)
    blocks = find_blocks(model)
    assert blocks is not None and blocks.encoder is not None
    update = equiv.Update.random(model, 0.05, seed=1).restricted(
        names=f"{blocks.encoder.path}.1.*"
    )
    deltas = {n: d for n, d in update.deltas.items() if isinstance(d, Tensor)}
    slope = whole(model, deltas, example(model), 0.0)[1]
    found = equiv.shifts(model, update, example(model), sites=EVERY, dtype=F64)
    first = found[2, "attn_out"]
    assert not first.first_order.any() and not first.exact.any()
    cross = found[2, "cross_out"]
    torch.testing.assert_close(cross.first_order, slope[2, "cross_out"])
    assert cross.first_order.norm() > 1e-3 * cross.base.norm()
    # It is below every decoder block, so nothing of it is any block's own.
    assert not cross.local_exact.any() and not cross.local_first_order.any()


def test_the_table_of_positions_that_t5_shares_moves_every_block() -> None:
    model = transformer("t5", seed=3)
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    update = equiv.Update.random(model, 0.5, seed=1).restricted(names=name)
    assert list(update.deltas) == [name]
    found = equiv.shifts(model, update, example(model), sites=("attn_out",), dtype=F64)
    for layer in (2, 3):
        assert found[layer, "attn_out"].local_exact.norm() > 0
    report = equiv.check(model, update, several(model, 3), forms=())
    assert report.holds
    assert report.contributions is not None
    assert report.contributions.stages == (2, 3)


def test_what_lies_before_either_stack_counts_as_one_stage() -> None:
    """Each adds something to the output; what counts is the sum, squared."""
    model = transformer("bart", seed=3)
    norm = "model.{}.layernorm_embedding.weight"
    names = (norm.format("encoder"), norm.format("decoder"))
    every = equiv.Update.random(model, 0.1, seed=1)
    update = {name: every.deltas[name] for name in names}
    found = equiv.check(model, update, several(model, 3), forms=()).contributions
    assert found is not None and found.stages[0] == -1
    assert abs(found.shares[0] - 1) < 1e-12 and abs(found.alone[0] - 1) < 1e-12
    assert not any(found.shares[1:])  # the head's run passes them, to no effect


def test_padding_of_either_stack_changes_no_shift() -> None:
    for family in ("t5", "bart"):
        model = transformer(family, seed=4)
        update = equiv.Update.random(model, 0.05, seed=1)
        call = padded(model)
        both = equiv.shifts(model, update, call, sites=EVERY, dtype=F64)
        together = {(shift.layer, shift.site): shift for shift in both}
        alone = {
            "input_ids": call["input_ids"][1:],
            "decoder_input_ids": call["decoder_input_ids"][1:, :3],
        }
        for shift in equiv.shifts(model, update, alone, sites=EVERY, dtype=F64):
            other = together[shift.layer, shift.site]
            own = other.mask[1]
            for name in ("base", "exact", "first_order"):
                torch.testing.assert_close(
                    getattr(other, name)[1][own], getattr(shift, name)[0]
                )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "T5EncoderModel"),
        ("bart", "BartForCausalLM"),
        ("whisper", "WhisperForCausalLM"),
        ("mbart", "MBartForCausalLM"),
    ],
)
def test_a_stack_by_itself_works_too(family: str, name: str) -> None:
    import transformers

    config = transformer(family).config
    torch.manual_seed(0)
    model: Any = getattr(transformers, name)(config).double().eval()
    ids = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 2, 6, 13, 21, 30]])
    blocks = find_blocks(model)
    assert blocks is not None and blocks.encoder is None
    assert "cross_out" not in blocks.sites_of(1)
    update = equiv.Update.random(model, 0.001, seed=0)
    report = equiv.check(model, update, ids, forms=(), dtype=F64)
    assert report.holds
    assert report.superposition is not None
    assert str(report.superposition.verdict) == "holds"
    encoder = transformer(family).get_encoder()
    found = find_blocks(encoder)
    assert found is not None and found.encoder is None and len(found.modules) == 2


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_whole_check_measures_both_stacks(family: str) -> None:
    model = transformer(family, seed=9)
    update = equiv.Update.random(model, 0.01, seed=0)
    call = {**several(model, 4), "attention_mask": torch.ones(8, 6)}
    call["attention_mask"][:, 5] = 0
    report = equiv.check(model, update, call, dtype=F64)
    assert report.holds
    assert report.superposition is not None
    assert str(report.superposition.verdict) == "holds"
    tokens = {(row.layer, row.site): row.tokens for row in report.rows}
    assert tokens[0, "block_out"] == 40 and tokens[2, "cross_out"] == 32
    assert "(0 to 1 the encoder's, 2 to 3 the decoder's)" in str(report).replace(
        "\n", " "
    )
    assert (0, "cross_out") not in tokens
    fitted = {(fit.layer, fit.site) for fit in report.fits}
    assert (3, "cross_out") in fitted and (0, "cross_out") not in fitted
    rungs = {(row.site, row.rung) for row in report.behaviour}
    assert {("cross_out", "exact oracle"), ("block_out", "vector")} <= rungs
    assert report.spectra and {s.layer for s in report.spectra} == {0, 1, 2, 3}


def test_setting_the_last_stream_to_the_tuned_one_leaves_nothing() -> None:
    model = transformer("t5", seed=10)
    update = equiv.Update.random(model, 0.05, seed=0).restricted(names="*.block.*")
    report = equiv.check(
        model, update, several(model, 4), sites=("block_out",), dtype=F64
    )
    (exact,) = [row for row in report.behaviour if row.rung == "exact oracle"]
    assert exact.recovered is not None and exact.recovered > 1 - 1e-9


def test_a_pattern_stands_for_sites_of_either_stack() -> None:
    model = transformer("t5", seed=11)
    update = equiv.Update.random(model, 0.05, seed=0)
    found = equiv.shifts(model, update, example(model), sites=("*oss_out", "block*"))
    keys = [(shift.layer, shift.site) for shift in found]
    assert keys.count((2, "cross_out")) == 1 and (0, "cross_out") not in keys
    assert {layer for layer, site in keys if site == "block_out"} == {0, 1, 2, 3}


def test_heads_are_those_of_the_stack() -> None:
    model = transformer("bart", seed=11, decoder_attention_heads=4)
    update = equiv.Update.random(model, 0.05, seed=0)
    found: Any = equiv.fit_sequential(
        model, update, several(model, 2), site="attn_heads", form="heads", dtype=F64
    )
    shapes = {layer: tuple(own.offset.shape) for (layer, _), own in found.items()}
    assert shapes == {0: (2, 8), 1: (2, 8), 2: (4, 4), 3: (4, 4)}
