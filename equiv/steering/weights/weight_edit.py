"""`WeightEdit`: steering as differences of weights, ready to apply or to save."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from equiv.errors import NoExactFormError, UpdateMismatchError
from equiv.model.guard import check_model
from equiv.steering.weights.deltas import as_dense, transposed
from equiv.steering.weights.halves import layer_at
from equiv.steering.weights.new_biases import Room, make_biases
from equiv.steering.weights.weight_rules import Edited
from equiv.update.low_rank import Delta, LowRank
from equiv.update.update import Update

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """What steering adds to the weights and biases of a model; `to_weights` makes it.

    Attributes:
        edits: Layer by layer of the model, what is added to it.
        room: How biases that the base does not have fit into it.
        base: Name of the model's class.
        name: Where the base was loaded from, if it is known.

    Example:
        >>> from equiv.steering.forms.vector import Vector
        >>> from equiv.steering.weights.to_weights import to_weights
        >>> from equiv.testing.models import transformer
        >>> model, v = transformer("llama"), Vector(torch.ones(16))
        >>> to_weights({(0, "block_out"): v, (1, "block_out"): v}, model)
        WeightEdit of a LlamaForCausalLM:
          layers 0–1: mlp.down_proj: new bias (Vector at block_out)
          config: mlp_bias = True, other new biases are zero
    """

    edits: tuple[Edited, ...]
    room: Room
    base: str
    name: str | None = None

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """Parameter name → difference, in the shape of the parameter.

        Also of biases that the base does not have.
        """
        found: dict[str, Delta] = {}
        for edited in self.edits:
            if edited.weight is not None:
                turn = edited.layer.is_conv1d
                delta = transposed(edited.weight) if turn else edited.weight
                found[f"{edited.layer.name}.weight"] = delta
            if edited.bias is not None:
                found[f"{edited.layer.name}.bias"] = edited.bias
        return found

    @property
    def update(self) -> Update:
        """The same as an update of the base.

        Raises:
            NoExactFormError: If the base does not have a bias that is edited.
            UpdateError: If nothing is edited.
        """
        if self.room.names:
            raise NoExactFormError(
                "Expected an edit of parameters that the base has, but it has no "
                f"`{self._new[0]}`, and an update makes no new ones. Use `apply` or "
                "`save_peft`."
            )
        return Update.from_dict(self.deltas, source="steering as weights")

    def apply(self, model: Model) -> Model:
        """An edited copy; the model itself is left as it is.

        New biases are made where there are none. `save_pretrained` of the copy keeps
        them where the configuration has a setting for them, which is set (Llama; Qwen3,
        Gemma-2 and OLMo-2 for attention), and refuses where they would be lost.

        Args:
            model: The model that the edit was made for.

        Returns:
            The copy, which computes what the steered model does, in eval mode.

        Raises:
            UpdateMismatchError: If the layers to edit hold other weights.
            UnsupportedModelError: If it is no plain model.
        """
        check_model(model)
        self.check_fits(model)
        made = copy.deepcopy(model)
        make_biases(made, self.room)
        own = dict(made.named_parameters())
        with torch.no_grad():
            for name, delta in self.deltas.items():
                parameter = own[name]
                # In float64, so that it is rounded once.
                parameter.copy_(parameter.double() + as_dense(delta))
        return made

    def save_peft(self, directory: str | Path) -> None:
        """Write it as a PEFT adapter; the folder is whole or absent.

        Fixed vectors only: a BEFT adapter (biases). Anything else: a LoRA with scaling
        1, whose `lora_bias` holds the biases. `PeftModel.from_pretrained(model,
        directory)` loads it. PEFT merges new biases into no base.

        Args:
            directory: A new or empty folder.

        Raises:
            NoExactFormError: If nothing is edited, or a LayerNorm.
            ArgumentError: If the folder is not empty, or cannot be made.
        """
        from equiv.steering.weights.peft_files import write_adapter

        write_adapter(self, Path(directory))

    def check_fits(self, model: nn.Module) -> None:
        """Refuse a model whose layers to edit hold other weights than they did.

        Raises:
            UpdateMismatchError: If they do.
        """
        modules = dict(model.named_modules())
        for edited in self.edits:
            name = edited.layer.name
            if name not in modules or layer_at(model, name).facts != edited.layer:
                raise UpdateMismatchError(
                    f"Expected the model that the edit was made for, but `{name}` "
                    "holds other weights, or another dtype. Make the edit anew: "
                    "`to_weights(steering, model)`."
                )

    @property
    def _new(self) -> list[str]:
        """Edited biases that the base does not have."""
        return [name for name in self.deltas if name in self.room.names]

    def __repr__(self) -> str:
        lines = [f"WeightEdit of a {self.base}:"]
        where: dict[str, list[int]] = {}
        for edited in self.edits:
            _, index, path = re.split(r"\.(\d+)\.", edited.layer.name, maxsplit=1)
            line = f"{path}: {self._said(edited)}"
            where.setdefault(line, []).append(int(index))
        lines += [f"  {_ranges(found)}: {line}" for line, found in where.items()]
        if not self.edits:
            lines.append("  nothing")
        for setting in self.room.settings:
            lines.append(f"  config: {setting} = True, other new biases are zero")
        if self.room.lost:
            lines.append(
                "  no setting of the config keeps the new biases in checkpoints"
            )
        return "\n".join(lines)

    def _said(self, edited: Edited) -> str:
        """What is edited in one layer, and by what."""
        said = []
        if isinstance(edited.weight, LowRank):
            said.append(f"weight by rank {edited.weight.left.shape[1]}")
        elif edited.weight is not None:
            said.append("weight")
        if edited.bias is not None:
            new = f"{edited.layer.name}.bias" in self.room.names
            said.append("new bias" if new else "bias")
        return f"{' and '.join(said)} ({', '.join(edited.steers)})"


def _ranges(layers: list[int]) -> str:
    """Layers as text, runs of them in one.

    Example:
        >>> _ranges([0, 1, 2, 5]), _ranges([3])
        ('layers 0–2, 5', 'layer 3')
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(said)}"
