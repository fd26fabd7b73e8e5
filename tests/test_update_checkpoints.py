"""Checkpoints on disk: what they give, what is refused, and what is never read."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from alive import Alive
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import equiv
from equiv.testing.models import transformer
from equiv.update.entries import Deferred
from equiv.update.shards import Shards, open_folder
from equiv.update.sources import resolve


def tuned_of(base: Any, seed: int = 1, names: str = "") -> Any:
    """A copy with parameters moved, all or those with `names` in their name."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if names in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.05 * noise).to(parameter.dtype)
    return tuned


def saved(model: Any, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def expected(base: Any, tuned: Any) -> dict[str, Tensor]:
    before = witness.parameters(base)
    found = {n: p - before[n] for n, p in witness.parameters(tuned).items()}
    return {name: delta for name, delta in found.items() if delta.any()}


def check_equal(update: equiv.Update, wanted: dict[str, Tensor]) -> None:
    assert isinstance(update.deltas, Deferred)
    found = witness.dense(update)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert torch.equal(found[name], delta), name
    norm = sum(float(d.square().sum()) for d in wanted.values()) ** 0.5
    assert update.norm() == pytest.approx(norm, rel=1e-13)


class Bomb:
    """Unpickling this is noticed."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was read')",))


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_are_subtracted(
    shard: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = transformer(family, seed=1, dtype=dtype)
    tuned = tuned_of(base)
    wanted = expected(base, tuned)
    two = saved(tuned, tmp_path / "tuned", shard)
    assert (two / "model.safetensors.index.json").is_file() == (shard == "4KB")
    one = saved(base, tmp_path / "base", shard)
    check_equal(equiv.Update.between(one, str(two)), wanted)
    check_equal(equiv.Update.between(base, two), wanted)
    update = resolve(base, str(two))
    check_equal(update, wanted)
    assert update.source == "fine-tune tuned"
    by_models = equiv.Update.between(base, tuned)
    assert equiv.Update.between(one, two).base_norms == pytest.approx(
        by_models.base_norms, rel=1e-13
    )


def test_only_what_differs_is_in_the_update(tmp_path: Path) -> None:
    base = transformer("llama", seed=1, dtype=torch.float32)
    tuned = tuned_of(base, names="layers.1.mlp")
    one, two = saved(base, tmp_path / "one"), saved(tuned, tmp_path / "two")
    update = equiv.Update.between(one, two)
    assert len(update.deltas) == 3
    check_equal(update, expected(base, tuned))
    with pytest.raises(equiv.UpdateError, match="equal everywhere"):
        equiv.Update.between(one, saved(base, tmp_path / "three"))


def test_a_check_from_folders_is_the_check_of_the_models(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    tuned = tuned_of(base)
    folder = saved(tuned, tmp_path / "tuned")
    ids = torch.arange(16).reshape(2, 8)
    for update in (str(folder), equiv.Update.between(base, folder)):
        by_disk = equiv.shifts(base, update, ids, dtype=torch.float64)
        by_model = equiv.shifts(base, tuned, ids, dtype=torch.float64)
        for a, b in zip(by_disk, by_model, strict=True):
            assert torch.equal(a.exact, b.exact)
            assert torch.equal(a.first_order, b.first_order)


def test_a_sum_of_a_folder_and_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformer("llama", seed=1, dtype=torch.float32)
    tuned = tuned_of(base)
    folder = saved(tuned, tmp_path / "tuned")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "lora")
    lora = equiv.Update.from_peft(tmp_path / "lora", base)
    total = equiv.Update.between(base, folder) - 0.5 * lora
    wanted = expected(base, tuned)
    for name, delta in witness.dense(equiv.Update.from_peft(model)).items():
        wanted[name] = wanted[name] - 0.5 * delta
    for name, delta in witness.dense(resolve(base, total)).items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-13, atol=1e-15)
    assert total.source == "fine-tune tuned − 0.5 × LoRA adapter lora"


def test_a_training_run_s_checkpoint(tmp_path: Path) -> None:
    """Optimizer, scheduler and random states lie beside the weights, as pickles."""
    base = transformer("llama", seed=1, dtype=torch.float32)
    tuned = tuned_of(base)
    folder = saved(tuned, tmp_path / "run" / "checkpoint-500")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    (folder / "trainer_state.json").write_text("{}")
    check_equal(resolve(base, str(folder)), expected(base, tuned))
    saved(tuned, tmp_path / "run" / "checkpoint-1000")
    with pytest.raises(equiv.FileFormatError, match=r"Pass one.*checkpoint-1000"):
        resolve(base, str(tmp_path / "run"))


def test_a_training_run_s_checkpoint_of_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformer("llama", seed=1, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    folder = tmp_path / "checkpoint-5"
    model.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    live = witness.dense(equiv.Update.from_peft(model))
    for path in (folder, folder / "adapter_model.safetensors"):
        found = witness.dense(resolve(base, str(path)))
        assert found.keys() == live.keys()
        for name, delta in live.items():
            torch.testing.assert_close(found[name], delta)
    with pytest.raises(equiv.UpdateError, match="is an adapter"):
        equiv.Update.between(folder, folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-2.bin"])
def test_pickles_are_refused_with_the_way_to_convert_them(
    name: str, tmp_path: Path
) -> None:
    base = transformer("llama", seed=1)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(equiv.FileFormatError, match=r"pickle.*save_pretrained"):
        resolve(base, str(tmp_path))
    with pytest.raises(equiv.FileFormatError, match=r"pickle.*save_pretrained"):
        resolve(base, str(tmp_path / name))


def test_parts_of_distributed_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "global_step500").mkdir()
    with pytest.raises(equiv.FileFormatError, match="zero_to_fp32"):
        equiv.Update.between(tmp_path, tmp_path)


def test_resized_embeddings_are_said_to_be_so(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(35)
    one, two = saved(base, tmp_path / "one"), saved(tuned, tmp_path / "two")
    words = r"`.*` has shape \(32, 16\) in base and \(35, 16\) in tuned. Resized"
    for first, second in ((base, tuned), (base, two), (one, two)):
        with pytest.raises(equiv.UpdateMismatchError, match=words) as caught:
            equiv.Update.between(first, second)
        assert "resize_token_embeddings(35)" in str(caught.value)
    base.resize_token_embeddings(35)
    assert len(equiv.Update.between(base, two).deltas) == 2  # the rows that are new


@pytest.mark.parametrize("copies", [False, True])
def test_tied_weights_are_passed_once(copies: bool, tmp_path: Path) -> None:
    base = transformer("llama", seed=1, tie_word_embeddings=True)
    tuned = tuned_of(base)
    one, two = saved(base, tmp_path / "one"), saved(tuned, tmp_path / "two")
    if copies:  # older writers stored the head as well
        weights = load_file(two / "model.safetensors")
        head = weights["model.embed_tokens.weight"].clone()
        save_file({**weights, "lm_head.weight": head}, two / "model.safetensors")
    for update in (
        equiv.Update.between(one, two),
        equiv.Update.between(base, two),
        equiv.Update.between(base, tuned),
    ):
        assert "lm_head.weight" not in update.deltas
        assert update.norm() == pytest.approx(
            equiv.Update.between(base, tuned).norm(), rel=1e-13
        )
    check_equal(equiv.Update.between(base, two), expected(base, tuned))


def test_a_tied_weight_that_was_untied_in_training_is_refused(tmp_path: Path) -> None:
    base = transformer("llama", seed=1, tie_word_embeddings=True)
    two = saved(tuned_of(base), tmp_path / "two")
    weights = load_file(two / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, two / "model.safetensors")
    with pytest.raises(equiv.UpdateMismatchError, match="one tied weight in the base"):
        equiv.Update.between(base, two)


def test_names_on_one_side_are_told_by_side(tmp_path: Path) -> None:
    base, tuned = transformer("llama", seed=1), transformer("qwen2", seed=1)
    one, two = saved(base, tmp_path / "one"), saved(tuned, tmp_path / "two")
    words = r"6 are missing from base: `model.layers.0.self_attn.k_proj.bias`.*, …"
    for first, second in ((one, two), (base, tuned)):
        with pytest.raises(equiv.UpdateMismatchError, match=words):
            equiv.Update.between(first, second)


def test_a_head_that_is_not_there_is_not_drawn_at_random(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    folder = saved(tuned_of(base).model, tmp_path / "headless")
    with pytest.raises(equiv.UpdateMismatchError, match=r"lacks 1.*lm_head.weight"):
        resolve(base, str(folder))


def test_other_layouts_are_read_by_transformers(tmp_path: Path) -> None:
    """Mixtral's files keep every expert apart, the model has them in one tensor."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(
        num_hidden_layers=1, num_local_experts=2, vocab_size=32, **sizes, **heads
    )
    base = MixtralForCausalLM(config).eval()
    tuned = tuned_of(base)
    folder = saved(tuned, tmp_path / "tuned")
    assert not open_folder(folder).keys() >= dict(base.named_parameters()).keys()
    found = witness.dense(resolve(base, str(folder)))
    for name, delta in expected(base, tuned).items():
        assert torch.equal(found[name], delta)


def test_a_plain_module_and_a_folder(tmp_path: Path) -> None:
    def made(mean: float) -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3)
        norm.register_buffer("running_mean", torch.full((3,), mean))
        model = nn.Sequential(nn.Linear(4, 3), norm, nn.Linear(3, 2))
        return model.eval()

    base, tuned = made(0.5), tuned_of(made(0.5))
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    check_equal(equiv.Update.between(base, tmp_path), expected(base, tuned))
    with pytest.raises(equiv.UpdateMismatchError, match=r"running_mean.*buffer"):
        equiv.Update.between(made(0.25), tmp_path)


def test_a_task_vector(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    tuned = tuned_of(base)
    vector = expected(base, tuned)
    save_file(vector, tmp_path / "vector.safetensors")
    check_equal(resolve(base, str(tmp_path / "vector.safetensors")), vector)
    weights = dict(tuned.state_dict())
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(equiv.UpdateError, match="look like the weights themselves"):
        resolve(base, str(tmp_path / "weights.safetensors"))
    vector["lm_head.weight"][0, 0] = float("nan")
    save_file(vector, tmp_path / "broken.safetensors")
    with pytest.raises(equiv.UpdateError, match="1 NaN or infinite"):
        resolve(base, str(tmp_path / "broken.safetensors"))


def test_a_fine_tune_that_diverged_is_refused_at_the_door(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    tuned = tuned_of(base)
    tuned.lm_head.weight.data[0, :3] = float("inf")
    with pytest.raises(equiv.UpdateError, match=r"`lm_head.weight`.*3 NaN or infinite"):
        equiv.Update.between(base, saved(tuned, tmp_path / "two"))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    folder = saved(tuned_of(base), tmp_path / "two", "4KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    placed = whole["weight_map"]
    first = next(iter(placed))
    for weight_map, words in (
        ({**placed, first: "gone.safetensors"}, "gone.safetensors, which does not"),
        ({**placed, "other.weight": placed[first]}, "`other.weight`.*lacks it"),
        ({**placed, first: "../two/x.safetensors"}, "outside its folder"),
        ([], "no index of shards"),
    ):
        index.write_text(json.dumps({**whole, "weight_map": weight_map}))
        with pytest.raises(equiv.FileFormatError, match=words):
            equiv.Update.between(base, folder)
    index.write_text(json.dumps(whole))
    shard = folder / placed[first]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(equiv.FileFormatError, match="not a whole safetensors file"):
        equiv.Update.between(base, folder)


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        packed = {"q.qweight": torch.full((2, 2), value, dtype=torch.int32)}
        save_file(packed, tmp_path / name / "model.safetensors")
    with pytest.raises(equiv.UpdateError, match="quantised weights"):
        equiv.Update.between(tmp_path / "one", tmp_path / "two")


def test_one_weight_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = transformer("llama", seed=1, num_hidden_layers=6)
    tuned = tuned_of(base)
    folders = [
        saved(m, tmp_path / name, "4KB") for m, name in ((base, "one"), (tuned, "two"))
    ]
    read = Alive().watch(Shards, "__getitem__", monkeypatch)
    update = equiv.Update.between(*folders)
    assert 2 <= read.most <= 4  # of base and tuned, and the two before them
    held = Alive().watch(Deferred, "__getitem__", monkeypatch)
    ids = torch.arange(16).reshape(2, 8)
    equiv.shifts(base, update, ids, dtype=torch.float64)
    assert len(update.deltas) == 6 * 9 + 3
    assert held.most <= 2 * 9  # the tensors of one block, and of the one before
