"""How many positions a model has, and which token stands at which of them.

Models with a table of absolute positions number columns. Padded on the left they would
read a text at other positions than alone; there the numbers are given to them, counted
from each sequence's first token, as `generate` does. Rotary and relative positions
depend on differences alone, so nothing has to be done.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from equiv.errors import InputsError

# What the tables are called in transformers.
_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
# Rotary embeddings of these kinds stretch themselves with the sequence.
_WITHOUT_END = ("dynamic", "longrope")
_SHOWN = 5


def limit_of(model: nn.Module) -> int | None:
    """The most tokens in a sequence; `None` where there is no such number.

    A table with a row for padding, as in RoBERTa, begins after it.
    """
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or _stretches(config):
        return None
    padding = [table.padding_idx for _, table in _tables(model)]
    return limit - max((row + 1 for row in padding if row is not None), default=0)


def check_lengths(model: nn.Module, lengths: Sequence[int]) -> None:
    """Refuse sequences that are longer than the model's positions; nothing is cut.

    Raises:
        InputsError: If there are any; the message says which, and how long.
    """
    limit = limit_of(model)
    if limit is None:
        return
    long = [(i, n) for i, n in enumerate(lengths) if n > limit]
    if long:
        named = ", ".join(f"{i} ({n})" for i, n in long[:_SHOWN])
        more = f" and {len(long) - _SHOWN} more" if len(long) > _SHOWN else ""
        raise InputsError(
            f"Expected sequences of at most {limit} tokens (the model's positions, "
            f"`max_position_embeddings`), got longer ones, by index (tokens): {named}"
            f"{more}. Cut or split them, or leave them out: which part is meant is "
            "yours to say."
        )


def given_positions(
    model: nn.Module, arguments: Mapping[str, Any], mask: Tensor
) -> Tensor | None:
    """The `position_ids` that a batch padded on the left needs; else `None`.

    Args:
        model: A Hugging Face model.
        arguments: What it is called with.
        mask: Tokens that count, [batch, seq].

    Raises:
        InputsError: If it needs them and takes none.
    """
    flat = getattr(arguments.get("attention_mask"), "ndim", 0) == 2
    padded = bool((mask.any(dim=1) & ~mask[:, 0]).any())
    if not flat or not padded or arguments.get("position_ids") is not None:
        return None
    tables = [parent for parent, _ in _tables(model)]
    if all(hasattr(p, "create_position_ids_from_input_ids") for p in tables):
        return None  # no table, or numbered from the first token by the model itself
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputsError(
            f"{type(model).__name__} numbers columns and takes no `position_ids`, so "
            "batches padded on the left are other inputs to it than the texts alone. "
            'Tokenise with `padding_side="right"`.'
        )
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return of_text() if callable(of_text) else config


def _stretches(config: Any) -> bool:
    """Whether rotary embeddings grow with the sequence, in any kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    return any(kind.get("rope_type") in _WITHOUT_END for kind in kinds)


def _tables(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Embedding]]:
    """(the module that holds it, the table) of learned absolute positions."""
    for parent in model.modules():
        for name, table in parent.named_children():
            if name in _TABLES and isinstance(table, nn.Embedding):
                yield parent, table
