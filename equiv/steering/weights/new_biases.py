"""Biases that a base does not have, and whether its family can store them.

A checkpoint is read into a model of the class it names, which has the biases that its
configuration says; what the file holds beyond these is left out. So a new bias lasts
only where a setting makes room for it, and then all biases of that setting are there:

    Llama                      mlp_bias (gate, up, down), attention_bias (q, k, v, o)
    Qwen3, Gemma-2, OLMo-2     attention_bias
    Mistral, Qwen2             none
    GPT-2, BERT                have every bias already

This table is not used: the class itself is asked, by making an empty model.
"""

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from equiv.errors import NoExactFormError

SETTINGS = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Room:
    """How new biases fit into a model.

    Attributes:
        names: All biases to make, those that stay zero too.
        settings: What to set in the configuration to make room for them.
        lost: Those that no setting makes room for; then none is set.
    """

    names: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def room_for(model: nn.Module, new: Collection[str]) -> Room:
    """How biases that a model does not have fit into it.

    Args:
        model: The base.
        new: Their full names.
    """
    if not new:
        return Room()
    have = set(dict(model.named_parameters(remove_duplicate=False)))
    opened = {name: _opened(model, name) - have for name in SETTINGS}
    used = {name: names for name, names in opened.items() if names & set(new)}
    every = set().union(*used.values())
    if lost := set(new) - every:
        return Room(tuple(sorted(new)), (), tuple(sorted(lost)))
    return Room(tuple(sorted(every)), tuple(used))


def _opened(model: nn.Module, setting: str) -> set[str]:
    """Parameters of the model's class with a setting on; none if it has no such."""
    config: Any = getattr(model, "config", None)
    ours = type(model).__module__.startswith("transformers.models.")
    if not ours or getattr(config, setting, None) is not False:
        return set()
    changed = copy.deepcopy(config)
    setattr(changed, setting, True)
    kind: Any = type(model)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = kind(changed)
    return set(dict(empty.named_parameters(remove_duplicate=False)))


def make_biases(model: nn.Module, room: Room) -> None:
    """Give a model new biases of zero, and its configuration the settings for them.

    Where they would be lost in a checkpoint, `save_pretrained` of this model refuses.
    """
    for name in room.names:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        weight = module.weight
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    for setting in room.settings:
        setattr(model.config, setting, True)
    if room.lost:
        refuse = functools.partial(_refuse, type(model).__name__, room)
        vars(model)["save_pretrained"] = refuse


def _refuse(kind: str, room: Room, *_args: object, **_kwargs: object) -> None:
    raise NoExactFormError(
        f"Expected a model that a checkpoint can hold, but {kind} has no setting for "
        f"`{room.lost[0]}`: `from_pretrained` would leave it out. Save the edit with "
        "`save_peft`, or the model's `state_dict()`."
    )
