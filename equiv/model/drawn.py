"""Inputs that `equiv` makes itself: random ones, and samples of the two models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import InputsError
from equiv.model.families import is_pair, model_type

SEQUENCES, LENGTH, ROWS = 8, 32, 64
SAMPLES, SAMPLE_LENGTH = 64, 64


def random_inputs(model: nn.Module, seed: int) -> Tensor | dict[str, Tensor]:
    """Random inputs: 8 sequences of 32 token ids, or 64 rows of N(0, 1) features.

    For an encoder–decoder of both stacks: token ids, or sounds for the encoder.

    Good for the calculus only: on random ids the KL of an update looked three times
    smaller than on text, and steering fitted to them was useless there.

    Raises:
        InputsError: If the width of a plain module's input cannot be told.
    """
    generator = torch.Generator().manual_seed(seed)
    if is_pair(model):
        return _for_both(model, generator)
    if model_type(model) is not None:
        return _token_ids(model, generator)
    first = next((m for m in model.modules() if list(m.parameters(False))), None)
    if isinstance(first, nn.Linear):
        shape = (ROWS, first.in_features)
        return torch.randn(shape, generator=generator, dtype=first.weight.dtype)
    if isinstance(first, nn.Embedding):
        shape = (SEQUENCES, LENGTH)
        return torch.randint(first.num_embeddings, shape, generator=generator)
    raise InputsError(
        f"Cannot draw inputs for {type(model).__name__}: its first module with "
        "parameters is neither Linear nor Embedding. Pass `inputs=`."
    )


def _token_ids(model: Any, generator: torch.Generator) -> Tensor:
    # A padding token's embedding is often zero, where norms are far from smooth.
    config = model.config
    allowed = [i for i in range(config.vocab_size) if i != config.pad_token_id]
    drawn = torch.randint(len(allowed), (SEQUENCES, LENGTH), generator=generator)
    return torch.tensor(allowed)[drawn]


def _for_both(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """What an encoder and its decoder read."""
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        source = _token_ids(model, generator)
    else:
        shape = (SEQUENCES, config.num_mel_bins, 2 * config.max_source_positions)
        source = torch.randn(shape, generator=generator).to(model.dtype)
    return {name: source, "decoder_input_ids": _token_ids(model, generator)}


@torch.no_grad()
def sampled(
    base: Callable[[Tensor], Tensor],
    tuned: Callable[[Tensor], Tensor],
    vocab_size: int,
    seed: int,
) -> Tensor:
    """Token ids [64, 64], half sampled from the base, half from the tuned model.

    Both are functions from token ids [batch, seq] to logits [batch, seq, vocab]. The
    first token is drawn uniformly; the rest at temperature 1.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for logits in (base, tuned):
        ids = torch.randint(vocab_size, (SAMPLES // 2, 1), generator=generator)
        for _ in range(SAMPLE_LENGTH - 1):
            shares = torch.softmax(logits(ids)[:, -1].double(), dim=-1).cpu()
            drawn = torch.multinomial(shares, 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
        halves.append(ids)
    return torch.cat(halves)
