"""What tensors hold, as one number: to know a file, a model or an update again.

A digest is SHA-256 over the tensors in the order of their names, each with its name,
dtype and shape.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equiv.update.adapters import base_of, clean, is_own, is_peft
from equiv.update.low_rank import LowRank
from equiv.update.update import Update


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of named tensors, and of a text before them.

    Example:
        >>> one = digest({"a": torch.ones(2)})
        >>> one == digest({"a": torch.ones(2)}), one == digest({"b": torch.ones(2)})
        (True, False)
    """
    found = hashlib.sha256(json.dumps(text).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        head = [name, dtype_name(tensor), list(tensor.shape)]
        found.update(json.dumps(head).encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def bare(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and PEFT put around it."""
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return bare(inner)
    return bare(base_of(model)) if is_peft(model) else model


def weights_digest(model: nn.Module) -> str:
    """The digest by which a model is known again.

    Of its parameters and stored buffers, floating ones rounded to bfloat16: the same
    weights in another dtype are the same model, and a fine-tune, which moves some of
    its many weights across a rounding, is another. What `torch.compile` and PEFT put
    around or beside the weights is left out; tied weights count once.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> weights_digest(model) == weights_digest(model.double())
        True
    """
    model = bare(model)
    stored = model.state_dict()
    named = {
        **{name: b for name, b in model.named_buffers() if name in stored},
        **dict(model.named_parameters()),
    }
    return digest(
        {
            clean(name): tensor.detach().bfloat16()
            if tensor.is_floating_point()
            else tensor
            for name, tensor in named.items()
            if is_own(name)
        }
    )


def update_digest(update: Update) -> str:
    """The digest of an update as it was given: of a LoRA, that of its factors.

    Example:
        >>> update = Update.from_dict({"weight": torch.eye(2)})
        >>> update_digest(update) == update_digest(update.scaled(2))
        False
    """
    tensors: dict[str, Tensor] = {}
    for name, delta in update.deltas.items():
        if isinstance(delta, LowRank):
            tensors |= {f"{name}.left": delta.left, f"{name}.right": delta.right}
        else:
            tensors[name] = delta
    return digest(tensors)


def dtype_name(tensor: Tensor) -> str:
    """The dtype of a tensor in one word.

    Example:
        >>> dtype_name(torch.zeros(1, dtype=torch.bfloat16))
        'bfloat16'
    """
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
