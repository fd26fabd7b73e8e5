"""The probe finds every wrong line, and passes every right one."""

import dataclasses
import re
from typing import Any

import pytest
import torch

import equiv
from equiv.model import known_families, probe
from equiv.model.architecture import Architecture
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.probe import Landing, landings
from equiv.model.staged_model import StagedModel
from equiv.testing.models import EVERY_FAMILY, example, transformer

IDS = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 2, 6, 13, 21, 30]])


def landed(model: Any, dtype: torch.dtype = torch.float64) -> list[Landing]:
    with measured(model):
        batches = from_inputs(model, example(model))
        return landings(StagedModel(model, find_blocks(model), batches, dtype))


def entry(family: str) -> Architecture:
    found = known_families.architecture(family, transformer(family).config)
    assert found is not None
    return found


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_site_of_every_family_is_where_it_should_be(family: str) -> None:
    model = transformer(family, seed=1)
    found = landed(model)
    # Sums of a dozen terms in float64.
    assert max(landing.error for landing in found) < 1e-14, found
    blocks = find_blocks(model)
    assert blocks is not None
    probed = {layer for layer, *_ in map(dataclasses.astuple, found)}
    for layer in probed:
        sites = {landing.site for landing in found if landing.layer == layer}
        assert sites == set(blocks.sites_of(layer))
    assert all(landing.holds for landing in landed(model, torch.float32))


@pytest.mark.parametrize(
    "settings",
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
        ("falcon", {"alibi": True}),
        ("qwen2_moe", {"mlp_only_layers": []}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("deepseek_v3", {"q_lora_rank": None}),
    ],
    ids=str,
)
def test_what_a_configuration_chooses(settings: tuple[str, dict[str, Any]]) -> None:
    family, chosen = settings
    found = landed(transformer(family, seed=2, **chosen))
    assert max(landing.error for landing in found) < 1e-14, found


# Lines that are wrong in one thing each: what steering by them would get wrong.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attn_out": "input_layernorm"}, "attn_out"),
    ("llama", {"attn_out": "post_attention_layernorm"}, "attn_out"),
    ("llama", {"mlp_out": "post_attention_layernorm"}, "mlp_out"),
    ("llama", {"mlp": "self_attn.q_proj"}, "mlp_in"),
    ("llama", {"mlp": "post_attention_layernorm"}, "mlp_in"),
    ("llama", {"mlp_projection": "mlp.gate_proj"}, "mlp_hidden"),
    ("llama", {"attn_projection": "self_attn.v_proj"}, "attn_heads"),
    ("llama", {"resid_mid": ("mlp", "input")}, "attn_out"),
    ("llama", {"resid_mid": None}, "attn_heads"),
    ("llama", {"write_scale": "layer_scale"}, "attn_out"),
    ("gemma2", {"attn_out": "self_attn"}, "attn_out"),
    ("gemma2", {"mlp_out": "mlp"}, "mlp_out"),
    ("olmo2", {"resid_mid": ("post_feedforward_layernorm", "input")}, "attn_out"),
    ("granite", {"write_scale": ""}, "attn_out"),
    ("falcon", {"adds_in_place": False}, "mlp_out"),
    ("cohere", {"attn_out": "input_layernorm"}, "mlp_out"),
    ("bert", {"norms_after": None}, "attn_out"),
    ("bert", {"attn_out": "attention.output"}, "attn_out"),
    ("bert", {"mlp_out": "output"}, "mlp_out"),
]


@pytest.mark.parametrize(("family", "change", "site"), WRONG, ids=str)
def test_a_wrong_line_is_refused_by_name(
    family: str, change: dict[str, Any], site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(entry(family), **change)
    monkeypatch.setitem(known_families.TABLE, family, wrong)
    model = transformer(family, seed=3)
    for layer in find_blocks(model).modules:  # type: ignore[union-attr]
        vars(layer)["layer_scale"] = 0.5
    update = equiv.Update.random(model, 0.01, seed=0)
    named = rf"{family}.*{site} of block 0.*off by .*TABLE"
    with pytest.raises(equiv.UnsupportedModelError, match=re.compile(named, re.S)):
        list(equiv.shifts(model, update, IDS))


def test_a_model_of_another_make_is_probed_again() -> None:
    """One class and configuration, but a block that somebody has changed."""
    model = transformer("llama", seed=4)
    update = equiv.Update.random(model, 0.01, seed=0)
    next(iter(equiv.shifts(model, update, IDS)))

    kind: Any = type(model.model.layers[1])

    class Doubled(kind):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().forward(*args, **kwargs)

    model.model.layers[1].__class__ = Doubled
    with pytest.raises(equiv.UnsupportedModelError, match="of block 1"):
        list(equiv.shifts(model, update, IDS))


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    plain = probe.landings
    monkeypatch.setattr(probe, "_PROVEN", set())
    monkeypatch.setattr(probe, "landings", lambda cut: counted.append(1) or plain(cut))
    for seed in range(3):
        model = transformer("gpt2", seed=seed)
        list(equiv.shifts(model, equiv.Update.random(model, 0.01, seed=0), IDS))
    assert len(counted) == 1


@torch.no_grad()
def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = transformer("falcon", seed=5)
    before = model(input_ids=IDS).logits
    landed(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_done_between_blocks_is_refused() -> None:
    model = transformer("llama", seed=6)
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    update = equiv.Update.random(model, 0.01, seed=0)
    with pytest.raises(equiv.UnsupportedModelError, match="between its blocks"):
        list(equiv.shifts(model, update, IDS))
