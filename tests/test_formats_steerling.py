"""Checkpoints of steerling, against state dicts and formulas written by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from foreign import Bomb, D, H, R, affine, drawn, mlp, pickled, same_map, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import equiv
from equiv.steering.formats import (
    steerling,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_adapters_of_steerling(activation: str, alpha: float, tmp_path: Path) -> None:
    down, up = drawn(R, D), drawn(D, R)
    state = {
        "base_model.model.layers.0.mlp.down_proj.weight": drawn(D, D),
        "adapters.layer3_block.down.weight": down,
        "adapters.layer3_block.up.weight": up,
        "adapters.layer3_attn.down.weight": down,
        "adapters.layer3_attn.up.weight": up,
    }
    (tmp_path / "pytorch_model.bin").write_bytes(pickled(state))
    found = steerling.read(
        tmp_path / "pytorch_model.bin",
        family="llama",
        activation=activation,
        alpha=alpha,
    )
    assert list(found) == [(3, "block_out"), (3, "mlp_in")]
    phi = getattr(functional, activation)
    for steer in found.values():
        same_map(steer, alpha * phi(H @ down.T) @ up.T)


def test_adapters_beside_a_lora_have_no_prefix(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"layer3_mlp.down.weight": drawn(R, D), "layer3_mlp.up.weight": drawn(D, R)}
    (tmp_path / "adapter_steerer.pt").write_bytes(pickled(state))
    save_file(state, tmp_path / "model.safetensors")
    for name in ("adapter_steerer.pt", "model.safetensors"):
        found = steerling.read(
            tmp_path / name, family="llama", positions="last + generated"
        )
        assert list(found) == [(3, "mlp_out")]
        assert found.positions == "last + generated"


def test_what_steerling_calls_a_site_depends_on_the_family(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    state = {f"deltas.layer1_{word}": drawn(D) for word in ("attn", "block")}
    path.write_bytes(pickled(state))
    for family, site in (("llama", "mlp_in"), ("gemma2", "attn_out")):
        found = steerling.read(path, family=family)
        assert set(found) == {(1, "block_out"), (1, site)}
    with pytest.raises(equiv.ArgumentError, match="in some families only"):
        steerling.read(path)
    path.write_bytes(pickled({"deltas.layer1_mlp": drawn(D)}))
    for family in ("gemma2", "olmo2"):
        with pytest.raises(equiv.FileFormatError, match="is no site"):
            steerling.read(path, family=family)
    with pytest.raises(equiv.FileFormatError, match="steers 'head'"):
        path.write_bytes(pickled({"deltas.layer1_head": drawn(D)}))
        steerling.read(path, family="llama")


def test_steerling_files_are_state_dicts_of_its_modules(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    steering = {(1, "block_out"): mlp(), (2, "mlp_in"): mlp(), (2, "mlp_out"): mlp()}
    steerling.write(steering, path, family="llama")
    state = torch.load(path, weights_only=True)
    assert sorted(state) == [
        f"adapters.layer{where}.{part}.weight"
        for where in ("1_block", "2_attn", "2_mlp")
        for part in ("down", "up")
    ]
    assert torch.equal(state["adapters.layer2_attn.up.weight"], mlp().up)
    found = steerling.read(path, family="llama")
    assert set(found) == set(steering)
    steerling.write({(1, "block_out"): affine(bias=False)}, path)
    found = steerling.read(path, activation="identity")[1, "block_out"]
    same_map(found, affine(bias=False)(H))


def test_what_steerling_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    biased = dataclasses.replace(mlp(), inner=drawn(R))
    cases: list[tuple[dict[Any, Any], str]] = [
        ({(1, "block_out"): affine()}, "without biases"),
        ({(1, "block_out"): biased}, "without biases"),
        ({(1, "block_out"): mlp(), (2, "block_out"): mlp("relu")}, "relu, silu"),
        ({(1, "block_out"): mlp(), (2, "block_out"): vector()}, "silu, vector"),
        ({(1, "attn_out"): mlp()}, "no word for attn_out in llama"),
    ]
    for steering, match in cases:
        with pytest.raises(equiv.ArgumentError, match=match):
            steerling.write(steering, path, family="llama")
    with pytest.raises(equiv.ArgumentError, match="depends on the model: pass"):
        steerling.write({(1, "mlp_out"): mlp()}, path)
    for arguments, match in (
        ({"activation": "sin"}, "`activation`"),
        ({"alpha": "x"}, "`alpha`"),
        ({"positions": "some"}, "`positions`"),
    ):
        with pytest.raises(equiv.ArgumentError, match=match):
            steerling.read(path, **arguments)  # type: ignore


BROKEN_STEERLING: dict[str, tuple[Any, str]] = {
    "list": ([1], "maps no names"),
    "nothing": ({"base_model.weight": torch.ones(1)}, "no steering of steerling"),
    "half": ({"layer1_block.up.weight": torch.ones(D, R)}, "down of.*NoneType"),
    "axes": ({"deltas.layer1_block": torch.ones(2, 2)}, "1 axes"),
    "shapes": (
        {
            "layer1_block.down.weight": torch.ones(R, D),
            "layer1_block.up.weight": torch.ones(D, R + 1),
        },
        "do not fit",
    ),
    "widths": (
        {
            "layer1_block.down.weight": torch.ones(R, D),
            "layer1_block.up.weight": torch.ones(D + 1, R),
        },
        "do not fit",
    ),
    "twice": (
        {"layer1_block": torch.ones(D), "deltas.layer1_block": torch.ones(D)},
        "two `vector`",
    ),
    "code": ({"bomb": Bomb()}, "would run code"),
}


@pytest.mark.parametrize("case", BROKEN_STEERLING)
def test_broken_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    content, match = BROKEN_STEERLING[case]
    (tmp_path / "a.bin").write_bytes(pickled(content))
    with pytest.raises(equiv.FileFormatError, match=match):
        steerling.read(tmp_path / "a.bin")


@given(data=st.data())
@settings(max_examples=60 * witness.SWEEP)
def test_a_truncated_file_of_torch_is_refused(folder: Path, data: Any) -> None:
    path = folder / "a.bin"
    steerling.write({(1, "block_out"): mlp()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(equiv.FileFormatError, match=r"torch.save|run code"):
        steerling.read(path)
