"""Tensors of a folder of safetensors, read one at a time and never kept."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from equiv.errors import FileFormatError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Shards(Mapping[str, Tensor]):
    """Parameter name → tensor, read from its file at every look.

    Tensors are mapped from the file: pages come into memory where they are used, and
    the system can drop them again.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Path, str]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.places, self.shapes = dict(places), dict(shapes)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path, stored = self.places[name]
        with safe_open(path, framework="pt") as found:
            return found.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from its file's header."""
        return self.shapes[name]

    def chosen(self, names: Mapping[str, str]) -> "Shards":
        """Some of them under new names: new → old."""
        return Shards(
            {new: self.places[old] for new, old in names.items()},
            {new: self.shapes[old] for new, old in names.items()},
        )


def open_file(path: Path) -> Shards:
    """The tensors of one safetensors file.

    Raises:
        FileFormatError: If it is missing, damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix in _PICKLES:
        raise FileFormatError(f"{path} is a pickle. {how_to_convert(path.parent)}")
    if (pickled := path.with_suffix(".bin")).is_file() and not path.is_file():
        raise FileFormatError(f"{pickled} is a pickle. {how_to_convert(path.parent)}")
    if not path.is_file():
        raise FileFormatError(
            f"Expected {path}, which does not exist. Only safetensors are read: "
            "loading a file must never run code."
        )
    try:
        with safe_open(path, framework="pt") as found:
            names = list(found.keys())
            shapes = {n: tuple(found.get_slice(n).get_shape()) for n in names}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file: {error}"
        ) from None
    return Shards({name: (path, name) for name in names}, shapes)


def open_folder(folder: Path) -> Shards:
    """The weights of a checkpoint: one safetensors file, or shards with an index.

    Optimizer states and whatever else lies beside them are not looked at.

    Raises:
        FileFormatError: If there are none, or a shard is missing or damaged.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    raise FileFormatError(_nothing_in(folder))


def _indexed(folder: Path) -> Shards:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileFormatError(
            f'{path} is no index of shards: expected JSON with a "weight_map" from '
            "tensor names to files."
        ) from None
    if outside := [file for file in placed.values() if Path(file).name != file]:
        raise FileFormatError(f"{path} names a file outside its folder: {outside[0]}.")
    shards = {file: open_file(folder / file) for file in sorted(set(placed.values()))}
    shapes = {}
    for name, file in placed.items():
        if name not in shards[file]:
            raise FileFormatError(f"{path} has `{name}` in {file}, which lacks it.")
        shapes[name] = shards[file].shape_of(name)
    return Shards({n: (folder / file, n) for n, file in placed.items()}, shapes)


def _nothing_in(folder: Path) -> str:
    """What lies in a folder instead of safetensors, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    steps = [n for n in names if n.startswith("checkpoint-") and (folder / n).is_dir()]
    if steps:
        last = max(
            steps, key=lambda n: int(n.split("-")[1]) if n[11:].isdigit() else -1
        )
        return (
            f"{folder} holds the checkpoints of a training run and no weights of its "
            f"own. Pass one of them, for instance {folder / last}."
        )
    if any(n.startswith(("global_step", "pytorch_model_fsdp")) for n in names):
        return (
            f"{folder} holds the parts of a distributed training run (DeepSpeed or "
            "FSDP). Put them together first: `zero_to_fp32.py --safe_serialization`, "
            "or `accelerate merge-weights`."
        )
    weights = [n for n in names if n.startswith(("pytorch_model", "adapter_model"))]
    if pickles := [n for n in weights if n.endswith(_PICKLES)]:
        return f"{folder} holds {pickles[0]}, a pickle. {how_to_convert(folder)}"
    return (
        f"Expected a model or adapter in {folder}: found no {SINGLE}, {INDEX} or "
        "adapter_config.json."
    )


def how_to_convert(folder: Path) -> str:
    """How a pickle of weights becomes safetensors."""
    return (
        "Only safetensors are read: loading a file must never run code. If you trust "
        "it, convert it once: load the model as you always do (`AutoModelForCausalLM"
        f'.from_pretrained("{folder}")`, say) and `model.save_pretrained(folder)` it '
        "again, which writes safetensors."
    )
