"""How steering stands in a safetensors file: its tensors, and JSON beside them.

The layout is that of `files`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from equiv.errors import ArgumentError, EquivError, FileFormatError
from equiv.fields import decoded, encoded
from equiv.model.sites import Site, SiteKey
from equiv.steering.files.digests import digest, dtype_name
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.oracle import Offset, Overwrite
from equiv.steering.forms.vector import Vector

KEY, FORMAT, VERSION = "equiv", "steering", 1
FORMS: dict[str, type[Steering]] = {
    "vector": Vector,
    "affine": Affine,
    "loreft": LoReFT,
    "mlp": LowRankMLP,
    "heads": Heads,
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
_UNSIGNED = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One steer of a file; its tensors stand under `layer`/`site`/part."""

    layer: int
    site: str
    read: str
    write: str
    form: str
    dtype: str
    parts: tuple[str, ...]
    activation: str | None = None


@dataclass(frozen=True)
class Content:
    """What the metadata of a file says."""

    format: str
    version: int
    sha256: str
    positions: str
    entries: tuple[Entry, ...]
    about: dict


def packed(entries: Mapping[SiteKey, Steering], positions: str, about: dict) -> bytes:
    """Steering as the content of a file.

    Raises:
        ArgumentError: If a steer is no map of numbers.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    said = []
    for key, steer in entries.items():
        entry, parts = _taken_apart(key, steer)
        said.append(entry)
        tensors |= parts
    content = Content(FORMAT, VERSION, _UNSIGNED, positions, tuple(said), about)
    text = json.dumps(encoded(dataclasses.asdict(content)), allow_nan=False)
    text = text.replace(_UNSIGNED, digest(tensors, text), 1)
    return save(tensors, {KEY: text})


def unpacked(path: Path) -> tuple[dict[SiteKey, Steering], Content]:
    """The steers of a file, and what it says beside them.

    Raises:
        FileFormatError: If it is no whole and unchanged file of this version.
    """
    tensors, text = _read(path)
    content = _content(text, path)
    if digest(tensors, text.replace(content.sha256, _UNSIGNED, 1)) != content.sha256:
        raise FileFormatError(
            f"{path} was changed after it was written: its content does not have the "
            "SHA-256 that it says."
        )
    try:
        return dict(_put_together(e, tensors) for e in content.entries), content
    except (KeyError, TypeError, EquivError) as error:
        raise FileFormatError(f"{path} is not whole steering: {error}.") from None


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        FileFormatError: If there is none, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{path} does not exist.") from None
    except OSError as error:
        raise FileFormatError(f"Cannot read {path}: {error.strerror}.") from None


def _taken_apart(key: SiteKey, steer: object) -> tuple[Entry, dict[str, Tensor]]:
    """What a file holds of one steer: its entry and its tensors by name."""
    form = next((name for name, kind in FORMS.items() if type(steer) is kind), None)
    if form is None:
        raise ArgumentError(f"Cannot save the steering at {key!r}: {_why_not(steer)}")
    layer, site = key
    parts = {n: t for n, t in vars(steer).items() if isinstance(t, Tensor)}
    for name, tensor in parts.items():
        if tensor.is_meta or dtype_name(tensor) not in DTYPES:
            raise ArgumentError(
                f"Cannot save the steering at {key!r}: expected `{name}` with values "
                f"in {', '.join(DTYPES)}, got {tensor.dtype} on {tensor.device}."
            )
    entry = Entry(
        layer,
        site,
        Site(site).read,
        Site(site).write,
        form,
        " and ".join(sorted({dtype_name(tensor) for tensor in parts.values()})),
        tuple(parts),
        getattr(steer, "activation", None),
    )
    # A copy: a file cannot hold views, nor tensors that share their memory.
    return entry, {
        f"{layer}/{site}/{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in parts.items()
    }


def _why_not(steer: object) -> str:
    kind = type(steer).__name__
    if isinstance(steer, (Overwrite, Offset)):
        return (
            f"an `{kind}` holds the activations of one batch and says nothing of any "
            "other. Save a fit: `equiv.fit`."
        )
    return (
        f"a `{kind}` is code, and loading a file never runs code. Keep its own state "
        f"by itself, or use one of {', '.join(k.__name__ for k in FORMS.values())}."
    )


def _put_together(
    entry: Entry, tensors: Mapping[str, Tensor]
) -> tuple[SiteKey, Steering]:
    parts: dict[str, Any] = {
        part: tensors[f"{entry.layer}/{entry.site}/{part}"] for part in entry.parts
    }
    if entry.activation is not None:
        parts["activation"] = entry.activation
    return (entry.layer, entry.site), FORMS[entry.form](**parts)


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and its metadata as text."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialised

    data = read_bytes(path)
    try:
        tensors = deserialised(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if data[8:9] == b"{":
            raise FileFormatError(f"{path} is truncated or damaged: {error}.") from None
        raise FileFormatError(f"{path} is no safetensors file.{_meant(data)}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(KEY)
    if text is None:
        raise FileFormatError(
            f"{path} is a safetensors file, but holds no steering of `equiv.save`: "
            f"its metadata has no `{KEY}`."
        )
    return tensors, text


def _content(text: str, path: Path) -> Content:
    try:
        fields = json.loads(text)
        said, version = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileFormatError(
            f"{path} is damaged: its metadata is no JSON of equiv."
        ) from None
    if said != FORMAT:
        raise FileFormatError(f"{path} holds {said!r}, expected {FORMAT!r}.")
    if version != VERSION:
        raise FileFormatError(
            f"{path} has version {version!r} of the format; this equiv reads version "
            f"{VERSION}."
        )
    try:
        return decoded(Content, fields)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} is not whole steering: {error}.") from None


def _meant(data: bytes) -> str:
    """What a file of another kind is, in a sentence."""
    kinds = {
        b"GGUF": "It is a GGUF file: `equiv.formats.gguf.read`.",
        b"PK": "It is a file of torch.save: `equiv.formats` has readers of some.",
        b"{": "It is JSON: `equiv.formats.easysteer.read` reads payloads of EasySteer.",
    }
    return next(
        (f" {text}" for head, text in kinds.items() if data[:4].startswith(head)), ""
    )
