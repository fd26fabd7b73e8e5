"""LoRA's own arithmetic: factors, scaling and added biases, from layers and files."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equiv.update.low_rank import Delta, LowRank

# Initialisations that subtract the first factors from the base's own weights.
_MOVES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# Settings under which the factors in a file are not the whole story.
_EXTRAS = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether an adapter configuration is LoRA or BEFT, with nothing beside."""
    return (
        config.get("peft_type") in ("LORA", "BEFT")
        and not moves_base(config)
        and config.get("init_lora_weights") != "mica"
        and not any(config.get(extra) for extra in _EXTRAS)
    )


def moves_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base's own parameters in place for such an adapter."""
    start = str(config.get("init_lora_weights", "")).lower()
    return config.get("bias", "none") != "none" or start.startswith(_MOVES_BASE)


def scaling_of(config: Mapping[str, Any], module: str) -> float:
    """What a configuration multiplies the product of a module's factors by."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(
    patterns: Mapping[str, float] | None, module: str, default: float
) -> float:
    """PEFT's rule: the first pattern that the module's name ends with."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def factors(
    down: Tensor,
    up: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    as_linear: bool = False,
) -> LowRank:
    """LoRA's A (`down`) and B (`up`) as factors of a weight difference, in float64."""
    left, right = up.detach().double() * scaling, down.detach().double()
    if transposed:
        return LowRank(right.T, left.T)
    return LowRank(left, right, as_linear)


def bias_of(added: Tensor, scaling: float) -> Tensor:
    """What an adapter adds to a bias, in float64."""
    return added.detach().double().flatten() * scaling


def layer_deltas(layer: nn.Module) -> dict[str, Delta] | None:
    """What a layer of plain LoRA or BEFT adds to its "weight" and "bias".

    Active adapters stand side by side. `None` where PEFT has to merge: any other kind
    of layer, and LoRA with something of its own (DoRA, say).
    """
    if hasattr(layer, "beft_bias"):
        return _biases(_beft_biases(layer))
    module: Any = layer  # PEFT's own classes, which may not be installed
    down = getattr(layer, "lora_A", None)
    if not isinstance(down, nn.ModuleDict) or hasattr(layer, "parameter_name"):
        return None
    active = [key for key in module.active_adapters if key in module.scaling]
    if any(module.lora_variant.get(key) for key in active):
        return None
    inner = module.base_layer
    if isinstance(inner, nn.Embedding):
        downs, ups = module.lora_embedding_A, module.lora_embedding_B
        transposed = True
    elif isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D":
        downs = {key: part.weight for key, part in module.lora_A.items()}
        ups = {key: part.weight for key, part in module.lora_B.items()}
        transposed = bool(getattr(module, "fan_in_fan_out", False))
    else:
        return None  # convolutions
    parts = [
        factors(downs[k], ups[k], float(module.scaling[k]), transposed=transposed)
        for k in active
        if k in downs
    ]
    if not parts:
        return {}
    left = torch.cat([part.left for part in parts], dim=1)
    right = torch.cat([part.right for part in parts], dim=0)
    return {"weight": LowRank(left, right), **_biases(_lora_biases(module, active))}


def _biases(parts: list[Tensor]) -> dict[str, Delta]:
    return {"bias": torch.stack(parts).sum(0)} if parts else {}


def _beft_biases(module: Any) -> list[Tensor]:
    own = module.beft_bias
    return [bias_of(own[k], 1.0) for k in module.active_adapters if k in own]


def _lora_biases(module: Any, active: list[str]) -> list[Tensor]:
    return [
        bias_of(module.lora_B[k].bias, float(module.scaling[k]))
        for k in active
        if k in module.lora_B and module.lora_B[k].bias is not None
    ]
