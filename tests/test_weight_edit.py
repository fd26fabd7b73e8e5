"""A weight edit as an object: the copy, checkpoints, updates, other models, words."""

import copy
from pathlib import Path
from typing import Any

import exact
import pytest
import torch
import witness
from exact import F64, block, changed, draw, logits, steered

import equiv
from equiv.testing.models import FAMILIES, transformer

# ---- the copy


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = transformer(family, seed=7)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    steering = {
        (layer, site): draw(
            "affine", exact.width(model, site), exact.width(model, site), 2, 5
        )
        for layer in (0, 1)
        for site in ("attn_heads", "mlp_in", "mlp_hidden")
    }
    edited = equiv.to_weights(steering, model).apply(model)
    for parameter in edited.parameters():
        parameter.data.zero_()  # the copy shares nothing
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training is edited.training is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = transformer("gpt2", seed=8, dtype=dtype)
    steering = draw("affine", 16, 16, 2, 5)
    assert isinstance(steering, equiv.Affine) and steering.bias is not None
    edited = equiv.to_weights({(0, "mlp_out"): steering}, model).apply(model)
    old, new = (block(x, 0).mlp.c_proj for x in (model, edited))
    a = torch.eye(16, dtype=F64) + steering.up @ steering.down
    torch.testing.assert_close(
        new.weight, (old.weight.double() @ a.T).to(dtype), rtol=0, atol=0
    )
    bias = a @ old.bias.double() + steering.bias
    torch.testing.assert_close(new.bias, bias.to(dtype), rtol=0, atol=0)
    assert new.weight.dtype == new.bias.dtype == dtype


def test_generation_is_the_same() -> None:
    model = transformer("llama", seed=9)
    steering = {(0, "block_out"): draw("vector", 16, 16, 1, 2)}
    steering[1, "attn_out"] = draw("loreft", 16, 16, 2, 3)
    call = {"input_ids": exact.IDS, "max_new_tokens": 8, "do_sample": False}
    call |= {"attention_mask": torch.ones_like(exact.IDS), "pad_token_id": 0}
    with equiv.steer(model, steering):
        expected = model.generate(**call)
    edited: Any = equiv.to_weights(steering, model).apply(model)
    assert torch.equal(edited.generate(**call), expected)
    assert not torch.equal(model.generate(**call), expected)


# ---- checkpoints

STORED = {
    "llama": ("block_out", "mlp_in", "attn_out", "attn_heads"),
    "qwen3": ("attn_out", "attn_heads"),
    "gemma2": ("attn_heads",),
    "olmo2": ("attn_heads",),
    "gpt2": ("block_out", "mlp_in", "attn_out", "attn_heads"),
    "bert": ("block_out", "mlp_in", "attn_out", "resid_mid"),
}
LOST = {
    "mistral": ("block_out", "attn_out", "mlp_in", "attn_heads", "mlp_hidden"),
    "qwen2": ("block_out", "attn_out"),
    "qwen3": ("block_out", "mlp_in"),
    "gemma2": ("mlp_hidden", "mlp_in"),
    "olmo2": ("mlp_hidden", "mlp_in"),
}


def load(model: Any, path: Path) -> Any:
    # `to`: the rotary tables' frequencies too, which a loaded model has in float32.
    return type(model).from_pretrained(path, dtype=F64).to(F64).eval()


@pytest.mark.parametrize(("family", "sites"), STORED.items())
def test_new_biases_come_back_from_a_checkpoint(
    family: str, sites: tuple[str, ...], tmp_path: Path
) -> None:
    model = transformer(family, seed=10)
    for site in sites:
        steering = {(1, site): draw("vector", 16, exact.width(model, site), 1, 4)}
        edited: Any = equiv.to_weights(steering, model).apply(model)
        edited.save_pretrained(tmp_path / site)
        loaded = load(model, tmp_path / site)
        assert changed(edited, loaded) == set()
        again = equiv.to_steering(tmp_path / site, model)
        exact.close(steered(model, again), steered(model, steering))
        exact.close(logits(loaded), steered(model, steering))
        before = dict(model.named_parameters())
        new = {n: p for n, p in edited.named_parameters() if n not in before}
        path, _ = witness.PLACES[family]
        first = [p for name, p in new.items() if name.startswith(f"{path}.0.")]
        assert not any(bool(p.any()) for p in first)
        assert bool(first) == (family not in ("gpt2", "bert"))


@pytest.mark.parametrize(("family", "sites"), LOST.items())
def test_a_bias_that_a_checkpoint_would_lose_is_not_saved(
    family: str, sites: tuple[str, ...], tmp_path: Path
) -> None:
    model = transformer(family, seed=10)
    for site in sites:
        steering = {(1, site): draw("vector", 16, exact.width(model, site), 1, 4)}
        edit = equiv.to_weights(steering, model)
        assert "no setting of the config keeps the new biases" in repr(edit)
        edited: Any = edit.apply(model)
        assert len(changed(model, edited)) == len(edit.deltas)
        exact.close(logits(copy.deepcopy(edited)), steered(model, steering))
        words = r"has no setting for `model\.layers\.1\..*bias`.*save_peft"
        with pytest.raises(equiv.NoExactFormError, match=words):
            edited.save_pretrained(tmp_path / "edited")
        assert edited.config.to_dict() == model.config.to_dict()
        # That it would be lost is so: transformers leaves it out.
        type(edited).save_pretrained(edited, tmp_path / site)
        exact.close(logits(load(model, tmp_path / site)), logits(model))
    linear = {(1, "mlp_hidden"): draw("linear", 24, 24, 2, 4)}  # no bias, no trouble
    edited = equiv.to_weights(linear, model).apply(model)
    edited.save_pretrained(tmp_path / "linear")


# ---- the edit itself


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_what_is_there_is_an_update(family: str) -> None:
    model = transformer(family, seed=11)
    kind = "affine" if family in ("gpt2", "bert") else "linear"
    steering = {
        (layer, site): draw(
            kind, exact.width(model, site), exact.width(model, site), 2, 5
        )
        for layer in (0, 1)
        for site in ("attn_heads", "mlp_in", "mlp_hidden")
    }
    update = equiv.to_weights(steering, model).update
    tuned = witness.tuned_activations(model, update, {"input_ids": exact.IDS})
    exact.close(tuned["logits"], steered(model, steering))


def test_a_new_bias_is_no_update() -> None:
    model = transformer("llama")
    edit = equiv.to_weights({(0, "mlp_out"): draw("vector", 16, 16, 1, 0)}, model)
    words = r"has no `model\.layers\.0\.mlp\.down_proj\.bias`.*`apply` or `save_peft`"
    with pytest.raises(equiv.NoExactFormError, match=words):
        _ = edit.update
    assert list(edit.deltas) == ["model.layers.0.mlp.down_proj.bias"]


def test_what_adds_nothing_is_no_edit() -> None:
    model = transformer("gemma2", seed=12)
    nothing = {
        (0, "block_out"): equiv.LowRankMLP.zero(16),
        (1, "mlp_out"): equiv.Vector(torch.zeros(16)),
        (1, "mlp_in"): equiv.Affine(torch.ones(1, 16), torch.zeros(16, 1)),
    }
    edit = equiv.to_weights(nothing, model)
    assert repr(edit) == "WeightEdit of a Gemma2ForCausalLM:\n  nothing"
    assert torch.equal(logits(edit.apply(model)), logits(model))


def test_an_edit_says_what_it_is() -> None:
    model = transformer("qwen3", num_hidden_layers=5)
    steering: dict[Any, equiv.Steering] = {
        (layer, "attn_out"): draw("affine", 16, 16, 2, layer) for layer in (0, 1, 2, 4)
    }
    steering[3, "mlp_hidden"] = draw("heads", 24, 24, 1, 0)
    assert repr(equiv.to_weights(steering, model)).splitlines() == [
        "WeightEdit of a Qwen3ForCausalLM:",
        "  layers 0–2, 4: self_attn.o_proj: weight by rank 2 and new bias "
        "(Affine at attn_out)",
        "  layer 3: mlp.down_proj: weight and new bias (Heads at mlp_hidden)",
        "  no setting of the config keeps the new biases in checkpoints",
    ]


def test_another_model_is_refused() -> None:
    model = transformer("llama", seed=13)
    steering = {(0, "mlp_out"): draw("affine", 16, 16, 2, 0)}
    edit = equiv.to_weights(steering, model)
    same = edit.apply(transformer("llama", seed=13))  # another object, same weights
    exact.close(logits(same), steered(model, steering))
    others = [transformer("llama", seed=14), transformer("gpt2"), edit.apply(model)]
    others.append(transformer("llama", seed=13, dtype=torch.float32))
    for other in others:
        with pytest.raises(equiv.UpdateMismatchError, match=r"down_proj` holds other"):
            edit.apply(other)
        with pytest.raises(equiv.UpdateMismatchError, match=r"down_proj` holds other"):
            equiv.to_steering(edit, other)
    block(model, 0).mlp.down_proj.weight.data += 1  # the same object, changed since
    with pytest.raises(equiv.UpdateMismatchError, match="Make the edit anew"):
        edit.apply(model)
