"""What an update is measured on: the caller's inputs, or ones made for it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import InputsError
from equiv.model.batches import Batch
from equiv.model.drawn import random_inputs, sampled
from equiv.model.families import is_pair
from equiv.model.inputs import are_texts, from_inputs
from equiv.model.packed import unpacked
from equiv.update.low_rank import LowRank
from equiv.update.update import Update


def inputs_for(
    model: nn.Module, update: Update, inputs: object, tokenizer: Any, seed: int
) -> tuple[str, list[Batch]]:
    """What kind of inputs these are ("random", "samples", "texts", "given"); batches.

    Raises:
        InputsError: If there is nothing the model can be fed with.
    """
    if inputs is None:
        return "random", from_inputs(model, random_inputs(model, seed))
    if isinstance(inputs, str) and inputs == "samples":
        return "samples", from_inputs(model, _samples(model, update, seed))
    if isinstance(inputs, Iterator):
        inputs = list(inputs)
    kind = "texts" if are_texts(inputs) else "given"
    return kind, from_inputs(model, inputs, tokenizer)


def _samples(model: nn.Module, update: Update, seed: int) -> Tensor:
    """Half sampled from the base, half from the tuned model."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None or not hasattr(model, "lm_head") or is_pair(model):
        raise InputsError(
            '"samples" needs a model that generates text from nothing, got '
            f"{type(model).__name__}. Pass texts or tensors."
        )
    base = {name: p.detach() for name, p in model.named_parameters()}
    moved = {
        name: unpacked(base[name])
        + (delta.dense() if isinstance(delta, LowRank) else delta).to(base[name].dtype)
        for name, delta in update.deltas.items()
    }

    def logits_of(tensors: dict[str, Tensor]) -> Any:
        def run(ids: Tensor) -> Tensor:
            call = {"input_ids": ids.to(model.device), "use_cache": False}  # pyright: ignore
            return functional_call(model, tensors, (), call).logits

        return run

    return sampled(logits_of(base), logits_of({**base, **moved}), size, seed)
