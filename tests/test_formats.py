"""Files of other tools: what holds for all formats.

Where a tool itself can be run, `test_peers.py` does that.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import D, drawn, vector
from torch import nn

import equiv
from equiv.steering.formats import (
    FORMATS,
    lm_eval,
)
from equiv.testing.models import transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


NAMES = {
    "gguf": "file.gguf",
    "pyreft": "folder",
    "lm_eval": "file.pt",
    "easysteer": "file.json",
    "steerling": "pytorch_model.bin",
}
INSIDE = ("pyreft", "lm_eval", "steerling")  # those with sites inside a block


def again(name: str, steering: Any, folder: Path) -> equiv.SteeringSet:
    """What is read of what was written, for a Llama."""
    if name == "gguf":
        pytest.importorskip("gguf")
    path = folder / NAMES[name]
    FORMATS[name].write(steering, path, family="llama")
    extra = {"family": "llama"} if name in INSIDE else {}
    return FORMATS[name].read(path, **extra)


def test_the_table_has_every_format() -> None:
    assert list(FORMATS) == list(NAMES)
    assert all(known.holds for known in FORMATS.values())


@pytest.mark.parametrize("name", FORMATS)
def test_fixed_vectors_come_back(name: str, tmp_path: Path) -> None:
    steering = {(layer, "block_out"): vector(layer) for layer in (1, 2, 30)}
    found = again(name, steering, tmp_path)
    assert list(found) == list(steering) and found.positions == "all"
    for key, steer in steering.items():
        read = found[key]
        assert isinstance(read, equiv.Vector)
        assert torch.equal(read.vector, steer.vector)
    assert found.about["format"] == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_are_rounded_to_float32(name: str, dtype: Any, tmp_path: Path) -> None:
    value = drawn(D).to(dtype)
    found = again(name, {(1, "block_out"): equiv.Vector(value)}, tmp_path)
    read = found[1, "block_out"]
    assert isinstance(read, equiv.Vector)
    assert torch.equal(read.vector, value.float())


@pytest.mark.parametrize("name", FORMATS)
def test_what_no_format_holds_is_refused(name: str, tmp_path: Path) -> None:
    write, path = FORMATS[name].write, tmp_path / NAMES[name]
    one = {(1, "block_out"): vector()}
    infinite = {
        (1, "block_out"): equiv.Vector(torch.full((D,), 1e39, dtype=torch.float64))
    }
    cases: list[tuple[Any, str]] = [
        (equiv.SteeringSet(one, positions="last"), "which tokens are steered"),
        ({}, "at least one steer"),
        ([one], "mapping"),
        ({(1, "attn_heads"): equiv.Heads(drawn(2, 3))}, "equiv.save"),
        ({(1, "block_out"): equiv.Custom(nn.Linear(D, D))}, "`Custom`.*equiv.save"),
        (infinite, "not finite in float32"),
    ]
    for steering, match in cases:
        with pytest.raises(equiv.ArgumentError, match=match):
            write(steering, path, family="llama")
    with pytest.raises(equiv.ArgumentError, match="does not exist"):
        write(one, tmp_path / "no" / NAMES[name], family="llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_no_kind_are_refused(name: str, tmp_path: Path) -> None:
    if name == "gguf":
        pytest.importorskip("gguf")
    path = tmp_path / NAMES[name]
    with pytest.raises(equiv.FileFormatError):
        FORMATS[name].read(path)
    for content in (b"", b"text that is no file of theirs", b"[" * 100_000, b"{}"):
        path.write_bytes(content)
        with pytest.raises(equiv.FileFormatError):
            FORMATS[name].read(path)


def test_the_family_is_known_from_the_model_that_was_saved(tmp_path: Path) -> None:
    model = transformer("llama", seed=1)
    equiv.save({(1, "mlp_out"): equiv.Vector(drawn(16))}, tmp_path / "a", model=model)
    lm_eval.write(equiv.load(tmp_path / "a"), tmp_path / "a.pt")
    assert list(torch.load(tmp_path / "a.pt")) == ["layers.1.mlp"]


@pytest.mark.parametrize("name", ["pyreft", "lm_eval", "steerling"])
def test_two_steers_never_become_one(name: str, tmp_path: Path) -> None:
    """A vector reads nothing, so two keys may mean one place."""
    twice = {(1, "block_out"): vector(), (1, "mlp_in->block_out"): vector(1)}
    path = tmp_path / NAMES[name]
    with pytest.raises(equiv.ArgumentError, match=r"two are for \(1, 'block_out'\)"):
        FORMATS[name].write(twice, path, family="llama")
    again(name, {(1, "mlp_in->block_out"): vector(1)}, tmp_path)
