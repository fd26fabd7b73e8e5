"""Entries that lie on disk: what is read one at a time, and what is known without."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import witness
from alive import Alive

import equiv
from equiv.shift.stage_update import low_rank_names
from equiv.steering.files import digests
from equiv.steering.files.digests import update_digest, weights_digest
from equiv.testing.models import transformer
from equiv.update.entries import Deferred, Entry, factored_at, mapped
from equiv.update.low_rank import LowRank
from equiv.update.sums import added


def on_disk(base: torch.nn.Module, folder: Path) -> equiv.Update:
    """An update that is read from a folder, every time it is looked at."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(folder, max_shard_size="4KB")  # type: ignore[operator]
    return equiv.Update.between(base, folder)


def hashed(tensors: dict[str, torch.Tensor]) -> str:
    """A digest by its definition, of tensors that are all there."""
    found = hashlib.sha256(b'""')
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        head = [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
        found.update(json.dumps(head).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_digests_and_names_read_one_entry_at_a_time_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = transformer("llama", seed=1, num_hidden_layers=3)
    update = on_disk(base, tmp_path)
    whole = witness.dense(update)
    held = Alive().watch(Deferred, "__getitem__", monkeypatch)
    assert low_rank_names(base, update) == [] and held.most == 0
    assert update_digest(update) == hashed(whole)
    assert held.most == 1
    rounded = Alive().watch(digests, "_rounded", monkeypatch)
    assert weights_digest(base) == hashed(
        {name: p.detach().bfloat16() for name, p in base.named_parameters()}
    )
    assert rounded.most == 1


def test_what_is_factored_is_known_without_reading(tmp_path: Path) -> None:
    base = transformer("llama", seed=1)
    file = on_disk(base, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    out, inside = base.get_parameter(name).shape
    factors = LowRank(torch.ones(out, 1), torch.ones(1, inside))
    beside = Deferred({name: Entry(lambda: factors, (out, inside), None, True)})
    for deltas in (
        added(file.deltas, {name: factors}),  # dense beside factors: dense
        added(beside, {name: factors}),  # factors beside factors: factors
        mapped(beside, lambda _, delta: delta, 2.0),
        beside,
        file.deltas,
        {name: factors},
    ):
        for each in deltas:
            assert factored_at(deltas, each) == isinstance(deltas[each], LowRank)
    lora = equiv.Update(beside, {})
    assert low_rank_names(base, lora) == [name]
    parts = {f"{name}.left": factors.left, f"{name}.right": factors.right}
    assert update_digest(lora) == hashed(parts)
    # Names that sort between the parts of another keep their place.
    odd = {"w": factors, "w-x": torch.ones(2), "w.m": torch.ones(3)}
    flat = {"w.left": factors.left, "w.right": factors.right}
    flat |= {"w-x": torch.ones(2), "w.m": torch.ones(3)}
    assert update_digest(equiv.Update.from_dict(odd)) == hashed(flat)
