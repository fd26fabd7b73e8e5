"""Updates from checkpoints on disk: two folders, a model and a folder, a task vector.

Nothing is loaded as a whole: weights are read where they are needed, one at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.model.loading import load_model
from equiv.update.differences import check_same_buffers, differences, stored_buffers
from equiv.update.entries import Deferred, Entry, check_delta
from equiv.update.low_rank import norm_of
from equiv.update.peft_names import is_own
from equiv.update.shards import Shards, open_file, open_folder
from equiv.update.ties import aliases
from equiv.update.update import Update


def from_folders(base: object, tuned: str | Path) -> Update:
    """Tuned − base of a folder and a model, or of two folders.

    Raises:
        UpdateError: If the base is neither.
        FileFormatError: If a folder holds no weights in safetensors.
    """
    _check_side("base", base)
    _check_side("tuned", tuned)
    if isinstance(base, nn.Module):
        return from_folder(base, Path(tuned))
    return between_folders(Path(str(base)), Path(tuned))


def as_models(base: object, tuned: object) -> tuple[nn.Module, nn.Module]:
    """Two models.

    Raises:
        UpdateError: If one of them is none.
    """
    _check_side("base", base)
    _check_side("tuned", tuned)
    if not isinstance(base, nn.Module) or not isinstance(tuned, nn.Module):
        raise UpdateError(
            f"Got the folder {base} and a tuned model in memory. Pass two folders, two "
            "models, or a base model and a tuned folder."
        )
    return base, tuned


def _check_side(name: str, side: object) -> None:
    if isinstance(side, (str, Path)):
        if not Path(side).is_dir():
            raise UpdateError(
                f"Expected `{name}` to be a `torch.nn.Module` or a folder, got the "
                f"{type(side).__name__} {str(side)!r}, which is no folder."
            )
    elif not isinstance(side, nn.Module):
        raise UpdateError(
            f"Expected `{name}` to be a `torch.nn.Module` or a folder, got "
            f"{type(side).__name__}. For state dicts there is "
            "`Update.from_state_dicts`."
        )


def between_folders(base: Path, tuned: Path) -> Update:
    """Tuned − base of two folders of safetensors, under the names in their files.

    Raises:
        FileFormatError: If one holds no weights in safetensors.
        UpdateMismatchError: If their parameters differ in name or shape.
        UpdateError: If they are equal everywhere.
    """
    first, second = _weights_in(base), _weights_in(tuned)
    first, second = _without_copies(first, second), _without_copies(second, first)
    deltas, norms = differences(first, second)
    return Update(deltas, norms, f"fine-tune {tuned.name}")


def from_folder(model: nn.Module, folder: Path) -> Update:
    """Folder − model, under the model's names, each tied weight once.

    Where the folder names its weights as the model does, they are read one at a time.
    Else transformers loads them, which knows older names and other layouts.

    Raises:
        FileFormatError: If the folder holds no weights in safetensors.
        UpdateMismatchError: If parameters differ in name or shape, or buffers in value.
        UpdateError: If the two are equal everywhere.
    """
    shards = _weights_in(folder)
    own = {n: p for n, p in model.named_parameters() if is_own(n)}
    known, buffers = aliases(model), stored_buffers(model)
    placed = _placed(shards, known, model.state_dict().keys() - known.keys())
    by_name = placed.keys() == own.keys()
    loadable = hasattr(model, "from_pretrained") and (folder / "config.json").is_file()
    if loadable and not by_name:
        return through_transformers(model, str(folder))
    check_same_buffers(buffers, shards.chosen({n: n for n in shards if n in buffers}))
    deltas, norms = differences(own, shards.chosen(placed))
    return Update(deltas, norms, f"fine-tune {folder.name}")


def from_file(path: Path) -> Update:
    """The differences in one safetensors file (a task vector), read when needed.

    Raises:
        FileFormatError: If it is no whole safetensors file.
        UpdateError: If an entry is no floating tensor, or not finite.
    """
    shards = open_file(path)
    entries: dict[str, Entry] = {}
    for name in shards:
        check_delta(name, tensor := shards[name])
        entries[name] = Entry(
            _reader(shards, name), tuple(tensor.shape), norm_of(tensor)
        )
    if not entries:
        raise UpdateError(f"{path} is empty: expected parameter name → difference.")
    return Update(Deferred(entries), {}, path.name)


def _reader(shards: Shards, name: str) -> Any:
    return lambda: shards[name]


def _weights_in(folder: Path) -> Shards:
    if (folder / "adapter_config.json").is_file():
        raise UpdateError(
            f"{folder} is an adapter, not a whole model: `Update.from_peft(folder, "
            "base)` reads it."
        )
    return open_folder(folder)


def _placed(
    shards: Shards, known: Mapping[str, str], buffers: Collection[str]
) -> dict[str, str]:
    """The model's name → the file's; what the model does not know keeps its own."""
    found: dict[str, str] = {}
    for name in sorted(shards, key=lambda n: known.get(n) != n):  # first names first
        if name in buffers:
            continue
        canonical = known.get(name, name)
        other = found.setdefault(canonical, name)
        if other != name and not torch.equal(shards[other], shards[name]):
            raise UpdateMismatchError(
                f"`{other}` and `{name}` are one tied weight in the base, and two "
                "different ones in tuned: no update of the base's weight does that. "
                "Untie the base's first (give each module its own copy)."
            )
    return found


def _without_copies(shards: Shards, other: Shards) -> Shards:
    """Without the second names of tied weights, which some writers store."""
    both = [name for name in shards if name in other]

    def is_copy(name: str) -> bool:
        shape = shards.shape_of(name)
        twins = (n for n in both if shards.shape_of(n) == shape)
        return any(torch.equal(shards[n], shards[name]) for n in twins)

    kept = [name for name in shards if name in other or not is_copy(name)]
    return shards.chosen({name: name for name in kept})


@dataclass(frozen=True)
class _Informed:
    """A model class that also says what it did not find in the files."""

    loader: Any

    def from_pretrained(self, name: str, **settings: Any) -> Any:
        return self.loader.from_pretrained(name, output_loading_info=True, **settings)


def through_transformers(model: nn.Module, name: str) -> Update:
    """Tuned − model, with the whole tuned model in memory.

    Args:
        model: The base.
        name: Folder or hub id of the tuned model.

    Raises:
        FileFormatError: If nothing can be loaded from there.
        UpdateMismatchError: If parameters are missing there, or have other shapes.
        UpdateError: If the model is not of transformers, or the two are equal.
    """
    if not hasattr(model, "from_pretrained"):
        raise UpdateError(
            f"{type(model).__name__} cannot load {name!r}: only Hugging Face models "
            "can be read from a hub id. Pass the tuned model itself, or its folder."
        )
    tuned, info = load_model(_Informed(type(model)), name)
    if missing := sorted(info["missing_keys"]):
        raise UpdateMismatchError(
            f"{name} lacks {len(missing)} of the parameters of a "
            f"{type(model).__name__}: `{missing[0]}`"
            f"{', …' if len(missing) > 1 else ''}. They would be drawn at random. Load "
            "the base with the class that the tuned model was saved with."
        )
    return Update.between(model, tuned)
