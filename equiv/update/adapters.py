"""Updates from PEFT adapters: plain LoRA in factors, all else merged minus base.

BEFT, and LoRA with `lora_bias`, add biases, also where the base has none.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import FileFormatError, UpdateError
from equiv.update.low_rank import Delta, LowRank
from equiv.update.update import Update


def from_model(adapted: nn.Module, model: nn.Module | None = None) -> Update:
    """The update of a `PeftModel`'s active adapters.

    Args:
        adapted: The `PeftModel`.
        model: The base that the update is for, if it is not the one inside `adapted`.

    Raises:
        UpdateError: If the adapter is merged, cannot be merged, or has trained the
            base's own biases and there is no other base.
    """
    for module in adapted.modules():
        if getattr(module, "merged", False):
            raise UpdateError(
                "The adapter is merged into its base. Call `unmerge_adapter()` first, "
                "or pass the base and the merged model."
            )
    base = base_of(adapted)
    apart = model is not None and model is not base
    if _trains_biases(adapted) and not apart:
        raise UpdateError(
            "This adapter was made with `bias=`, so PEFT trained the base's own biases "
            "in place and their old values are gone. Pass a base loaded afresh: "
            "`equiv.check(base, adapted)`."
        )
    kind = next(iter(adapted.peft_config.values())).peft_type.value  # pyright: ignore
    if _all_plain(adapted):
        deltas = _lora_factors(base)
        if deltas:
            return Update.from_dict(deltas, source="LoRA" if kind == "LORA" else kind)
    _check_untied(base)
    try:
        # In float64: half precision would round away most of a small update.
        merged = copy.deepcopy(adapted).double().merge_and_unload()  # pyright: ignore
    except AttributeError:
        raise UpdateError(
            f"A {kind} adapter cannot be merged into its base: it is no weight update. "
            "Expected a kind that PEFT can merge."
        ) from None
    source = model if apart and model is not None else base
    before = {clean(n): p for n, p in source.named_parameters() if is_own(n)}
    after = dict(merged.named_parameters())
    return Update.from_state_dicts(before, after, source=f"{kind} adapter")


def _check_untied(base: nn.Module) -> None:
    """Refuse an adapter on one of the modules that share a weight."""
    uses = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    for name, module in base.named_modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if uses[id(weight)] > 1:
            raise tied_error(clean(name))


def tied_error(module: str) -> UpdateError:
    """The refusal of an adapter on a module that shares its weight."""
    return UpdateError(
        f"The adapter on `{module}` adds to that module alone, but its weight is tied "
        "to another module's: no update of the weight does what the adapter does. "
        "Untie the two (give the module a copy of its weight), or leave this module "
        "out of the adapter."
    )


def base_of(adapted: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`."""
    return adapted.get_base_model()  # pyright: ignore


def is_peft(model: object) -> bool:
    """Whether this is a `PeftModel`, without importing PEFT."""
    return isinstance(model, nn.Module) and any(
        c.__name__ == "PeftModel" and c.__module__.startswith("peft.")
        for c in type(model).__mro__
    )


def from_directory(path: str | Path, model: nn.Module | None = None) -> Update:
    """The update of a plain LoRA or BEFT adapter on disk, without its base.

    Args:
        path: The adapter's folder.
        model: The base, which tells whether weights stored beside the factors are its
            own (PEFT stores embeddings whole).

    Raises:
        FileFormatError: If the directory holds no adapter in safetensors.
        UpdateError: If it is of another kind.
    """
    folder = Path(path)
    config = _read_config(folder)
    if not is_plain(config):
        raise UpdateError(
            f"{folder} is a {config.get('peft_type')} adapter with parts that only "
            "PEFT can merge. Load it with `PeftModel.from_pretrained(model, ...)` and "
            "pass that."
        )
    weights = read_safetensors(folder / "adapter_model.safetensors")
    own = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
    deltas: dict[str, Delta] = {}
    while weights:
        name = next(iter(weights))
        if (bias := _BIAS.fullmatch(name)) is not None:
            scaling = _scaling(config, bias["module"]) if bias["lora"] else 1.0
            deltas[f"{bias['module']}.bias"] = _bias(weights.pop(name), scaling)
            continue
        found = _FACTOR.fullmatch(name)
        if found is None and _is_copy(name, weights[name], own):
            del weights[name]
            continue
        if found is None:
            raise UpdateError(
                f"{folder} holds `{name}` beside the factors of LoRA, which only PEFT "
                "can merge. Load it with `PeftModel.from_pretrained(model, ...)` and "
                "pass that."
            )
        module, kind, ending = found["module"], found["kind"], found["ending"]
        down, up = (
            weights.pop(f"base_model.model.{module}.lora_{kind}{side}{ending}")
            for side in "AB"
        )
        scaling = _scaling(config, module)
        deltas[f"{module}.weight"] = (
            _factors(down, up, scaling, transposed=True)
            if kind
            else _factors(down, up, scaling, as_linear=True)
        )
    kind = "LoRA" if config["peft_type"] == "LORA" else config["peft_type"]
    return Update.from_dict(deltas, source=f"{kind} adapter {folder.name}")


def _is_copy(name: str, stored: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether a stored weight is the base's own, to the rounding of either dtype."""
    weight = own.get(clean(name.removeprefix("base_model.model.")))
    if weight is None or weight.shape != stored.shape:
        return False
    rounding = max(torch.finfo(t.dtype).eps for t in (weight, stored))
    return torch.allclose(
        weight.detach().cpu().double(), stored.double(), rtol=rounding, atol=0
    )


# `lora_A.weight` of a layer; `lora_embedding_A` of an embedding.
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_"
    r"(?P<kind>embedding_|)[AB](?P<ending>\.weight|)"
)
_BIAS = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<lora>lora_B\.bias)|beft_bias)"
)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether an adapter configuration is LoRA or BEFT, with nothing beside."""
    extras = (
        "alora_invocation_tokens",
        "arrow_config",
        "layer_replication",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_qalora",
    )
    return (
        config.get("peft_type") in ("LORA", "BEFT")
        and config.get("bias", "none") == "none"
        and not any(config.get(extra) for extra in extras)
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file.

    Raises:
        FileFormatError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileFormatError(
            f"Expected {path}, which does not exist. Only safetensors are read: "
            "loading a file must never run code."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file: {error}"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileFormatError(f"Expected an adapter: {path} does not exist.") from None
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path} is not JSON: {error}.") from None


def _scaling(config: Mapping[str, Any], module: str) -> float:
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(
    patterns: Mapping[str, float] | None, module: str, default: float
) -> float:
    """PEFT's rule: the first pattern that the module's name ends with."""
    for key, value in (patterns or {}).items():
        if re.match(rf".*\.{key}$", module) or re.fullmatch(key, module):
            return value
    return default


def _factors(
    down: Tensor,
    up: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    as_linear: bool = False,
) -> LowRank:
    left, right = up.detach().double() * scaling, down.detach().double()
    if transposed:
        return LowRank(right.T, left.T)
    return LowRank(left, right, as_linear)


def _bias(added: Tensor, scaling: float) -> Tensor:
    return added.detach().double().flatten() * scaling


def _all_plain(adapted: Any) -> bool:
    active = adapted.active_adapters
    return all(is_plain(_as_dict(adapted.peft_config[name])) for name in active)


def _trains_biases(adapted: Any) -> bool:
    configs = (adapted.peft_config[name] for name in adapted.active_adapters)
    return any(getattr(config, "bias", "none") != "none" for config in configs)


def _as_dict(config: Any) -> dict[str, Any]:
    entries = config.to_dict()
    return {
        **entries,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
    }


def _lora_factors(base: nn.Module) -> dict[str, Delta]:
    """Factors of every LoRA layer, active adapters side by side; added biases."""
    deltas: dict[str, Delta] = {}
    for name, found in base.named_modules():
        if biases := _added_biases(found):
            deltas[f"{clean(name)}.bias"] = torch.stack(biases).sum(0)
        if not (hasattr(found, "lora_A") and hasattr(found, "base_layer")):
            continue
        module: Any = found  # PEFT's own classes, which may not be installed
        inner = module.base_layer
        if isinstance(inner, nn.Embedding):
            down, up, transposed = (
                module.lora_embedding_A,
                module.lora_embedding_B,
                True,
            )
        elif isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D":
            down = {key: part.weight for key, part in module.lora_A.items()}
            up = {key: part.weight for key, part in module.lora_B.items()}
            transposed = bool(getattr(module, "fan_in_fan_out", False))
        else:
            return {}  # convolutions: leave them to PEFT's own merge
        parts = [
            _factors(down[k], up[k], float(module.scaling[k]), transposed=transposed)
            for k in module.active_adapters
            if k in down
        ]
        if parts:
            left = torch.cat([part.left for part in parts], dim=1)
            right = torch.cat([part.right for part in parts], dim=0)
            deltas[f"{clean(name)}.weight"] = LowRank(left, right)
    return deltas


def _added_biases(found: nn.Module) -> list[Tensor]:
    """What each active adapter adds to the output of a layer of LoRA or BEFT."""
    module: Any = found
    if hasattr(found, "beft_bias"):
        own = module.beft_bias
        return [_bias(own[k], 1.0) for k in module.active_adapters if k in own]
    if not hasattr(found, "lora_B"):
        return []
    return [
        _bias(module.lora_B[k].bias, float(module.scaling[k]))
        for k in module.active_adapters
        if k in module.lora_B and module.lora_B[k].bias is not None
    ]


def is_own(name: str) -> bool:
    """Whether a parameter belongs to the base and not to an adapter."""
    return not re.search(
        r"\.(lora_|beft_|modules_to_save|ia3_|hada_|lokr_|oft_|vera_)", name
    )


def clean(name: str) -> str:
    """The name that a parameter had before PEFT wrapped its module.

    Example:
        >>> clean("layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
    """
    return name.replace(".base_layer", "").replace(".original_module", "")
