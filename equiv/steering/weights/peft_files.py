"""Weight edits as adapters of PEFT: BEFT for biases alone, LoRA for anything else.

adapter_model.safetensors, every name after `base_model.model.` and a module's path:

    beft_bias          [1, out]   what is added to its output
    lora_A.weight      [r, in]    ΔW = lora_B · lora_A, since alpha = r for every layer;
    lora_B.weight      [out, r]   also of GPT-2's layers, which store [in, out]
    lora_B.bias        [out]      with `lora_bias`, of every layer

BEFT starts from zeros in layers that it is told of and the file does not hold, so all
layers are listed by their full names, and no others.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equiv.errors import NoExactFormError
from equiv.steering.weights.weight_rules import Edited
from equiv.update.low_rank import LowRank
from equiv.writing import write_folder

if TYPE_CHECKING:
    from equiv.steering.weights.weight_edit import WeightEdit

# Heads of language models, by the names of their classes, as PEFT's auto classes ask.
_LANGUAGE = ("ForCausalLM", "LMHeadModel")


def write_adapter(edit: "WeightEdit", directory: Path) -> None:
    """Write a weight edit as a new folder that PEFT loads.

    Raises:
        NoExactFormError: If nothing is edited, or a LayerNorm.
        ArgumentError: If the folder is not empty, or cannot be made.
    """
    from safetensors.torch import save

    if not edit.edits:
        raise NoExactFormError("Nothing is edited: there is no adapter to write.")
    for edited in edit.edits:
        if len(edited.layer.shape) == 1:
            raise NoExactFormError(
                f"`{edited.layer.name}` is a LayerNorm, and LoRA and BEFT add to "
                "linear layers only. Use `apply`, and save the edited model."
            )
    config, tensors = _beft(edit) if _only_biases(edit) else _lora(edit)
    named = {
        f"base_model.model.{name}": tensor.cpu().contiguous()
        for name, tensor in tensors.items()
    }
    files = {
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        "adapter_model.safetensors": save(named, metadata={"format": "pt"}),
    }
    write_folder(directory, files)


def _only_biases(edit: "WeightEdit") -> bool:
    """Whether BEFT can hold it: it knows plain linear layers only."""
    return all(e.weight is None and not e.layer.is_conv1d for e in edit.edits)


def _config(edit: "WeightEdit", kind: str) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "base_model_name_or_path": edit.name,
        "task_type": "CAUSAL_LM" if edit.base.endswith(_LANGUAGE) else None,
        "inference_mode": True,
        "target_modules": sorted(edited.layer.name for edited in edit.edits),
    }


def _beft(edit: "WeightEdit") -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {
        f"{edited.layer.name}.beft_bias": _stored(edited, edited.bias)[None]
        for edited in edit.edits
        if edited.bias is not None
    }
    return _config(edit, "BEFT"), tensors


def _lora(edit: "WeightEdit") -> tuple[dict[str, Any], dict[str, Tensor]]:
    biased = any(edited.bias is not None for edited in edit.edits)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for edited in edit.edits:
        name, factors = edited.layer.name, _factors(edited)
        tensors[f"{name}.lora_A.weight"] = _stored(edited, factors.right)
        tensors[f"{name}.lora_B.weight"] = _stored(edited, factors.left)
        if biased:
            none = torch.zeros(edited.layer.shape[0])
            bias = none if edited.bias is None else edited.bias
            tensors[f"{name}.lora_B.bias"] = _stored(edited, bias)
        ranks[name] = factors.left.shape[1]
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        **_config(edit, "LORA"),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_bias": biased,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(edited.layer.is_conv1d for edited in edit.edits),
    }, tensors


def _factors(edited: Edited) -> LowRank:
    """The difference in factors, of rank 1 and zero where there is none."""
    out, inside = edited.layer.shape
    if edited.weight is None:
        return LowRank(torch.zeros(out, 1), torch.zeros(1, inside))
    if isinstance(edited.weight, LowRank):
        return edited.weight
    if inside <= out:
        return LowRank(edited.weight, torch.eye(inside))
    return LowRank(torch.eye(out), edited.weight)


def _stored(edited: Edited, part: Tensor) -> Tensor:
    """In the dtype of the layer, and in float32 where that is a half."""
    return part.to(torch.promote_types(edited.layer.dtype, torch.float32))
