"""Adapters: the same update however it is handed over, and the base stays the base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from torch import nn

import equiv
from equiv.testing.models import transformer
from equiv.update.low_rank import LowRank
from equiv.update.sources import resolve

peft = pytest.importorskip("peft")
IDS = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(0))


def adapted(base: nn.Module, seed: int = 0, **settings: Any) -> Any:
    """The base wrapped, with an adapter that does something."""
    kind = settings.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(base, kind(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    return model.eval()


def merged_difference(base: nn.Module, model: Any) -> dict[str, torch.Tensor]:
    """Merged minus base, in float64, by PEFT alone."""
    merged = copy.deepcopy(model).double().merge_and_unload()
    before = dict(base.double().named_parameters())
    return {n: p.detach() - before[n].detach() for n, p in merged.named_parameters()}


def base_model(dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    return transformer(family, seed=1, dtype=dtype)


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "alpha pattern": {
        "alpha_pattern": {"q_proj": 9},
        "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 1},
    },
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "ia3": {
        "kind": peft.IA3Config,
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_update_is_merged_minus_base(kind: str) -> None:
    model = adapted(base_model(), **KINDS[kind])
    found = witness.dense(equiv.Update.from_peft(model))
    compare(found, merged_difference(base_model(), model))


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, difference in expected.items():
        if name in found:
            # Merging rounds W + ΔW to float32 in some kinds.
            torch.testing.assert_close(found[name], difference, atol=1e-6, rtol=1e-5)
        else:
            assert not difference.any(), name
    assert found.keys() <= expected.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trained_biases_need_a_base_loaded_afresh() -> None:
    """PEFT trains them in place: the base inside the wrapper is no base any more."""
    base = base_model(family="qwen2")
    model = adapted(base, bias="all", target_modules=["q_proj", "v_proj"])
    with pytest.raises(equiv.UpdateError, match="loaded afresh"):
        equiv.check(base, model, IDS)
    with pytest.raises(equiv.UpdateError, match="loaded afresh"):
        equiv.Update.from_peft(model)
    found = witness.dense(resolve(base_model(family="qwen2"), model))
    compare(found, merged_difference(base_model(family="qwen2"), model))
    assert "model.layers.0.self_attn.q_proj.bias" in found


@pytest.mark.parametrize("kind", ["lora", "rslora", "alpha pattern"])
def test_plain_lora_stays_in_factors(kind: str) -> None:
    update = equiv.Update.from_peft(adapted(base_model(), **KINDS[kind]))
    assert all(isinstance(delta, LowRank) for delta in update.deltas.values())
    assert len(update.deltas) == 14  # seven linear layers in each of two blocks


def test_the_base_is_measured_with_the_adapter_disabled() -> None:
    """PEFT puts its layers into the base: without care the base is the tuned model."""
    plain = base_model()
    base = base_model()
    model = adapted(base)
    through_wrapper = equiv.check(base, model, IDS, dtype=torch.float64)
    by_itself = equiv.check(
        plain, equiv.Update.from_peft(model), IDS, dtype=torch.float64
    )
    assert through_wrapper.derivative_holds
    for a, b in zip(through_wrapper.rows, by_itself.rows, strict=True):
        assert b.norm_exact > 0
        assert a.norm_exact == pytest.approx(b.norm_exact, rel=1e-9)
        assert a.norm_base == pytest.approx(b.norm_base, rel=1e-9)
        assert a.remainder == pytest.approx(b.remainder, rel=1e-6)
    call = {"input_ids": IDS}
    tuned = model.merge_and_unload()
    expected = witness.activations(tuned.double(), witness.parameters(tuned), call)
    before = witness.activations(plain.double(), witness.parameters(plain), call)
    exact = float((expected["logits"] - before["logits"]).norm())
    row = next(r for r in through_wrapper.rows if r.site == "logits")
    assert row.norm_exact == pytest.approx(exact, rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_the_wrapper_comes_back_as_it_was(kind: str) -> None:
    base = base_model()
    model = adapted(base, **KINDS[kind])
    before = model(input_ids=IDS).logits
    names = [sorted(vars(module)) for module in model.modules()]
    equiv.check(base, model, IDS, forms=())
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert names == [sorted(vars(module)) for module in model.modules()]
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=IDS).logits, before)


def test_factors_are_combined_in_float64() -> None:
    """In bfloat16 the product of the factors would be off by parts in a hundred."""
    base = base_model(torch.bfloat16)
    model = adapted(base)
    model.to(torch.bfloat16)
    found = witness.dense(equiv.Update.from_peft(model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (w["default"].weight.detach().double() for w in (layer.lora_A, layer.lora_B))
    expected = (b @ a) * (5 / 3)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=0)
    coarse = layer.get_delta_weight("default").detach().double()
    assert float((coarse - expected).norm() / expected.norm()) > 1e-3
    report = equiv.check(base, model, IDS, forms=())
    assert report.derivative_holds, report.reason


def test_factors_and_dense_give_the_same_shifts() -> None:
    base, model = base_model(torch.float64), adapted(base_model(torch.float64))
    update = equiv.Update.from_peft(model)
    full = equiv.Update.from_dict(witness.dense(update))
    for a, b in zip(
        equiv.shifts(base, update, IDS, dtype=torch.float64),
        equiv.shifts(base, full, IDS, dtype=torch.float64),
        strict=True,
    ):
        for field in ("exact", "first_order", "midpoint", "local_first_order"):
            witness.close(getattr(a, field), getattr(b, field))


def test_conv1d_is_the_right_way_round() -> None:
    base = base_model(torch.float64, "gpt2")
    model = adapted(
        transformer("gpt2", seed=1, dtype=torch.float64),
        fan_in_fan_out=True,
        target_modules=["c_attn", "c_fc"],
    )
    expected = merged_difference(transformer("gpt2", seed=1), model)
    update = equiv.Update.from_peft(model)
    for name, delta in witness.dense(update).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-9, atol=1e-10)
    tuned = witness.tuned_activations(base, update, {"input_ids": IDS})
    s = equiv.shifts(base, update, IDS, dtype=torch.float64)[1, "block_out"]
    torch.testing.assert_close(s.base + s.exact, tuned[1, "block_out"])


def test_two_active_adapters_add_up() -> None:
    model = adapted(base_model(torch.float64))
    model.add_adapter(
        "second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    model.base_model.set_adapter(["default", "second"])
    expected = merged_difference(base_model(), model)
    for name, delta in witness.dense(equiv.Update.from_peft(model)).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-7)


def test_from_a_directory(tmp_path: Path) -> None:
    model = adapted(base_model(), use_rslora=True, alpha_pattern={"q_proj": 9})
    model.save_pretrained(tmp_path)
    live, stored = equiv.Update.from_peft(model), equiv.Update.from_peft(str(tmp_path))
    assert live.deltas.keys() == stored.deltas.keys()
    for name, delta in witness.dense(live).items():
        torch.testing.assert_close(witness.dense(stored)[name], delta)
    report = equiv.check(base_model(), str(tmp_path), IDS, forms=())
    assert report.derivative_holds


EMBEDDINGS: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"]}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_lora_on_embeddings_stays_in_factors(tmp_path: Path) -> None:
    model = adapted(base_model(torch.float64), **EMBEDDINGS)
    model.save_pretrained(tmp_path)
    expected = merged_difference(base_model(torch.float64), model)
    with pytest.raises(equiv.UpdateError, match=r"embed_tokens.base_layer"):
        equiv.Update.from_peft(str(tmp_path))  # whose weights are these?
    other = transformer("llama", seed=5)
    with pytest.raises(equiv.UpdateError, match=r"embed_tokens.base_layer"):
        equiv.check(other, str(tmp_path), IDS)
    for source in (model, str(tmp_path)):
        base = base_model(torch.float64)
        update = resolve(base, source)
        assert len(update.deltas) == 3
        assert all(isinstance(delta, LowRank) for delta in update.deltas.values())
        report = equiv.check(base, update, IDS, dtype=torch.float64, forms=())
        found = witness.dense(update)
        for name, delta in found.items():
            torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-8)
        assert report.derivative_holds


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_directory_does_not_say_which_layers_are_transposed(tmp_path: Path) -> None:
    """GPT-2's square c_proj is a Conv1D, its lm_head is not: one flag for both."""
    made = transformer("gpt2", seed=1, tie_word_embeddings=False)
    model = adapted(made, target_modules=["attn.c_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    base = transformer("gpt2", seed=1, tie_word_embeddings=False)
    live, stored = resolve(base, model), resolve(base, str(tmp_path))
    assert live.deltas.keys() == stored.deltas.keys()
    for name, delta in witness.dense(live).items():
        torch.testing.assert_close(witness.dense(stored)[name], delta)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_a_tied_weight_is_refused(
    kind: str, module: str, tmp_path: Path
) -> None:
    """PEFT adds to one of two modules; an update of the weight would move both."""
    base = transformer("llama", seed=1, tie_word_embeddings=True)
    model = adapted(base, target_modules=[module], use_dora=kind == "dora")
    with pytest.raises(equiv.UpdateError, match=f"`{module}`|`model.{module}`"):
        equiv.check(base, model, IDS)
    if kind == "lora":
        model.save_pretrained(tmp_path)
        fresh = transformer("llama", seed=1, tie_word_embeddings=True)
        with pytest.raises(equiv.UpdateError, match="tied to another module"):
            equiv.check(fresh, str(tmp_path), IDS)


def test_what_is_stored_beside_the_factors_is_not_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted(base_model()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    extra = "base_model.model.model.embed_tokens.weight"
    save_file({**weights, extra: torch.ones(32, 16)}, path)
    with pytest.raises(equiv.UpdateError, match=r"embed_tokens.*only PEFT can merge"):
        equiv.check(base_model(), str(tmp_path), IDS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_other_kinds_are_merged_in_float64(kind: str) -> None:
    """In bfloat16 most of a small difference would be rounded away."""
    base = base_model(torch.bfloat16)
    model = adapted(base, **KINDS[kind])
    found = witness.dense(equiv.Update.from_peft(model))
    expected = merged_difference(base_model(torch.bfloat16), model)
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-9, atol=1e-12)


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    adapted(base_model()).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(equiv.FileFormatError, match="not a whole safetensors file"):
        equiv.check(base_model(), str(tmp_path), IDS)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(equiv.FileFormatError, match="Only safetensors are read"):
        equiv.check(base_model(), str(tmp_path), IDS)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(equiv.FileFormatError, match="is not JSON"):
        equiv.check(base_model(), str(tmp_path), IDS)


def test_a_merged_adapter_is_refused() -> None:
    model = adapted(base_model())
    model.merge_adapter()
    with pytest.raises(equiv.UpdateError, match="merged into its base"):
        equiv.check(base_model(), model, IDS)
    with pytest.raises(equiv.EquivError, match=r"unmerge_adapter"):
        equiv.check(model.get_base_model(), {"lm_head.weight": torch.ones(32, 16)}, IDS)


def test_what_cannot_be_merged_is_refused() -> None:
    model = peft.get_peft_model(
        base_model(),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(equiv.UpdateError, match="cannot be merged"):
        equiv.check(base_model(), model, IDS)
