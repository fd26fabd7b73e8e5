"""Whatever a caller has to feed a model with → batches.

Texts, conversations and rows of tables go through `rows.py` and `tokenising.py`; what
is a call of the model already, or a tensor of one, is taken here.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equiv.arguments import as_tensor, shown
from equiv.errors import InputsError
from equiv.model.batches import (
    MAIN,
    POSITIONAL,
    Batch,
    numbered,
    pieces,
    room_for,
)
from equiv.model.decoder_inputs import batch_of_both
from equiv.model.families import is_pair, model_type
from equiv.model.positions import given_positions, limit_of
from equiv.model.rows import Row, check_columns, rows_in
from equiv.model.text_files import read_rows
from equiv.model.text_pairs import tokenised, with_targets
from equiv.model.tokenising import padded_rows
from equiv.model.tower import tokens_of

# An additive mask this low leaves a key no weight in any precision: exp(−1000) = 0.
NO_WEIGHT = -1000.0
# A text with such an ending may be a file's name.
_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def from_inputs(
    model: nn.Module,
    inputs: object,
    tokenizer: Any = None,
    *,
    keep_empty: bool = False,
) -> list[Batch]:
    """Turn whatever the caller has into batches.

    Args:
        model: The model they are for (its dtype, device, vocabulary and width).
        inputs: A text or an iterable of texts; conversations, each a list of messages
            with role and content; a `Path` of a file of either; a `datasets.Dataset`
            with a column of either, or of `input_ids`; token ids [batch, seq] or
            features as a tensor, array or nested list; a mapping of keyword arguments;
            or an iterable of tensors, mappings or lists of texts such as a
            `DataLoader`. For an encoder–decoder rows with a text and a target.
        tokenizer: A Hugging Face tokenizer; needed for texts and conversations.
        keep_empty: Whether sequences without any token that counts stay.

    Raises:
        InputsError: If the inputs are of no such kind, cannot be fed to the model, or
            leave no token to measure.
    """
    entries = _opened(inputs)
    pairs = with_targets(entries) if is_pair(model) else None
    rows = rows_in(entries) if pairs is None else tokenised(pairs, tokenizer)
    if rows is None:
        made = numbered(_batches(model, entries))
    else:
        made = _from_rows(model, rows, tokenizer, keep_empty)
    batches = [_checked(model, batch) for batch in made]
    if not batches:
        raise InputsError("Expected at least one batch of inputs, got none.")
    if not any(batch.tokens for batch in batches):
        raise InputsError(
            "Every token is masked: the attention mask is 0 everywhere, so there is "
            "nothing to measure. Expected at least one token with mask 1."
        )
    room = room_for(model)
    return [piece for batch in batches for piece in pieces(batch, keep_empty, room)]


def are_texts(inputs: object) -> bool:
    """Whether inputs are texts, conversations or rows of a table."""
    return rows_in(_opened(inputs)) is not None


def _opened(inputs: object) -> object:
    """A tensor, array or mapping as it is; whatever else can be iterated as a list."""
    if isinstance(inputs, str):
        return [_one_text(inputs)]
    if isinstance(inputs, Path):
        return read_rows(inputs)
    if hasattr(inputs, "column_names"):
        check_columns(inputs)
    if hasattr(inputs, "iloc") and hasattr(inputs, "columns"):
        raise InputsError(
            f"Expected one column of a {type(inputs).__name__}, got all: pass "
            f"`inputs[{next(iter(inputs.columns), 'text')!r}]`."  # pyright: ignore
        )
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "OTU":
        return inputs.tolist()
    one = isinstance(inputs, (Tensor, np.ndarray, Mapping, bytes))
    return list(inputs) if isinstance(inputs, Iterable) and not one else inputs


def _one_text(text: str) -> str:
    """A text that nothing else can be meant by."""
    if text == "samples":
        raise InputsError(
            'Expected inputs, got "samples": only `equiv.check` samples its own. '
            "Pass texts or tensors."
        )
    if difflib.get_close_matches(text.lower(), ["samples"], cutoff=0.8):
        raise InputsError(
            f'Expected "samples" or texts as `inputs`, got {text!r}: did you '
            'mean "samples"? A text of one word can be passed in a list.'
        )
    if text.lower().endswith(_ENDINGS) and len(text) < 1000 and Path(text).is_file():
        raise InputsError(
            f"`inputs` is the name of a file, {text!r}: pass `Path({text!r})` to read "
            f"it, or `[{text!r}]` if this is the text."
        )
    return text


def _batches(model: nn.Module, inputs: object) -> Iterable[Batch]:
    if isinstance(inputs, Mapping):
        yield _from_mapping(model, inputs)
    elif isinstance(inputs, list) and not _holds_numbers(inputs):
        for index, entry in enumerate(inputs):
            yield _from_entry(model, index, entry)
    elif isinstance(inputs, (Tensor, np.ndarray, list)):
        yield _from_tensor(model, as_tensor("inputs", inputs))
    else:
        raise InputsError(
            "Expected `inputs` to be texts, a tensor, a mapping of keyword arguments, "
            'or an iterable of those (for `equiv.check` also None or "samples"), got '
            f"{type(inputs).__name__}."
        )


def _holds_numbers(value: object) -> bool:
    """Whether this is a nested list of numbers, by the first of them."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, Number)


def _from_entry(model: nn.Module, index: int, entry: object) -> Batch:
    """One entry of an iterable of batches."""
    if isinstance(entry, Mapping):
        return _from_mapping(model, entry)
    if isinstance(entry, (Tensor, np.ndarray)):
        return _from_tensor(model, as_tensor(f"inputs[{index}]", entry))
    parts = list(entry) if isinstance(entry, (tuple, list)) else []
    if not parts or not isinstance(parts[0], (Tensor, np.ndarray)):
        raise InputsError(
            "Expected tensors or mappings of keyword arguments in `inputs`, got "
            f"{shown(entry)} at index {index}."
        )
    if len(parts) > 1 and model_type(model) is not None:
        raise InputsError(
            f"Expected a tensor or a mapping at index {index} of `inputs`, got "
            f"{len(parts)} tensors whose names are not known: pass mappings such as "
            '{"input_ids": ..., "attention_mask": ...}.'
        )
    return _from_tensor(model, as_tensor(f"inputs[{index}][0]", parts[0]))


def _from_rows(
    model: nn.Module, rows: Sequence[Row], tokenizer: Any, keep_empty: bool
) -> list[Batch]:
    made = padded_rows(model, rows, tokenizer, keep_empty=keep_empty)
    return [
        replace(_from_mapping(model, call), index=tuple(chunk)) for chunk, call in made
    ]


def _from_tensor(model: nn.Module, tensor: Tensor) -> Batch:
    if model_type(model) is None:
        return _from_mapping(model, {POSITIONAL: tensor})
    name = "inputs_embeds" if tensor.is_floating_point() else "input_ids"
    return _from_mapping(model, {name: tensor})


def _from_mapping(model: nn.Module, mapping: Mapping[str, Any]) -> Batch:
    hf = model_type(model) is not None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments = _as_tensors(mapping, hf)
    tensors = {n: v.to(device) for n, v in arguments.items() if isinstance(v, Tensor)}
    arguments |= tensors
    labels = arguments.pop("labels", None)
    first = (*MAIN, getattr(model, "main_input_name", POSITIONAL), *tensors)
    name = next((n for n in first if n in tensors), None)
    if name is None:
        kinds = {n: type(v).__name__ for n, v in mapping.items()}
        raise InputsError(f"Expected a tensor in the inputs, got {kinds}.")
    main = tensors[name]
    axes = 2 if hf else 1
    if main.ndim < axes:
        raise InputsError(
            f"Expected inputs with a batch axis{' and a seq axis' if hf else ''}, got "
            f"shape {tuple(main.shape)}."
        )
    if not main.numel():
        raise InputsError(
            "Expected at least one sequence and one token in every batch, got shape "
            f"{tuple(main.shape)}."
        )
    given = arguments.get("attention_mask")
    shape = tuple(main.shape[:axes])
    if hf:
        _check_call(model, arguments, name)
        if name not in MAIN and not is_pair(model):
            shape = tokens_of(model, name, arguments)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if hf:
        # Of sounds it tells nothing that an encoder attends by.
        sounds = name not in MAIN and is_pair(model)
        mask = mask if given is None or sounds else _token_mask(given, mask)
        positions = given_positions(model, arguments, mask)
        arguments |= {} if positions is None else {"position_ids": positions}
        # A cache would be kept for every batch, and nobody reads it.
        arguments["use_cache"] = False
    elif isinstance(given, Tensor) and given.ndim == 2:
        mask = given.bool()
    if hf and is_pair(model):
        return batch_of_both(model, name, arguments, mask, labels)
    if isinstance(labels, Tensor):
        labels = _aligned(model, labels, mask)
    return Batch(arguments, mask, labels, index=tuple(range(main.shape[0])))


def _as_tensors(mapping: Mapping[str, Any], hf: bool) -> dict[str, Any]:
    """The mapping with its arrays and lists made tensors.

    A plain module may want its lists as they are, if there is a tensor beside them.
    """
    if hf and mapping.get("past_key_values") is not None:
        raise InputsError(
            "Expected inputs without `past_key_values`: what lies in a cache has no "
            "shift. Pass the whole sequences."
        )
    arrays = (Tensor, np.ndarray)
    bare = not any(isinstance(value, arrays) for value in mapping.values())
    kinds = (*arrays, list, tuple) if hf or bare else arrays
    return {
        name: as_tensor(name or "inputs", value) if isinstance(value, kinds) else value
        for name, value in mapping.items()
    }


def _check_call(model: nn.Module, arguments: dict[str, Any], name: str) -> None:
    """Check the main argument of a Hugging Face model; token ids become int64."""
    main = arguments[name]
    floating = main.is_floating_point()
    ids = main.ndim == 2 and not floating and main.dtype != torch.bool
    embeddings = main.ndim == 3 and floating
    if (name == "input_ids" and not ids) or (
        name == "inputs_embeds" and not embeddings
    ):
        raise InputsError(
            "Expected token ids as integers [batch, seq] or embeddings as floats "
            f"[batch, seq, d], got {main.dtype} of shape {tuple(main.shape)}."
        )
    if name == "input_ids":
        arguments[name] = main.long()
    limit = limit_of(model)
    if name in MAIN and limit is not None and main.shape[1] > limit:
        raise InputsError(
            f"Expected sequences of at most {limit} tokens (the model's "
            f"`max_position_embeddings`), got {main.shape[1]}. Cut or split them."
        )


def _token_mask(given: Any, everything: Tensor) -> Tensor:
    """The tokens that count, from an attention mask [batch, seq] or of pairs.

    In a mask of pairs [batch, 1 or heads, seq, seq] a token counts that attends to
    itself: true, or a float that does not take its weight away.
    """
    batch, seq = everything.shape
    if isinstance(given, Tensor) and given.shape == everything.shape:
        return given.bool()
    pairs = isinstance(given, Tensor) and given.ndim == 4
    if not pairs or given.shape[0] not in (1, batch) or given.shape[2:] != (seq, seq):
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputsError(
            f"Expected an `attention_mask` of shape {(batch, seq)}, or of pairs "
            f"{(batch, 1, seq, seq)}, got {got}."
        )
    own = given.diagonal(dim1=2, dim2=3)
    attends = own > NO_WEIGHT if own.is_floating_point() else own.bool()
    return attends.any(dim=1).expand(batch, seq)


def _aligned(model: nn.Module, labels: Tensor, mask: Tensor) -> Tensor:
    """Labels where the prediction stands: a causal model predicts the next token.

    Labels under the mask are dropped, so that padding enters no figure.
    """
    if labels.shape != mask.shape or labels.ndim < 2:
        return labels
    labels = labels.masked_fill(~mask, -100)
    if getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification"):
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _checked(model: nn.Module, batch: Batch) -> Batch:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.arguments.get(name)
        if not isinstance(ids, Tensor) or size is None:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise InputsError(
                f"Expected token ids in 0…{size - 1} (the model's vocabulary), got ids "
                f"in {low}…{high}. Is this the model's own tokenizer?"
            )
    for name, value in batch.arguments.items():
        # An additive mask is −∞ where nothing is to be seen.
        if not isinstance(value, Tensor) or "mask" in name:
            continue
        wrong = value.numel() - int(torch.isfinite(value).sum())
        if wrong:
            raise InputsError(
                f"Expected finite numbers in `{name or 'inputs'}`, got {wrong} NaN or "
                "infinite entries."
            )
    return batch
