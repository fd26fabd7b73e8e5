"""What tensors hold, as one number: to know a file, a model or an update again.

A digest is SHA-256 over the tensors in the order of their names, each with its name,
dtype and shape.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from equiv.model.packed import unpacked
from equiv.update.adapters import base_of, clean, is_own, is_peft
from equiv.update.entries import factored_at
from equiv.update.low_rank import Delta, LowRank
from equiv.update.update import Update


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of named tensors, and of a text before them.

    Tensors are looked at one by one: a mapping that makes them holds one at a time.

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
        del tensor  # not held while the next one is made
    return found.hexdigest()


class _Made(Mapping[str, Tensor]):
    """Tensors by name, each made when it is looked at and not kept."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


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
        _Made(
            {
                clean(name): partial(_rounded, tensor)
                for name, tensor in named.items()
                if is_own(name)
            }
        )
    )


def update_digest(update: Update) -> str:
    """The digest of an update as it was given: of a LoRA, that of its factors.

    Entries that lie on disk are read one at a time, factors once for each of the two.

    Example:
        >>> update = Update.from_dict({"weight": torch.eye(2)})
        >>> update_digest(update) == update_digest(update.scaled(2))
        False
    """
    deltas = update.deltas
    parts: dict[str, Callable[[], Tensor]] = {}
    for name in deltas:
        for part in ("left", "right") if factored_at(deltas, name) else ("",):
            full = f"{name}.{part}" if part else name
            parts[full] = partial(_part, deltas, name, part)
    return digest(_Made(parts))


def _part(deltas: Mapping[str, Delta], name: str, part: str) -> Tensor:
    delta = deltas[name]
    if not isinstance(delta, LowRank):
        return delta
    return delta.left if part == "left" else delta.right


def _rounded(tensor: Tensor) -> Tensor:
    """A weight as digests of models know it, whatever its floating dtype."""
    tensor = unpacked(tensor)
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


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
