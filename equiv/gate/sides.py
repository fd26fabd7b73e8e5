"""What stands on either side of a comparison: weights, a way to get outputs, both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.model.guard import check_model
from equiv.model.loading import load_saved
from equiv.model.sites import SiteKey, model_output
from equiv.steering.forms.form import Steering
from equiv.update.adapters import clean, is_own, is_peft
from equiv.update.low_rank import LowRank
from equiv.update.sources import resolve
from equiv.update.update import Update

# Token ids [batch, seq] → logits [batch, seq, vocab], or `TopK`.
Ask = Callable[[Tensor], Any]


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of the next token, of the likeliest tokens only.

    Attributes:
        ids: Token ids, integer [batch, seq, k].
        log_probs: Their natural log-probabilities, [batch, seq, k].
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Side:
    """One side. `model` is what runs; a side that only answers has none.

    Attributes:
        name: For messages.
        model: The module whose weights are compared, or that is run.
        update: Added to the model's weights, in float64; it fits the model.
        steering: Added to the model's activations.
        ask: Token ids → outputs, for a side without weights.
    """

    name: str
    model: nn.Module | None = None
    update: Update | None = None
    steering: Mapping[SiteKey, Steering] | None = None
    ask: Ask | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to be compared."""
        return self.model is not None and self.steering is None

    @property
    def dtype(self) -> torch.dtype | None:
        """The coarsest dtype in which its weights are stored."""
        if self.model is None:
            return None
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return max(kinds, key=lambda kind: torch.finfo(kind).eps)

    @cached_property
    def _first_names(self) -> dict[str, str]:
        """Every name of a weight, without PEFT's wrappings → its name in the model."""
        assert self.model is not None
        first = {id(p): name for name, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {clean(name): first[id(p)] for name, p in every if is_own(name)}

    def real_name(self, name: str) -> str:
        """The name under which a weight stands in the model and in its updates."""
        return self._first_names[name]

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, tied ones under each of their names, without updates."""
        assert self.model is not None
        own = dict(self.model.named_parameters())
        return {name: own[first].detach() for name, first in self._first_names.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Floating buffers by name: rotary frequencies, running means."""
        assert self.model is not None
        named = self.model.named_buffers()
        return {clean(n): b for n, b in named if b.is_floating_point() and is_own(n)}

    def factors(self, name: str) -> LowRank | Tensor | None:
        """ΔW of one parameter as the update has it, a tensor in float64."""
        if self.update is None:
            return None
        found = self.update.deltas.get(self._first_names[name])
        return found.double() if isinstance(found, Tensor) else found

    def delta(self, name: str) -> Tensor | None:
        """ΔW of one parameter in float64; `None` where nothing is added."""
        found = self.factors(name)
        return found.dense() if isinstance(found, LowRank) else found

    def exact(self, name: str) -> Tensor:
        """W + ΔW of one parameter, in float64."""
        weight, delta = self.weights()[name].double(), self.delta(name)
        return weight if delta is None else weight + delta.to(weight.device)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W + ΔW of all, rounded to a dtype, under the model's own names, each once."""
        first = {real: name for name, real in self._first_names.items()}
        return {real: self.exact(name).to(dtype) for real, name in first.items()}


def as_side(value: object, role: str) -> Side:
    """Whatever a caller has that stands for a model.

    Args:
        value: A model, a directory or hub id, `(model, update)`, `(model, steering)`,
            or a function from token ids to logits or `TopK`.
        role: "actual" or "expected", for messages.

    Raises:
        ArgumentError: If it is none of these.
        EquivError: If a model or update cannot be read or used.
    """
    if isinstance(value, (str, Path)):
        return Side(str(value), model=load_saved(str(value)))
    if isinstance(value, tuple) and len(value) == 2:
        return _pair(value[0], value[1], role)
    if is_peft(value):
        adapted: Any = value
        return Side(
            f"a {type(adapted.get_base_model()).__name__} with an adapter",
            ask=lambda ids: _in_eval(adapted, ids),
        )
    if isinstance(value, nn.Module):
        check_model(value)
        return Side(type(value).__name__, model=value)
    if callable(value):
        return Side(getattr(value, "__name__", type(value).__name__), ask=value)
    raise ArgumentError(
        f"Expected `{role}` to be a model, a directory, (model, update), (model, "
        f"steering) or a function from token ids to logits, got {type(value).__name__}."
    )


def _in_eval(adapted: Any, ids: Tensor) -> Tensor:
    """What a `PeftModel` answers without dropout; it is left in its own mode."""
    modes = [(module, module.training) for module in adapted.modules()]
    adapted.eval()
    try:
        return model_output(adapted(input_ids=ids, use_cache=False))
    finally:
        for module, mode in modes:
            module.training = mode


def _pair(model: object, second: object, role: str) -> Side:
    if isinstance(model, (str, Path)):
        model = load_saved(str(model))
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"Expected the first of the pair `{role}` to be a model or a directory, "
            f"got {type(model).__name__}."
        )
    check_model(model)
    name = type(model).__name__
    if isinstance(second, Mapping) and second and _is_steering(second):
        return Side(f"{name} with steering", model=model, steering=second)
    update = resolve(model, second)
    return Side(f"{name} + {update.source}", model=model, update=update)


def _is_steering(entries: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, tuple) and len(key) == 2 for key in entries)
