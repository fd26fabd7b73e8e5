"""Steering in its own file: equal when read back, refused when anything is amiss."""

import copy
import hashlib
import io
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equiv
from equiv.steering.files.contents import FORMS, KEY
from equiv.steering.files.digests import digest, update_digest, weights_digest
from equiv.steering.forms.mlp import ACTIVATIONS
from equiv.testing.models import transformer
from equiv.testing.strategies import seeds
from equiv.update.low_rank import LowRank

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SITES = ("mlp_out", "block_out", "resid_mid->block_out", "encoder.layers/0.out")
IDS = torch.tensor([[3, 9, 4, 11, 5]])


def form(name: str, seed: int, dtypes: tuple[torch.dtype, ...]) -> equiv.Steering:
    """A steer of a form, all of its parts drawn, its optional parts by the seed."""
    g = torch.Generator().manual_seed(seed)
    d, e, r, heads = (int(torch.randint(1, 5, (), generator=g)) for _ in range(4))
    count = iter(range(8))

    def drawn(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=g, dtype=torch.float64)
        return value.to(dtypes[next(count) % len(dtypes)])

    def maybe(*shape: int) -> Tensor | None:
        return drawn(*shape) if int(torch.randint(2, (), generator=g)) else None

    if name == "vector":
        return equiv.Vector(drawn(e))
    if name == "affine":
        return equiv.Affine(drawn(r, d), drawn(e, r), maybe(e))
    if name == "loreft":
        rotation = torch.linalg.qr(drawn(d, min(r, d)).double())[0].T
        rotation = rotation.to(dtypes[0])
        return equiv.LoReFT(rotation, drawn(min(r, d), d), drawn(min(r, d)))
    if name == "mlp":
        activation = tuple(ACTIVATIONS)[seed % len(ACTIVATIONS)]
        return equiv.LowRankMLP(
            drawn(r, d), drawn(e, r), maybe(r), maybe(e), activation
        )
    offset, scale = maybe(heads, d), drawn(heads, d)
    gate = None if offset is None else maybe(heads)
    return equiv.Heads(offset, scale, gate, maybe(heads))


notes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just("misfit"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def steering_sets(draw: Any) -> equiv.SteeringSet:
    keys = st.tuples(st.integers(0, 200), st.sampled_from(SITES))
    dtypes = st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3).map(tuple)
    steers = st.builds(form, st.sampled_from(tuple(FORMS)), seeds(), dtypes)
    return equiv.SteeringSet(
        draw(st.dictionaries(keys, steers, max_size=4)),
        draw(st.sampled_from(("all", "last", "first 2 + generated"))),
        draw(st.dictionaries(st.text(max_size=4), notes, max_size=3)),
    )


def same(a: object, b: object) -> bool:
    """Equal bit for bit; of notes, with NaN equal to NaN."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, equiv.Steering):
        mine = {f.name: getattr(a, f.name) for f in fields(a)}  # type: ignore
        return type(a) is type(b) and same(mine, {n: getattr(b, n) for n in mine})
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping)
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        assert isinstance(b, list)
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def equal(a: equiv.SteeringSet, b: equiv.SteeringSet) -> bool:
    return (
        same(dict(a), dict(b)) and a.positions == b.positions and same(a.about, b.about)
    )


def saved(steering: Any, path: Path, **origin: Any) -> bytes:
    equiv.save(steering, path, **origin)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steering")


def small(path: Path) -> bytes:
    steers = {
        (0, "mlp_out"): form("mlp", 3, (torch.float32,)),
        (1, "block_out"): form("vector", 4, (torch.bfloat16,)),
    }
    return saved(equiv.SteeringSet(steers, about={"misfit": 0.25}), path)


@given(steering=steering_sets())
@settings(max_examples=150 * witness.SWEEP)
def test_what_is_read_back_is_equal(folder: Path, steering: equiv.SteeringSet) -> None:
    path = folder / "any.safetensors"
    data = saved(steering, path)
    found = equiv.load(path)
    assert equal(found, steering)
    assert saved(found, path) == data  # one steering, one file


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_in_every_dtype(folder: Path, name: str, dtype: Any) -> None:
    for seed in range(8):  # with and without the optional parts
        steering = equiv.SteeringSet({(7, "block_out"): form(name, seed, (dtype,))})
        equiv.save(steering, folder / "one.safetensors")
        assert equal(equiv.load(folder / "one.safetensors"), steering)


def test_the_metadata_says_what_is_in_the_file(tmp_path: Path) -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=0)
    mlp = equiv.LowRankMLP(torch.ones(1, 16), torch.ones(16, 1), activation="gelu")
    key = (1, equiv.Site("block_out", read="resid_mid").key)
    steering = equiv.SteeringSet({key: mlp}, "prompt", {"ridges": {"1": 1e-3}})
    path = tmp_path / "steering.safetensors"
    data = saved(steering, path, model=model, update=update)
    (length,) = struct.unpack("<Q", data[:8])
    said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    assert (said["format"], said["version"], said["positions"]) == (
        "steering",
        1,
        "prompt",
    )
    assert said["entries"] == [
        {
            "layer": 1,
            "site": "resid_mid->block_out",
            "read": "resid_mid",
            "write": "block_out",
            "form": "mlp",
            "dtype": "float32",
            "parts": ["down", "up"],
            "activation": "gelu",
        }
    ]
    assert said["about"]["ridges"] == {"1": 1e-3}
    assert said["about"]["base"]["model"] == "LlamaForCausalLM"
    assert said["about"]["base"]["family"] == "llama"
    assert said["about"]["base"]["sha256"] == weights_digest(model)
    assert said["about"]["update"] == {
        "source": update.source,
        "sha256": update_digest(update),
    }


def test_saving_again_keeps_the_origin(tmp_path: Path) -> None:
    model = transformer("llama", seed=1)
    equiv.save(
        {(0, "mlp_out"): equiv.Vector(torch.ones(16))}, tmp_path / "a", model=model
    )
    equiv.save(equiv.load(tmp_path / "a").scaled(2.0), tmp_path / "b")
    assert (
        equiv.load(tmp_path / "b", model=model).about
        == equiv.load(tmp_path / "a").about
    )


def test_what_was_saved_steers_the_same(tmp_path: Path) -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    heads = equiv.Heads(torch.randn(2, 8, generator=g))
    mlp = equiv.LowRankMLP.zero(16, rank=2)
    mlp = equiv.LowRankMLP(mlp.down, torch.randn(16, 2, generator=g))
    steering = {(0, "attn_heads"): heads, (1, "resid_mid->block_out"): mlp}
    equiv.save(steering, tmp_path / "file", model=model)
    logits = []
    for chosen in (steering, equiv.load(tmp_path / "file", model=model)):
        with equiv.steer(model, chosen), torch.no_grad():
            logits.append(model(IDS).logits)
    assert torch.equal(*logits)


def test_views_and_parameters_are_written_as_their_values(tmp_path: Path) -> None:
    whole = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    affine = equiv.Affine(whole[:2], whole.T[:, 1:3], nn.Parameter(whole[0]))
    equiv.save({(0, "mlp_out"): affine}, tmp_path / "file")
    found = equiv.load(tmp_path / "file")[0, "mlp_out"]
    assert isinstance(found, equiv.Affine) and found.bias is not None
    assert torch.equal(found.up, whole.T[:, 1:3])
    assert torch.equal(found.bias, whole[0]) and not found.bias.requires_grad


@given(at=st.integers(0, 2**32), flip=st.integers(1, 255))
@settings(max_examples=400 * witness.SWEEP)
def test_a_flipped_byte_is_found(folder: Path, at: int, flip: int) -> None:
    data = bytearray(small(folder / "whole"))
    at %= len(data)
    before = data[at]
    data[at] ^= flip
    (folder / "flipped").write_bytes(data)
    try:
        found = equiv.load(folder / "flipped")
    except equiv.FileFormatError as error:
        assert "flipped" in str(error)
        return
    # Blanks behind the header mean nothing: the content is what it was.
    assert before == ord(" ") and equal(found, equiv.load(folder / "whole"))


@given(st.data())
@settings(max_examples=100 * witness.SWEEP)
def test_a_truncated_or_longer_file_is_found(folder: Path, data: Any) -> None:
    whole = small(folder / "whole")
    kept = data.draw(st.integers(0, len(whole) - 1))
    (folder / "cut").write_bytes(whole[:kept])
    match = "truncated or damaged" if kept > 8 else "is no safetensors file"
    with pytest.raises(equiv.FileFormatError, match=match):
        equiv.load(folder / "cut")
    (folder / "cut").write_bytes(whole + bytes(1))
    with pytest.raises(equiv.FileFormatError, match="truncated or damaged"):
        equiv.load(folder / "cut")


def rewritten(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file with other metadata and a digest that fits it: forged, not damaged."""
    from safetensors.torch import load, save

    (length,) = struct.unpack("<Q", data[:8])
    said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    said["sha256"] = "0" * 64
    change(said)
    text = json.dumps(said)
    tensors = load(data)
    return save(tensors, {KEY: text.replace("0" * 64, digest(tensors, text), 1)})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "version": (lambda c: c.update(version=2), "version 2.*reads version 1"),
    "format": (lambda c: c.update(format="report"), "holds 'report'"),
    "no entries": (lambda c: c.pop("entries"), "lacks 'entries'"),
    "unknown field": (lambda c: c.update(more=1), "no field 'more'"),
    "form": (lambda c: c["entries"][0].update(form="custom"), "not whole.*custom"),
    "part": (lambda c: c["entries"][0]["parts"].append("no"), "not whole"),
    "lacks a part": (lambda c: c["entries"][0]["parts"].pop(0), "not whole"),
    "activation": (
        lambda c: c["entries"][0].update(activation="sin"),
        "not whole.*sin",
    ),
    "layer": (lambda c: c["entries"][0].update(layer="0"), "not whole"),
    "site": (lambda c: c["entries"][0].update(site="none"), "not whole"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_content_is_refused_and_named(tmp_path: Path, case: str) -> None:
    change, match = WRONG[case]
    (tmp_path / "forged").write_bytes(rewritten(small(tmp_path / "a"), change))
    with pytest.raises(equiv.FileFormatError, match=match):
        equiv.load(tmp_path / "forged")


def test_a_digest_that_is_wrong_says_so(tmp_path: Path) -> None:
    data = small(tmp_path / "a").replace(b"0.25", b"0.26")
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(equiv.FileFormatError, match="was changed after it was written"):
        equiv.load(tmp_path / "a")


class Bomb:
    """Unpickling it would raise."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


def test_files_of_other_kinds_are_named_and_never_run(tmp_path: Path) -> None:
    from safetensors.torch import save

    pickled = io.BytesIO()
    torch.save({"bomb": Bomb()}, pickled)
    kinds = {
        "is no safetensors file": b"some text that is no file of ours",
        "It is a GGUF file": b"GGUF\x03\x00\x00\x00",
        "torch.save": pickled.getvalue(),
        "EasySteer": b'{"version": 1, "kind": "direction"}',
        "no steering of `equiv.save`": save({"a": torch.ones(1)}),
        "its metadata has no": save({"a": torch.ones(1)}, {"other": "x"}),
        "no JSON of equiv": save({"a": torch.ones(1)}, {KEY: "[1, 2"}),
        "damaged": save({"a": torch.ones(1)}, {KEY: "[" * 100_000}),
    }
    for match, data in kinds.items():
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(equiv.FileFormatError, match=match):
            equiv.load(tmp_path / "file")
    with pytest.raises(equiv.FileFormatError, match="does not exist"):
        equiv.load(tmp_path / "none")
    with pytest.raises(equiv.FileFormatError, match="Cannot read"):
        equiv.load(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    path = tmp_path / "steering"
    steering = {(0, "mlp_out"): equiv.Vector(torch.ones(16))}
    equiv.save(steering, path, model=model)
    assert equiv.load(path, model=model)[0, "mlp_out"].num_parameters == 16
    assert equiv.load(path, model=copy.deepcopy(model).bfloat16())
    assert equiv.load(path, model=torch.compile(model))  # type: ignore
    for other in (transformer("llama", seed=2), transformer("gpt2", seed=1)):
        with pytest.raises(equiv.FileFormatError, match="is for another model: Llama"):
            equiv.load(path, model=other)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 1e-3
    with pytest.raises(equiv.FileFormatError, match="another model"):
        equiv.load(path, model=tuned)
    equiv.save(steering, path)
    with pytest.raises(equiv.FileFormatError, match="saved without `model="):
        equiv.load(path, model=model)


def test_an_adapter_does_not_make_another_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformer("llama", seed=1)
    before = weights_digest(model)
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
    adapted = peft.get_peft_model(model, config)
    assert weights_digest(adapted) == before


def test_the_digest_of_weights_by_hand() -> None:
    """What is hashed, written down once more."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
            self.a = nn.Parameter(torch.tensor(3.0))
            self.tied = self.b
            self.register_buffer("count", torch.tensor([5]))
            self.register_buffer("scratch", torch.ones(3), persistent=False)

    expected = hashlib.sha256(b'""')
    expected.update(b'["a", "bfloat16", []]' + struct.pack("<H", 0x4040))
    expected.update(b'["b", "bfloat16", [1, 2]]' + struct.pack("<2H", 0x3F80, 0x4000))
    expected.update(b'["count", "int64", [1]]' + struct.pack("<q", 5))
    assert weights_digest(Odd()) == expected.hexdigest()


def test_the_digest_of_an_update_is_of_its_own_numbers() -> None:
    left, right = torch.ones(3, 1), torch.ones(1, 2)
    low = equiv.Update.from_dict({"w": LowRank(left, right)})
    assert update_digest(low) == digest({"w.left": left, "w.right": right})
    dense = equiv.Update.from_dict({"w": left @ right})
    assert update_digest(dense) == digest({"w": torch.ones(3, 2)})


REFUSED: dict[str, tuple[Any, str]] = {
    "custom": (equiv.Custom(nn.Linear(2, 2)), "`Custom` is code"),
    "function": (lambda h: h, "`function` is code"),
    "overwrite": (equiv.Overwrite(torch.ones(2)), "activations of one batch"),
    "offset": (equiv.Offset(torch.ones(2)), "activations of one batch"),
    "meta": (equiv.Vector(torch.ones(2, device="meta")), "on meta"),
    "integers": (equiv.Vector(torch.ones(2, dtype=torch.int32)), "torch.int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    steer, match = REFUSED[case]
    with pytest.raises(equiv.ArgumentError, match=rf"\(3, 'mlp_out'\).*{match}"):
        equiv.save({(3, "mlp_out"): steer}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_wrong_calls(tmp_path: Path) -> None:
    vector: dict[Any, Any] = {(0, "mlp_out"): equiv.Vector(torch.ones(2))}
    path = tmp_path / "file"
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: equiv.save([vector], path), "mapping"),  # type: ignore
        (lambda: equiv.save({"mlp_out": 1}, path), r"\(layer, site\)"),  # type: ignore
        (lambda: equiv.save(vector, path, model="llama"), "`model`"),  # type: ignore
        (lambda: equiv.save(vector, path, update={}), "`update`"),  # type: ignore
        (lambda: equiv.save(vector, tmp_path / "no" / "file"), "does not exist"),
        (
            lambda: equiv.save(equiv.SteeringSet(vector, about={"a": {1: 2}}), path),
            r"text as keys of `about\['a'\]`",
        ),
        (
            lambda: equiv.save(
                equiv.SteeringSet(vector, about={"a": [torch.ones(1)]}), path
            ),
            r"`about\['a'\]\[0\]`.*Tensor",
        ),
    ]
    for call, match in calls:
        with pytest.raises(equiv.EquivError, match=match):
            call()
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    before = small(path)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        equiv.save({(0, "mlp_out"): equiv.Vector(torch.ones(2))}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
