"""The update of an adapter on disk: plain LoRA and BEFT by ourselves, the rest by PEFT.

Only safetensors are read. BEFT, and LoRA with `lora_bias`, add biases, also where the
base has none.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import FileFormatError, UpdateError
from equiv.update.lora import bias_of, factors, is_plain, moves_base, scaling_of
from equiv.update.low_rank import Delta, LowRank
from equiv.update.merging import base_differences, from_model
from equiv.update.peft_names import clean
from equiv.update.shards import open_file
from equiv.update.update import Update

# `lora_A.weight` of a layer; `lora_embedding_A` of an embedding.
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_"
    r"(?P<kind>embedding_|)[AB](?P<ending>\.weight|)"
)
_BIAS = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<lora>lora_B\.bias)|beft_bias)"
)


def from_directory(path: str | Path, model: nn.Module | None = None) -> Update:
    """The update of an adapter on disk.

    Args:
        path: The adapter's folder.
        model: The base. Plain LoRA and BEFT do without, unless weights are stored
            beside their factors (PEFT stores embeddings whole). What only PEFT can
            merge is loaded into a copy of it.

    Raises:
        FileFormatError: If the directory holds no adapter in safetensors.
        UpdateError: If it cannot be merged, or not without a base or PEFT.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = dict(open_file(folder / "adapter_model.safetensors"))
    if not is_plain(config):
        return _through_peft(folder, config, model)
    deltas = _plain(folder, config, weights, model)
    kind = "LoRA" if config["peft_type"] == "LORA" else config["peft_type"]
    return Update.from_dict(deltas, source=f"{kind} adapter {folder.name}")


def _plain(
    folder: Path,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    model: nn.Module | None,
) -> dict[str, Delta]:
    """Factors and added biases; the stored weights are used up."""
    own = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
    deltas: dict[str, Delta] = {}
    while weights:
        name = next(iter(weights))
        if (bias := _BIAS.fullmatch(name)) is not None:
            scaling = scaling_of(config, bias["module"]) if bias["lora"] else 1.0
            deltas[f"{bias['module']}.bias"] = bias_of(weights.pop(name), scaling)
            continue
        found = _FACTOR.fullmatch(name)
        if found is None and _is_copy(name, weights[name], own):
            del weights[name]
            continue
        if found is None:
            raise _not_the_bases(folder, name)
        module, kind, ending = found["module"], found["kind"], found["ending"]
        sides = [f"base_model.model.{module}.lora_{kind}{s}{ending}" for s in "AB"]
        if missing := [side for side in sides if side not in weights]:
            raise FileFormatError(f"{folder} holds half a factor: no `{missing[0]}`.")
        down, up = (weights.pop(side) for side in sides)
        scaling = scaling_of(config, module)
        deltas[f"{module}.weight"] = (
            factors(down, up, scaling, transposed=True)
            if kind
            else factors(down, up, scaling, as_linear=True)
        )
    return deltas if model is None else _oriented(deltas, model)


def _oriented(deltas: dict[str, Delta], model: nn.Module) -> dict[str, Delta]:
    """Factors in the direction of the base's own weights."""
    modules = {clean(name): module for name, module in model.named_modules()}
    found = dict(deltas)
    for name, delta in deltas.items():
        module = modules.get(name.rpartition(".")[0])
        if isinstance(delta, LowRank) and module is not None:
            found[name] = delta.oriented(getattr(module, "base_layer", module))
    return found


def _is_copy(name: str, stored: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether a stored weight is the base's own, to the rounding of either dtype."""
    weight = own.get(clean(name.removeprefix("base_model.model.")))
    if weight is None or weight.shape != stored.shape:
        return False
    rounding = max(torch.finfo(t.dtype).eps for t in (weight, stored))
    return torch.allclose(
        weight.detach().cpu().double(), stored.double(), rtol=rounding, atol=0
    )


def _not_the_bases(folder: Path, name: str) -> UpdateError:
    return UpdateError(
        f"{folder} holds `{name}` beside what the adapter adds, and it is not the "
        "weight of the base given here: it belongs to another base, or was trained "
        "whole, which only PEFT can merge. Pass that base and the merged model."
    )


def _through_peft(
    folder: Path, config: Mapping[str, Any], model: nn.Module | None
) -> Update:
    """Merged minus base, by PEFT, on a copy of the base."""
    label = f"{folder} is a {config.get('peft_type')} adapter with parts that only PEFT"
    if model is None:
        raise UpdateError(
            f"{label} can merge, and that needs the base: "
            "`Update.from_peft(path, base)`, or load it with "
            "`PeftModel.from_pretrained(base, path)` and pass that."
        )
    try:
        from peft import PeftModel
    except ImportError:
        raise UpdateError(f"{label} can merge: `pip install 'equiv[peft]'`.") from None
    base = copy.deepcopy(model)
    devices = [parameter.device.type for parameter in base.parameters()]
    try:
        # Some kinds draw a part of themselves from a seed of their own.
        with torch.random.fork_rng(devices=[]):
            adapted = PeftModel.from_pretrained(
                base,  # pyright: ignore[reportArgumentType]
                str(folder),
                autocast_adapter_dtype=False,
                torch_device=devices[0] if devices else "cpu",
            )
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().rstrip(".")
        raise UpdateError(
            f"PEFT cannot load the {config.get('peft_type')} adapter {folder} into a "
            f"{type(model).__name__}: {said}."
        ) from None
    if not moves_base(config) and (apart := base_differences(base, model)):
        raise _not_the_bases(folder, next(iter(apart)))
    found = from_model(adapted, model)
    return Update(found.deltas, {}, f"{found.source} {folder.name}")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder.

    Raises:
        FileFormatError: If there is none, or it is no JSON object.
    """
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileFormatError(f"Expected an adapter: {path} does not exist.") from None
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} is not JSON of an object.")
    return found
