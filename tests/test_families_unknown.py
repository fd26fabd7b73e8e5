"""Families that are in no table: found by their looks, proven, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import equiv
from benchmarks.support_witness import Places, at_scale, central_difference
from equiv.model import discovery, families
from equiv.model.blocks import Blocks
from equiv.model.discovery import discover
from equiv.model.drawn_call import drawn_call
from equiv.model.families import find_blocks
from equiv.model.known_families import TABLE
from equiv.steering.forms.vector import Vector
from equiv.testing.models import EVERY_FAMILY, PAIRED, transformer

_GROUPED: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE: dict[str, Any] = {"vocab_size": 32, "initializer_range": 0.2, "hidden_size": 16}
_ENCODER: dict[str, Any] = {
    **_WIDE,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
EVERY = 7  # sites of a block

# What transformers calls it → settings, and how many sites its second block has.
UNKNOWN: dict[str, tuple[str, dict[str, Any], int]] = {
    "Arcee": ("ForCausalLM", _GROUPED, EVERY),
    "Bloom": ("ForCausalLM", {**_WIDE, "n_layer": 2, "n_head": 2}, EVERY),
    "Exaone4": ("ForCausalLM", _GROUPED, EVERY),
    "GPTBigCode": ("ForCausalLM", {**_WIDE, "n_layer": 2, "n_head": 2}, EVERY),
    "Glm4": ("ForCausalLM", _GROUPED, EVERY),
    "GraniteMoe": ("ForCausalLM", {**_GROUPED, **_MIXTURE}, EVERY - 1),
    "Helium": ("ForCausalLM", _GROUPED, EVERY),
    "Mpt": (
        "ForCausalLM",
        {**_WIDE, "d_model": 16, "n_layers": 2, "n_heads": 2},
        EVERY,
    ),
    "Nemotron": ("ForCausalLM", _GROUPED, EVERY),
    "Olmoe": ("ForCausalLM", {**_GROUPED, **_MIXTURE}, EVERY - 1),
    "Persimmon": ("ForCausalLM", _GROUPED, EVERY),
    "Starcoder2": ("ForCausalLM", _GROUPED, EVERY),
    "FalconMamba": ("ForCausalLM", {**_WIDE, "num_hidden_layers": 2}, 1),
    # Its first block has no attention, and its second is of another make.
    "Lfm2": (
        "ForCausalLM",
        {**_GROUPED, "layer_types": ["conv", "full_attention"]},
        4,
    ),
    "RoFormer": ("Model", {**_ENCODER, "embedding_size": 16}, EVERY),
    "NomicBert": ("Model", _ENCODER, EVERY),
    "Dinov2": ("Model", _IMAGES, EVERY),
    "SiglipVision": ("Model", _IMAGES, EVERY),
    "Beit": ("Model", _IMAGES, 1),  # scales what it adds by a parameter
}


def built(name: str) -> Any:
    kind, settings, _ = UNKNOWN[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{kind}")(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    if "Moe" in name or "moe" in name:
        model.set_experts_implementation("eager")
    return model.double().eval()


def call_of(model: Any) -> Mapping[str, Any]:
    batch = drawn_call(model)
    assert batch is not None
    return batch.arguments


@pytest.mark.parametrize("family", [f for f in EVERY_FAMILY if f not in PAIRED])
def test_what_is_found_is_what_the_table_says(family: str) -> None:
    """The table was read off the models' code, what is found off one run of a block."""
    model = transformer(family, seed=1)
    known, found = find_blocks(model), discover(model)
    assert known is not None and known is not found
    assert (known.path, known.modules) == (found.path, found.modules)
    for layer in range(len(known.modules)):
        assert known.sites_of(layer) == found.sites_of(layer)
    call = call_of(model)
    for site in known.sites_of(1):
        assert torch.equal(*(steered(model, b, site, call) for b in (known, found)))


def steered(model: Any, blocks: Blocks, site: str, call: Mapping[str, Any]) -> Any:
    """What the model returns with its second block steered at a site."""
    from equiv.model.hooks import hook_on
    from equiv.model.sites import model_output

    handle = hook_on(blocks.place(1, site), lambda h: 1.5 * h)
    try:
        with torch.no_grad():
            return model_output(model(**call))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_family_works(name: str) -> None:
    model = built(name)
    assert model.config.model_type not in TABLE
    call = call_of(model)
    blocks = find_blocks(model)
    assert blocks is not None
    assert len(blocks.sites_of(1)) == UNKNOWN[name][2]
    places = Places(blocks.path, {})
    drawn = equiv.Update.random(model, 0.0005, seed=0)
    if name == "RoFormer":  # hands this to every block beside the stream
        drawn = drawn.restricted(names="encoder.layer.*")
    deltas: dict[str, Any] = dict(drawn.deltas)
    base, moved, half = (at_scale(model, places, deltas, call, t) for t in (0, 1, 0.5))
    slope = central_difference(model, places, deltas, call, 0.25)
    found = {
        shift.layer: shift
        for shift in equiv.shifts(
            model, drawn, call, sites=("block_out",), dtype=torch.float64
        )
    }
    for layer, shift in found.items():
        key = layer, "block_out"
        torch.testing.assert_close(shift.base, base[key], rtol=1e-10, atol=1e-11)
        # The difference is of fourth order in 1e-4 of the weights.
        off = (shift.first_order - slope[key]).norm() / slope[key].norm()
        assert float(off) < 1e-6
        missed = [
            float((at[key] - base[key] - t * shift.first_order).norm())
            for t, at in ((1, moved), (0.5, half))
        ]
        assert abs(math.log2(missed[0] / missed[1]) - 2) < 0.1
    v = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    with equiv.steer(model, {(1, "block_out"): Vector(v)}):
        landed = at_scale(model, places, {}, call, 0.0)[1, "block_out"]
    torch.testing.assert_close(landed - base[1, "block_out"], v.expand_as(landed))


def test_tables_that_code_hides_from_gradients_are_still_found() -> None:
    model = built("RoFormer")
    name = "encoder.embed_positions.weight"
    update = {name: torch.ones_like(model.get_parameter(name))}
    with pytest.raises(equiv.UnsupportedModelError, match=rf"{name}.*beside the str"):
        list(equiv.shifts(model, update, call_of(model)))


def test_sites_of_blocks_of_two_makes() -> None:
    """Default sites are those of every block; others are refused where they lack."""
    model = built("Lfm2")
    blocks = find_blocks(model)
    assert blocks is not None and blocks.sites == ("mlp_in", "mlp_out", "block_out")
    assert set(blocks.sites_of(0)) - set(blocks.sites_of(1)) >= {"attn_out"}
    update = equiv.Update.random(model, 0.001, seed=0)
    found = {shift.site for shift in equiv.shifts(model, update, call_of(model))}
    assert found == set(blocks.sites)
    with pytest.raises(equiv.SiteError, match="has no attn_out"):
        list(equiv.shifts(model, update, call_of(model), sites=("attn_out",)))


def _albert() -> Any:
    from transformers import AlbertConfig, AlbertModel

    return AlbertModel(AlbertConfig(**{**_ENCODER, "embedding_size": 8}))


def _switch() -> Any:
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    sizes: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_sparse_encoder_layers": 0,
    }
    config = SwitchTransformersConfig(vocab_size=32, **sizes)
    return SwitchTransformersEncoderModel(config)


def _mae() -> Any:
    from transformers import ViTMAEConfig, ViTMAEModel

    # Four of sixteen patches are kept: two draws that agree are one in thousands.
    return ViTMAEModel(ViTMAEConfig(**{**_IMAGES, "image_size": 16}))


def _xlnet() -> Any:
    from transformers import XLNetConfig, XLNetModel

    return XLNetModel(
        XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=24)
    )


def _sound() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, conv_dim=[16] * 7))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_albert, "run 2 times"),  # one block, used again and again
        (_switch, "its output is another one"),  # later blocks get the first one's bias
        (_mae, "its output is another one"),  # draws what it sees anew in each run
        (_xlnet, r"its blocks turn \(6, 2, 16\)"),  # tokens first
        (_sound, "what it reads is not known"),
    ],
)
def test_what_cannot_be_proven_is_refused_by_name(make: Any, says: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    kind, family = type(model).__name__, model.config.model_type
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(equiv.UnsupportedModelError, match=says) as caught,
    ):
        torch.manual_seed(0)
        find_blocks(model)
    assert kind in str(caught.value) and repr(family) in str(caught.value)
    assert "known_families.TABLE" in str(caught.value)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = transformer("llama")
    model.config.model_type = "other"
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(equiv.UnsupportedModelError, match="no list of equal blocks"):
        find_blocks(model)


@torch.no_grad()
def test_looking_leaves_the_model_as_it_was() -> None:
    model = transformer("granite", seed=3).train()
    model.config.model_type = "other"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    noise = torch.random.get_rng_state()
    find_blocks(model)
    assert torch.equal(noise, torch.random.get_rng_state())
    assert model.training and model.model.layers[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())


def test_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("gptj", seed=4)
    model.config.model_type = "other"
    first = find_blocks(model)
    monkeypatch.setattr(discovery, "recorded", None)
    assert families.find_blocks(model) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_looked_at_in_float32(dtype: torch.dtype) -> None:
    model = transformer("gemma2", seed=5, dtype=dtype)
    known, found = find_blocks(model), discover(model)
    assert known is not None and known.sites_of(1) == found.sites_of(1)
