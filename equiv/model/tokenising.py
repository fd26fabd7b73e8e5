"""Texts, conversations and tokenised rows → batches padded on the right.

Every sequence is tokenised alone and whole, with the special tokens that the tokenizer
puts around a text; a conversation gets those of its chat template and no others. Padded
on the right, whatever the tokenizer's side, each token stands where it would alone: in
a causal model it sees nothing of the padding, in others the mask hides it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiv.arguments import as_tensor, shown
from equiv.errors import InputsError, MissingExtraError
from equiv.model.batches import room_for, similar
from equiv.model.families import is_pair, model_type
from equiv.model.positions import check_lengths
from equiv.model.rows import IDS, Conversation, Row

# Columns of a tokenised row that a model is given, and what they are padded with; the
# token ids' own is the tokenizer's. Labels of −100 are no labels.
_PADDED_WITH = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}
_POSITIONS = "position_ids"
# What a decoder behind an encoder reads and predicts: of a length of its own.
_DECODED = {"decoder_input_ids": 0, "decoder_attention_mask": 0, "labels": -100}


def padded_rows(
    model: nn.Module, rows: Sequence[Row], tokenizer: Any, *, keep_empty: bool = False
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """(which rows, the call) of each batch, rows of similar length together.

    Args:
        model: The Hugging Face model they are for.
        rows: Texts, conversations or tokenised rows, all of one kind.
        tokenizer: Needed for the first two.
        keep_empty: Whether rows without any token are refused; else they are left out.

    Raises:
        InputsError: If there is no tokenizer or template, a row cannot be read, or it
            is longer than the model's positions.
    """
    _check_reader(model, rows, tokenizer)
    pair = is_pair(model)
    made = [_tensors(row, i, tokenizer, pair) for i, row in enumerate(rows)]
    lengths = [len(row[IDS]) for row in made]
    check_lengths(model, lengths)
    if keep_empty and 0 in lengths:
        raise InputsError(
            f"Expected at least one token in every sequence, got none at index "
            f"{lengths.index(0)} of `inputs`: leave it out."
        )
    pad = _padding(tokenizer)
    chunks = similar(lengths, room_for(model))
    return [(chunk, _padded([made[i] for i in chunk], pad)) for chunk in chunks]


def _check_reader(model: nn.Module, rows: Sequence[Row], tokenizer: Any) -> None:
    if model_type(model) is None:
        raise InputsError(
            f"Texts need a Hugging Face model, got {type(model).__name__}: pass "
            "tensors."
        )
    if isinstance(rows[0], Mapping) or callable(tokenizer):
        return
    kind = "texts" if isinstance(rows[0], str) else "conversations"
    raise InputsError(
        f"Expected `tokenizer=` beside {kind}, got {shown(tokenizer)}. Pass the "
        "model's tokenizer itself, for example `AutoTokenizer.from_pretrained(...)`."
    )


def _tensors(row: Row, index: int, tokenizer: Any, pair: bool) -> dict[str, Tensor]:
    """One sequence: its token ids, and what else a tokenised row has, each [seq]."""
    if isinstance(row, Mapping):
        if not pair:
            return _columns(row, index, (IDS, *_PADDED_WITH, _POSITIONS))
        source = [n for n in (IDS, *_PADDED_WITH) if n not in _DECODED]
        decoded = _columns(row, index, tuple(_DECODED))
        if "decoder_input_ids" in decoded:
            mask = torch.ones_like(decoded["decoder_input_ids"])
            decoded = {"decoder_attention_mask": mask, **decoded}
        return {**_columns(row, index, source), **decoded}
    if isinstance(row, str):
        ids = _of_text(row, tokenizer)
    else:
        ids = _of_conversation(row, index, tokenizer)
    return {IDS: torch.tensor(ids, dtype=torch.long)}


def _columns(
    row: Mapping[str, Any], index: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Those of some columns of a row that it has, one value per token each."""
    found = {
        name: as_tensor(f"inputs[{index}][{name!r}]", row[name])
        for name in names
        if row.get(name) is not None
    }
    shape = next(iter(found.values())).shape if found else torch.Size()
    for name, value in found.items():
        if value.shape != shape or value.is_floating_point():
            raise InputsError(
                f"Expected integers of shape {tuple(shape)}, one per token, in "
                f"`inputs[{index}][{name!r}]`, got {value.dtype} of shape "
                f"{tuple(value.shape)}."
            )
    return {name: value.long() for name, value in found.items()}


def _of_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text; one that has its first special token is taken as it is.

    Chat templates rendered to text begin with it, and it must not stand there twice.
    """
    ids = list(tokenizer(text).input_ids)
    first = {
        getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")
    }
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in first:
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    return ids


def _of_conversation(messages: Conversation, index: int, tokenizer: Any) -> list[int]:
    """Token ids of a whole conversation, by the tokenizer's own template."""
    _check_messages(messages, index)
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise MissingExtraError(
            "Chat templates need the package jinja2: pip install 'equiv[report]'."
        ) from error
    try:
        made = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True
        )
    except (TemplateError, ValueError, AttributeError) as error:
        raise InputsError(
            f"The chat template of {type(tokenizer).__name__} cannot be applied to the "
            f"conversation at index {index} of `inputs`: {str(error).rstrip('.')}. "
            "Without a template, pass texts."
        ) from error
    return list(made[IDS])


def _check_messages(messages: Conversation, index: int) -> None:
    """Refuse what a template would print as if it were text."""
    for number, message in enumerate(messages):
        content = message.get("content")
        called = content is None and len(message) > 2  # a call of a tool, say
        if not isinstance(content, str) and not called:
            raise InputsError(
                f"Expected a text as `content` of message {number} in the conversation "
                f"at index {index} of `inputs`, got {shown(content)}."
            )


def _padding(tokenizer: Any) -> int:
    """A token id to pad with; which one does not matter, the mask hides it."""
    names = ("pad_token_id", "eos_token_id")
    found = (getattr(tokenizer, name, None) for name in names)
    return next((n for n in found if n is not None), 0)


def _padded(rows: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Rows padded on the right to one length, and the mask that says so."""
    together = [{"attention_mask": torch.ones_like(row[IDS]), **row} for row in rows]
    fill = {IDS: pad, **_PADDED_WITH, _POSITIONS: 0, **_DECODED}
    names = [name for name in fill if all(name in row for row in together)]
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in together],
            batch_first=True,
            padding_value=fill[name],
        )
        for name in names
    }
