"""Whatever a caller has that stands for an update → an `Update` that fits the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from equiv.errors import FileFormatError, UpdateError
from equiv.model.guard import check_finite
from equiv.model.loading import hub_file, is_local
from equiv.update.adapter_files import from_directory
from equiv.update.checkpoints import from_file, from_folder, through_transformers
from equiv.update.fitting import fitted
from equiv.update.merging import from_model
from equiv.update.peft_names import has_adapters, inside
from equiv.update.update import Update


def resolve(model: nn.Module, delta_w: object) -> Update:
    """An update that fits `model`.

    Args:
        model: The base.
        delta_w: A mapping of parameter name → difference, an `Update`, a tuned model
            of the same architecture, a `PeftModel` or a model with adapters in it (also
            `model` itself), or a path or hub id: of a tuned model, a checkpoint of its
            training, an adapter, or a safetensors file of differences.

    Raises:
        UpdateError: If it is of no such kind, or empty.
        UpdateMismatchError: If it does not fit the model.
        FileFormatError: If a path holds none of these.
        UnsupportedModelError: If the model's own weights are not finite.
    """
    check_finite(model)
    return as_update(model, delta_w)


def as_update(model: nn.Module, delta_w: object) -> Update:
    """The same for a model whose weights are known to be finite."""
    if isinstance(delta_w, (str, Path)):
        delta_w = _load(model, str(delta_w))
    if isinstance(delta_w, Update):
        update = delta_w
    elif has_adapters(delta_w):
        assert isinstance(delta_w, nn.Module)
        update = _from_peft_model(model, delta_w)
    elif isinstance(delta_w, nn.Module):
        update = Update.between(model, delta_w)
    elif isinstance(delta_w, Mapping):
        update = Update.from_dict(delta_w)
    else:
        raise UpdateError(
            "Expected `delta_w` to be a mapping, an `equiv.Update`, a tuned model, a "
            f"`PeftModel` or a path, got {type(delta_w).__name__}."
        )
    return fitted(update, model)


def _from_peft_model(model: nn.Module, adapted: nn.Module) -> Update:
    """Adapter over this very model, or over a copy of it: same update either way."""
    update = from_model(adapted, model)
    inner = inside(adapted)
    if inner is model:
        return update
    mine, theirs = type(model).__name__, type(inner).__name__
    if mine != theirs:
        raise UpdateError(f"The adapter belongs to a {theirs}, the model is a {mine}.")
    return update


def _load(model: nn.Module, name: str) -> Any:
    path = Path(name)
    if path.is_file():
        if path.name.startswith("adapter_model."):
            return from_directory(path.parent, model)
        return from_file(path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return from_directory(path, model)
        return from_folder(model, path)
    if is_local(name):
        raise FileFormatError(f"{path} does not exist.")
    if (config := hub_file(name, "adapter_config.json")) is not None:
        hub_file(name, "adapter_model.safetensors")
        return from_directory(config.parent, model)
    return through_transformers(model, name)
