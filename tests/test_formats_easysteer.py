"""Payloads of EasySteer, against payloads and formulas written down by hand."""

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from foreign import D, H, R, affine, drawn, loreft, mlp, same_map, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv.steering.formats import (
    easysteer,
)
from equiv.testing.strategies import seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


def wire(kind: str, tensors: Mapping[str, Tensor], **extra: Any) -> dict[str, Any]:
    """A payload by hand: the digest spelt out."""
    spelt = hashlib.sha256(f"{kind}:1".encode())
    packed = {}
    for name, tensor in sorted(tensors.items()):
        data = struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())
        spelt.update(name.encode() + str(tuple(tensor.shape)).encode() + data)
        text = base64.b64encode(data).decode()
        packed[name] = {"shape": list(tensor.shape), "data": text}
    for key, value in sorted(extra.items()):
        spelt.update(f"{key}={value!r}".encode())
    return {
        "version": 1,
        "kind": kind,
        "tensors": packed,
        "extra": extra,
        "sha256": spelt.hexdigest(),
    }


def test_payloads_are_as_easysteer_expects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    vectors = {(n, "block_out"): vector(n) for n in (0, 12)}
    easysteer.write(vectors, path)
    direction = wire("direction", {f"layer.{n}": vector(n).vector for n in (0, 12)})
    assert json.loads(path.read_text()) == direction
    easysteer.write({(7, "block_out"): loreft()}, path)
    reft = wire(
        "reft",
        {
            "rotate_layer": loreft().rotation.T,
            "learned_source_weight": loreft().weight,
            "learned_source_bias": loreft().bias,
        },
        layer=7,
    )
    assert json.loads(path.read_text()) == reft
    easysteer.write({(7, "block_out"): loreft(), **vectors}, path)
    assert json.loads(path.read_text()) == [direction, reft]
    found = easysteer.read(path)
    assert list(found) == [(0, "block_out"), (7, "block_out"), (12, "block_out")]


def payloads() -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Kind → payload and what it adds to H, as EasySteer's algorithms compute it."""
    rows, w, b = loreft().rotation, loreft().weight, loreft().bias
    p1, p2 = drawn(D, R, seed=1), drawn(D, R, seed=2)
    square, c, one, two = drawn(D, D), drawn(D), drawn(D, seed=3), drawn(D, seed=4)
    reft = {"rotate_layer": rows.T, "learned_source_weight": w}
    along = (H @ one)[:, None] / (one @ one + 1e-8)
    return {
        "direction": (wire("direction", {"layer.3": c}), c.expand_as(H)),
        "reft": (
            wire("reft", {**reft, "learned_source_bias": b}, layer=3),
            (H @ w.T + b - H @ rows.T) @ rows,
        ),
        "reft without layer or bias": (
            wire("reft", reft, layer=None),
            (H @ w.T - H @ rows.T) @ rows,
        ),
        "lowrank": (
            wire("lowrank", {"projector1": p1, "projector2": p2}),
            H @ p1 @ p2.T,
        ),
        "linear": (
            wire("linear", {"weight": square, "bias": c}),
            H @ square.T + c - H,
        ),
        "linear without bias": (wire("linear", {"weight": square}), H @ square.T - H),
        "concept_pair": (
            wire("concept_pair", {"h1.layer.3": one, "h2.layer.3": two}),
            along * (two - one),
        ),
    }


@pytest.mark.parametrize("case", payloads())
def test_every_payload_of_easysteer(case: str, tmp_path: Path) -> None:
    payload, expected = payloads()[case]
    (tmp_path / "a.json").write_text(json.dumps(payload))
    named = case in ("direction", "reft", "concept_pair")
    if not named:
        with pytest.raises(equiv.ArgumentError, match="names no layer"):
            easysteer.read(tmp_path / "a.json")
    found = easysteer.read(tmp_path / "a.json", layers=None if named else range(3, 4))
    assert list(found) == [(3, "block_out")]
    same_map(found[3, "block_out"], expected)


def test_affine_maps_go_to_easysteer_as_lorefts(tmp_path: Path) -> None:
    easysteer.write({(3, "block_out"): affine()}, tmp_path / "a.json")
    same_map(easysteer.read(tmp_path / "a.json")[3, "block_out"], affine()(H))


def test_rotations_that_are_none_are_read_as_easysteer_does(tmp_path: Path) -> None:
    """Its `from_pyreft` takes a DiReFT's `original` for a rotation."""
    up, w, b = drawn(D, R, seed=5), drawn(R, D), drawn(R)
    payload = wire(
        "reft",
        {"rotate_layer": up, "learned_source_weight": w, "learned_source_bias": b},
        layer=3,
    )
    (tmp_path / "a.json").write_text(json.dumps(payload))
    with pytest.warns(UserWarning, match="not orthonormal"):
        found = easysteer.read(tmp_path / "a.json")
    same_map(found[3, "block_out"], (H @ w.T + b - H @ up) @ up.T)


def changed(**fields: Any) -> dict[str, Any]:
    return {**wire("direction", {"layer.3": torch.ones(2)}), **fields}


WRONG_WIDTH = {"projector1": drawn(D, R), "projector2": drawn(D - 1, R)}
BROKEN_PAYLOADS: dict[str, tuple[Any, str]] = {
    "empty": ([], "holds no payload"),
    "number": (3, "no payload of EasySteer"),
    "missing": ({"version": 1}, "no payload of EasySteer"),
    "version": (changed(version=2), "version 2"),
    "digest": (changed(sha256="0" * 64), "was changed"),
    "kind": (changed(kind="reft"), "was changed"),
    "tensors": (changed(tensors=[1]), "no whole payload"),
    "base64": (
        changed(tensors={"layer.3": {"shape": [2], "data": "?"}}),
        "no whole payload",
    ),
    "length": (
        changed(tensors={"layer.3": {"shape": [3], "data": "AAAAAA=="}}),
        "no whole payload",
    ),
    "router": (wire("router", {}, layers={}), "no map of the stream"),
    "part": (wire("reft", {"rotate_layer": torch.ones(2, 1)}, layer=1), "NoneType"),
    "axes": (wire("direction", {"layer.3": torch.ones(2, 2)}), "1 axes"),
    "layer": (wire("reft", {}, layer="x"), "got"),
    "no layers": (wire("direction", {}), "holds no payload"),
    "shapes": (wire("lowrank", WRONG_WIDTH), "do not fit"),
    "twice": ([changed(), changed()], "twice"),
}


@pytest.mark.parametrize("case", BROKEN_PAYLOADS)
def test_broken_payloads_are_refused(case: str, tmp_path: Path) -> None:
    content, match = BROKEN_PAYLOADS[case]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(equiv.FileFormatError, match=match):
        easysteer.read(tmp_path / "a.json", layers=[1])


@given(seed=seeds(), at=st.integers(0, 2**32), flip=st.integers(1, 127))
@settings(max_examples=100 * witness.SWEEP)
def test_a_payload_that_was_changed_is_found(
    folder: Path, seed: int, at: int, flip: int
) -> None:
    path = folder / "a.json"
    easysteer.write({(1, "block_out"): loreft(seed)}, path)
    before = easysteer.read(path)[1, "block_out"]
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= flip
    path.write_bytes(content)
    try:
        after = easysteer.read(path)[1, "block_out"]
    except (equiv.FileFormatError, equiv.ArgumentError):
        return
    assert torch.equal(after(H), before(H))  # a blank, or base64's unused bits


def test_what_easysteer_cannot_hold(tmp_path: Path) -> None:
    for site, steer in (("block_out", mlp()), ("mlp_out", affine())):
        with pytest.raises(equiv.ArgumentError, match="EasySteer holds"):
            easysteer.write({(1, site): steer}, tmp_path / "a.json", family="llama")


def test_a_vector_and_a_map_of_one_layer_have_no_order(tmp_path: Path) -> None:
    both = {(1, "mlp_out"): vector(), (1, "block_out"): loreft()}
    with pytest.raises(equiv.ArgumentError, match=r"which comes first"):
        easysteer.write(both, tmp_path / "a.json", family="llama")
