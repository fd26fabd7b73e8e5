"""Steering as an adapter that PEFT itself loads, and its adapters as steering."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import exact
import pytest
import torch
import witness
from exact import F64, draw, logits, steered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import equiv
from equiv.testing.models import transformer
from equiv.testing.strategies import seeds

peft = pytest.importorskip("peft")
# PEFT says of every layer without a bias that the new one cannot be merged into it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected that the base layer has no bias:UserWarning",
    "ignore:`lora_bias=True` was passed but:UserWarning",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "bert")
SITES = ("attn_heads", "mlp_in", "mlp_hidden", "attn_out", "mlp_out", "block_out")


def reloaded(model: Any, folder: Path) -> Any:
    """The base, afresh, with the adapter that PEFT reads from a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def vectors(layers: tuple[int, ...] = (0, 1)) -> dict[Any, equiv.Steering]:
    return {
        (layer, site): draw("vector", 16, exact.width(None, site), 1, layer)
        for layer in layers
        for site in ("attn_out", "mlp_out", "mlp_in")
    }


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "bert"])
def test_fixed_vectors_are_a_beft(family: str, tmp_path: Path) -> None:
    model = transformer(family, seed=1)
    equiv.to_weights(vectors(), model).save_peft(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapted = reloaded(model, tmp_path)
    assert adapted.peft_config["default"].peft_type == "BEFT"
    exact.close(logits(adapted), steered(model, vectors()))
    stored = weights_of(tmp_path)
    assert all(name.endswith(".beft_bias") for name in stored)
    assert all(tensor.shape[0] == 1 for tensor in stored.values())
    listed = {
        f"base_model.model.{m}.beft_bias" for m in config_of(tmp_path)["target_modules"]
    }
    assert listed == set(stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_a_lora(family: str, tmp_path: Path) -> None:
    """Ranks that differ, biases, GPT-2's transposed layers, grouped queries."""
    model = transformer(family, seed=2)
    steering: dict[Any, equiv.Steering] = {
        (0, "mlp_in"): draw("linear", 16, 16, 1, 0),
        (0, "mlp_hidden"): draw("affine", 24, 24, 3, 1),
        (1, "attn_heads"): draw("linear", 16, 16, 2, 2),
        (1, "mlp_hidden"): draw("vector", 24, 24, 1, 3),
        (1, "mlp_in"): draw("heads", 16, 16, 1, 0),  # of full rank
    }
    if family not in exact.NORMED:
        steering[0, "attn_out"] = draw("loreft", 16, 16, 2, 4)
        steering[1, "mlp_out"] = draw("identity", 16, 16, 2, 5)
    equiv.to_weights(steering, model).save_peft(tmp_path)
    adapted = reloaded(model, tmp_path)
    assert adapted.peft_config["default"].peft_type == "LORA"
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            assert module.scaling == {"default": 1.0}
    exact.close(logits(adapted), steered(model, steering))


def test_without_biases_the_lora_has_none_and_merges(tmp_path: Path) -> None:
    model = transformer("llama", seed=3)
    steering: dict[Any, equiv.Steering] = {
        (0, "mlp_out"): draw("linear", 16, 16, 2, 0),
        (1, "attn_heads->attn_out"): draw("linear", 16, 16, 3, 1),
    }
    edit = equiv.to_weights(steering, model)
    edit.save_peft(tmp_path)
    config = config_of(tmp_path)
    assert config["lora_bias"] is False and config["r"] == 3
    assert config["rank_pattern"] == {"model.layers.0.mlp.down_proj": 2}
    merged = reloaded(model, tmp_path).merge_and_unload()
    expected = dict(edit.apply(model).named_parameters())
    for name, parameter in merged.named_parameters():
        witness.close(parameter, expected[name])


def test_a_base_with_biases_takes_all_by_merging(tmp_path: Path) -> None:
    model = transformer("gpt2", seed=4)
    for number, form in enumerate(("vector", "affine")):
        steering = {(0, "mlp_out"): draw(form, 16, 16, 2, 0)}
        edit = equiv.to_weights(steering, model)
        edit.save_peft(tmp_path / str(number))
        merged = reloaded(model, tmp_path / str(number)).merge_and_unload()
        exact.close(logits(merged), logits(edit.apply(model)))


@pytest.mark.parametrize("form", ["vector", "affine"])
def test_only_the_layers_that_are_listed(form: str, tmp_path: Path) -> None:
    """PEFT shortens long lists of names: layer 2 must not become 12 or 22."""
    model = transformer("llama", seed=5, num_hidden_layers=24)
    layers = (1, 2, *range(4, 24))
    steering = {(layer, "mlp_out"): draw(form, 16, 16, 1, layer) for layer in layers}
    equiv.to_weights(steering, model).save_peft(tmp_path)
    adapted = reloaded(model, tmp_path)
    exact.close(logits(adapted), steered(model, steering))
    names = {
        n.rpartition("model.layers.")[2] for n in config_of(tmp_path)["target_modules"]
    }
    assert names == {f"{layer}.mlp.down_proj" for layer in layers}


@st.composite
def steerings(source: Any) -> tuple[str, int, dict[Any, equiv.Steering]]:
    family, seed = source(st.sampled_from(FAMILIES)), source(seeds())
    found: dict[Any, equiv.Steering] = {}
    for number in range(source(st.integers(1, 4))):
        site = source(st.sampled_from(SITES[:3] if family in exact.NORMED else SITES))
        if family == "bert" and site == "block_out":
            continue  # a LayerNorm's bias, which PEFT has no adapter for
        forms = ("vector",) if site == "block_out" else ("vector", *exact.LINEAR)
        form, d = source(st.sampled_from(forms)), exact.width(None, site)
        rank = source(st.integers(1, 3))
        found[source(st.integers(0, 1)), site] = draw(form, d, d, rank, seed + number)
    return family, seed, found


@given(drawn=steerings())
@settings(
    max_examples=40 * witness.SWEEP,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_peft_reads_is_the_steering_and_comes_back(
    drawn: tuple[str, int, dict[Any, equiv.Steering]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    family, seed, steering = drawn
    if not steering:
        return
    model = transformer(family, seed=seed % 50)
    folder = tmp_path_factory.mktemp("adapter")
    equiv.to_weights(steering, model).save_peft(folder)
    expected = steered(model, steering)
    adapted = reloaded(model, folder)
    exact.close(logits(adapted), expected)
    for source in (folder, str(folder), adapted, equiv.Update.from_peft(str(folder))):
        exact.close(steered(model, equiv.to_steering(source, model)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_stored_in_no_half(dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformer("llama", seed=6, dtype=dtype)
    steering = {(0, "mlp_out"): draw("affine", 16, 16, 2, 0)}
    equiv.to_weights(steering, model).save_peft(tmp_path)
    assert {t.dtype for t in weights_of(tmp_path).values()} == {torch.float32}
    with torch.no_grad():
        found = reloaded(model, tmp_path)(exact.IDS).logits
        with equiv.steer(model, steering):
            expected = model(exact.IDS).logits
    # Two ways to round: in each layer a few times by eps/2, and growing on the way.
    off = float((found - expected).double().norm() / expected.double().norm())
    assert off <= 2**4 * torch.finfo(dtype).eps


def test_files_say_which_base(tmp_path: Path) -> None:
    model = transformer("llama", seed=7)
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base", dtype=F64).eval()
    equiv.to_weights(vectors(), loaded).save_peft(tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=F64
    )
    exact.close(logits(found.to(F64).eval()), steered(model, vectors()))


# ---- adapters of others


def trained(model: Any, config: Any, seed: int) -> Any:
    """An adapter with random weights, as training leaves them."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    g = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g, dtype=F64)
    return adapted.eval()


CONFIGS = {
    "BEFT on values, outputs and MLP": lambda: peft.BeftConfig(
        target_modules=["v_proj", "o_proj", "down_proj"]
    ),
    "LoRA with biases and scale": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, lora_bias=True, target_modules=["o_proj", "down_proj"]
    ),
    "rsLoRA with patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=3,
        lora_bias=True,
        use_rslora=True,
        rank_pattern={"o_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 11},
        target_modules=["o_proj", "down_proj"],
    ),
    "LoRA": lambda: peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["o_proj", "down_proj"]
    ),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["o_proj"]),
    "IA3": lambda: peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("kind", ["LoRA with biases and scale", "BEFT"])
def test_the_base_may_be_the_model_inside(kind: str) -> None:
    """PEFT puts its layers into the base that it is given."""
    base = transformer("llama", seed=8)
    plain = logits(base)
    config = peft.BeftConfig(target_modules=["v_proj", "down_proj"])
    adapted = trained(base, config if kind == "BEFT" else CONFIGS[kind](), 0)
    base, expected = adapted.get_base_model(), logits(adapted)
    found = equiv.to_steering(adapted, base)
    with adapted.disable_adapter():
        exact.close(logits(adapted), plain)
        exact.close(steered(adapted, found), expected)
    with pytest.raises(equiv.UnsupportedModelError, match=r"of peft\.tuners.*unload"):
        equiv.to_weights(found, base)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_others_are_steering(kind: str, tmp_path: Path) -> None:
    model = transformer("llama", seed=8)
    adapted = trained(model, CONFIGS[kind](), 0)
    expected = logits(adapted)
    assert float((expected - logits(model)).abs().max()) > 0.01
    exact.close(steered(model, equiv.to_steering(adapted, model)), expected)
    if kind in ("DoRA", "IA3"):
        return  # only PEFT can merge these, from a live model
    adapted.save_pretrained(tmp_path)
    for source in (tmp_path, equiv.Update.from_peft(tmp_path)):
        exact.close(steered(model, equiv.to_steering(source, model)), expected)


def test_adapters_that_are_no_steering_are_refused(tmp_path: Path) -> None:
    model = transformer("llama", seed=9)
    adapted = trained(model, peft.LoraConfig(r=2, target_modules="all-linear"), 0)
    adapted.save_pretrained(tmp_path)
    for source in (adapted, tmp_path):
        with pytest.raises(equiv.NoExactFormError, match="has no exact steering form"):
            equiv.to_steering(source, model)


def test_new_biases_fit_no_update_of_the_base() -> None:
    """Elsewhere an update changes what is there, and says so."""
    model = transformer("llama", seed=10)
    adapted = trained(model, peft.BeftConfig(target_modules=["down_proj"]), 0)
    update = equiv.Update.from_peft(adapted)
    assert set(update.deltas) == {
        f"model.layers.{i}.mlp.down_proj.bias" for i in (0, 1)
    }
    with pytest.raises(
        equiv.UpdateMismatchError, match=r"down_proj\.bias`, which Llama"
    ):
        equiv.check(model, adapted, exact.IDS)
    biased = transformer("llama", seed=10, mlp_bias=True)
    adapted = trained(biased, peft.BeftConfig(target_modules=["down_proj"]), 0)
    assert equiv.check(biased, adapted, exact.IDS, forms=(), dtype=F64).derivative_holds


def test_two_active_adapters_add_up() -> None:
    model = transformer("llama", seed=11)
    adapted = trained(model, peft.BeftConfig(target_modules=["down_proj"]), 0)
    adapted.add_adapter(
        "second", peft.BeftConfig(target_modules=["o_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "second" in name:
            parameter.data = torch.ones_like(parameter)
    adapted.base_model.set_adapter(["default", "second"])
    found = equiv.to_steering(adapted, model)
    assert set(found) == {(i, site) for i in (0, 1) for site in ("attn_out", "mlp_out")}
    exact.close(steered(model, found), logits(adapted))


# ---- refusals and whole files


def test_what_peft_has_no_adapter_for_is_refused(tmp_path: Path) -> None:
    model = transformer("bert", seed=12)
    edit = equiv.to_weights({(0, "block_out"): draw("vector", 16, 16, 1, 0)}, model)
    with pytest.raises(
        equiv.NoExactFormError, match=r"LayerNorm` is a LayerNorm, and LoRA"
    ):
        edit.save_peft(tmp_path / "adapter")
    with pytest.raises(equiv.NoExactFormError, match="Nothing is edited"):
        equiv.to_weights({}, model).save_peft(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = equiv.to_weights(vectors(), transformer("llama"))
    edit.save_peft(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(equiv.ArgumentError, match="new or empty folder"):
        edit.save_peft(tmp_path / "adapter")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(equiv.ArgumentError, match="does not exist"):
        edit.save_peft(tmp_path / "no" / "adapter")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        edit.save_peft(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
