"""Payloads of EasySteer (`VectorSpec(data=…)`), as JSON.

A payload is {version 1, kind, tensors: name → {shape, data in base64, float32}, extra,
sha256}. All act on the output of a decoder layer, counted from 0, h with the stream:

    direction     layer.L [d]                      h + v
    reft          rotate_layer [d, r] = Rᵀ, learned_source_weight W [r, d] and _bias b
                  [r], extra.layer                 h + Rᵀ (W h + b − R h)
    lowrank       projector1, projector2 [d, r]    h + P₂ P₁ᵀ h
    linear        weight [d, d], bias [d]          W h + b, in place of h
    concept_pair  h1.layer.L, h2.layer.L [d]       h + (h₂ − h₁) h₁·h / (‖h₁‖² + 10⁻⁸)

`lowrank` and `linear` name no layer, and `reft` need not: whoever sends it does. Which
tokens, how strongly, and what is done with a `direction` (it may be erased instead of
added) is said there too. Fixed vectors of any layers are one payload, any other steer
is one of its own; several payloads are a JSON list.
"""

import base64
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from equiv.arguments import as_integers, index_of, shown
from equiv.errors import ArgumentError, FileFormatError
from equiv.model.sites import SiteKey
from equiv.steering.formats.common import (
    as_loreft,
    checked,
    family_of,
    float32,
    for_all_tokens,
    origin,
    read_json,
    refusal,
    stream_vectors,
    usable,
)
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.writing import write_text

HOLDS = "fixed vectors and affine maps at block_out"
VERSION = 1
_REFT = ("rotate_layer", "learned_source_weight", "learned_source_bias")


def write(steering: object, path: str | Path, *, family: str | None = None) -> None:
    """Write payloads: one for all fixed vectors, one for every affine map.

    Args:
        steering: Fixed vectors, affine maps or LoReFTs at block_out; vectors at mlp_out
            where the family adds that to the stream. An affine map is written as the
            LoReFT that it is. Rounded to float32.
        path: The file, JSON: a payload, or a list of them.
        family: The model's Hugging Face type; for vectors at mlp_out.

    Raises:
        ArgumentError: If the format cannot hold the steering.
    """
    chosen = for_all_tokens(steering, "EasySteer")
    vectors = {key: s for key, s in chosen.items() if isinstance(s, Vector)}
    payloads = []
    found: dict[int, Tensor] = {}
    if vectors:
        known = family_of(chosen, family)
        found = stream_vectors(SteeringSet(vectors), "EasySteer", known)
        tensors = {f"layer.{layer}": float32(v, layer) for layer, v in found.items()}
        payloads.append(payload("direction", tensors, {}))
    for key, steer in chosen.items():
        if key in vectors:
            continue
        if key[0] in found:
            raise ArgumentError(
                f"EasySteer does not say which comes first, the vector of layer "
                f"{key[0]} or the map at {key!r}. `equiv.save` keeps both."
            )
        made = as_loreft(steer) if key[1] == "block_out" else None
        if made is None:
            raise refusal("EasySteer", HOLDS, key, steer)
        parts = (made.rotation.T, made.weight, made.bias)
        tensors = {n: float32(p, key) for n, p in zip(_REFT, parts, strict=True)}
        payloads.append(payload("reft", tensors, {"layer": key[0]}))
    write_text(Path(path), json.dumps(payloads[0] if len(payloads) == 1 else payloads))


def read(
    path: str | Path, *, layers: Iterable[SupportsIndex] | None = None
) -> SteeringSet:
    """Read payloads.

    Args:
        path: The file, JSON: a payload, or a list of them.
        layers: Where payloads that name no layer steer.

    Returns:
        Fixed vectors, LoReFTs, and affine maps for `lowrank` and `linear`.

    Raises:
        FileFormatError: If the file is damaged, its digest is another, it is of another
            version, or of a kind that is no map of the stream.
        ArgumentError: If layers are needed and not given.
    """
    path = Path(path)
    found = read_json(path)
    asked = None if layers is None else as_integers("layers", layers)
    entries: dict[SiteKey, Steering] = {}
    for one in found if isinstance(found, list) else [found]:
        kind, tensors, extra = _checked(one, path)
        for layer, steer in _steers(kind, tensors, extra, asked, path).items():
            if layer < 0 or (layer, "block_out") in entries:
                raise FileFormatError(f"{path} steers layer {layer}, or does so twice.")
            where = f"layer {layer}"
            entries[layer, "block_out"] = usable(steer, where, path)
    if not entries:
        raise FileFormatError(f"{path} holds no payload.")
    return SteeringSet(entries, about=origin("easysteer", None))


def payload(
    kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, object]
) -> dict[str, Any]:
    """A payload as JSON holds it.

    Example:
        >>> one = payload("direction", {"layer.3": torch.ones(1)}, {})
        >>> one["tensors"]
        {'layer.3': {'shape': [1], 'data': 'AACAPw=='}}
    """
    packed = {name: _data(tensor) for name, tensor in sorted(tensors.items())}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {
        "version": VERSION,
        "kind": kind,
        "tensors": {
            name: {
                "shape": list(shapes[name]),
                "data": base64.b64encode(data).decode(),
            }
            for name, data in packed.items()
        },
        "extra": dict(extra),
        "sha256": _sha256(kind, packed, shapes, extra),
    }


def _data(tensor: Tensor) -> bytes:
    return tensor.numpy().astype("<f4").tobytes()


def _sha256(
    kind: str,
    tensors: Mapping[str, bytes],
    shapes: Mapping[str, Sequence[int]],
    extra: Mapping[str, object],
) -> str:
    """EasySteer's digest; values of `extra` count as Python shows them."""
    found = hashlib.sha256(f"{kind}:{VERSION}".encode())
    for name in sorted(tensors):
        found.update(f"{name}{tuple(shapes[name])}".encode() + tensors[name])
    for name, value in sorted(extra.items()):
        found.update(f"{name}={value!r}".encode())
    return found.hexdigest()


def _checked(
    said: Any, path: Path
) -> tuple[str, dict[str, Tensor], Mapping[str, object]]:
    """Kind, tensors and extra of a payload whose digest is right."""
    fields = ("version", "kind", "tensors", "extra", "sha256")
    if not isinstance(said, dict) or not said.keys() >= set(fields):
        raise FileFormatError(
            f"{path} is no payload of EasySteer: expected {', '.join(fields)}."
        )
    if said["version"] != VERSION:
        raise FileFormatError(
            f"{path} is a payload of version {said['version']!r}, expected {VERSION}."
        )
    try:
        shapes = {name: tuple(e["shape"]) for name, e in said["tensors"].items()}
        data = {
            name: base64.b64decode(entry["data"], validate=True)
            for name, entry in said["tensors"].items()
        }
        digest = _sha256(said["kind"], data, shapes, said["extra"])
        tensors = {name: _tensor(data[name], shapes[name]) for name in data}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{path} is no whole payload: {error}.") from None
    if digest != said["sha256"]:
        raise FileFormatError(
            f"{path} was changed after it was written: its content does not have the "
            "SHA-256 that it says."
        )
    return said["kind"], tensors, said["extra"]


def _tensor(data: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(
        shape
    )


def _steers(
    kind: str,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, object],
    asked: Sequence[int] | None,
    path: Path,
) -> Mapping[int, Steering]:
    """Layer → what a payload does there."""

    def part(name: str, ndim: int) -> Tensor:
        return checked(tensors.get(name), ndim, f"{name} of a {kind} payload", path)

    def by_layer(prefix: str) -> dict[int, Tensor]:
        layer = re.compile(re.escape(prefix) + "(0|[1-9][0-9]{0,8})")
        matches = [found for name in tensors if (found := layer.fullmatch(name))]
        return {int(found[1]): part(found[0], 1) for found in matches}

    if kind == "direction":
        return {layer: Vector(v) for layer, v in by_layer("layer.").items()}
    if kind == "concept_pair":
        first, second = by_layer("h1.layer."), by_layer("h2.layer.")
        shapes = [{n: v.shape for n, v in side.items()} for side in (first, second)]
        if shapes[0] != shapes[1]:
            raise FileFormatError(f"The two sides of the concepts in {path} differ.")
        return {layer: _exchange(first[layer], second[layer]) for layer in first}
    if kind == "lowrank":
        steer = Affine(part("projector1", 2).T, part("projector2", 2))
    elif kind == "linear":
        weight = part("weight", 2)
        bias = part("bias", 1) if "bias" in tensors else None
        eye = torch.eye(*weight.shape)
        steer = Affine(weight - eye, eye, bias)
    elif kind == "reft":
        bias = part(_REFT[2], 1) if _REFT[2] in tensors else None
        steer = _reft(part(_REFT[0], 2), part(_REFT[1], 2), bias, path)
    else:
        raise FileFormatError(
            f"{path} is a payload of kind {kind!r}, which is no map of the stream."
        )
    return dict.fromkeys(_layers(kind, extra, asked, path), steer)


def _layers(
    kind: str, extra: Mapping[str, object], asked: Sequence[int] | None, path: Path
) -> Sequence[int]:
    own = extra.get("layer") if kind == "reft" else None
    if own is None and not asked:
        raise ArgumentError(
            f"{path} is a {kind} payload that names no layer: pass `layers`."
        )
    if own is not None and index_of(own) is None:
        raise FileFormatError(f"Expected a layer in {path}, got {shown(own)}.")
    return [int(str(own))] if own is not None else asked or []


def _exchange(first: Tensor, second: Tensor) -> Affine:
    """The part of h along `first` taken out, and as much of `second` put in."""
    return Affine((first / (first @ first + 1e-8))[None], (second - first)[:, None])


def _reft(
    rotation: Tensor, weight: Tensor, bias: Tensor | None, path: Path
) -> Steering:
    """A LoReFT; where its directions are not orthonormal, the same affine map."""
    rows = rotation.T
    if rows.shape != weight.shape:
        raise FileFormatError(
            f"{_REFT[0]} and {_REFT[1]} in {path} do not fit: "
            f"{tuple(rotation.shape)} and {tuple(weight.shape)}."
        )
    bias = torch.zeros(len(rows)) if bias is None else bias
    try:
        return LoReFT(rows, weight, bias)
    except ArgumentError:
        warnings.warn(
            f"The directions in {path} are not orthonormal: they may be from a DiReFT "
            "of pyreft, taken as they stand in its file. They are read as the affine "
            "map that EasySteer makes of them.",
            stacklevel=5,
        )
        return Affine(weight - rows, rotation, rotation @ bias)
