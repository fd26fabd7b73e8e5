"""What the decoder of an encoder–decoder reads, and which of its tokens count.

A batch gives it as `decoder_input_ids` (or `decoder_inputs_embeds`), or as `labels`,
from which the model makes them: shifted by one, behind its start token. The logits at
a position predict the label there. A model that predicts no tokens, a classifier say,
may have its decoder read the encoder's text again: then that is taken. Where no
`decoder_attention_mask` says which tokens count, those up to the last label do, or all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import InputsError
from equiv.model.batches import MAIN, Batch
from equiv.model.positions import given_positions, limit_of
from equiv.model.read_again import read_again

GIVEN = ("decoder_input_ids", "decoder_inputs_embeds")
NO_LABEL = -100


@dataclass(frozen=True)
class DecoderInputs:
    """What a decoder reads.

    Attributes:
        arguments: What the model is called with for it.
        mask: Tokens that count, bool [batch, seq].
        labels: What each of them should predict, −100 for nothing.
    """

    arguments: Mapping[str, Tensor]
    mask: Tensor
    labels: Tensor | None


def decoder_inputs(
    model: nn.Module, arguments: Mapping[str, Any], labels: Tensor | None
) -> DecoderInputs:
    """What the decoder reads, from the arguments of a call.

    Args:
        model: A Hugging Face encoder–decoder.
        arguments: What it is called with, without the labels.
        labels: The labels [batch, seq], if there are some.

    Raises:
        InputsError: If nothing says what the decoder reads, or it does not fit.
    """
    words = labels if labels is not None and labels.ndim == 2 else None
    if words is not None and not words.is_floating_point():
        config: Any = model.config
        pad = getattr(config, "pad_token_id", None)
        ends = pad == getattr(config, "eos_token_id", None)
        words = _ended(words.long(), pad, ends=ends)
    name = next((n for n in GIVEN if arguments.get(n) is not None), None)
    told = arguments.get("decoder_attention_mask")
    if name is not None:
        ids = arguments[name]
    elif words is not None:
        name, ids = GIVEN[0], _shifted(model, words)
    elif again := read_again(model, arguments):
        name, (ids, told) = GIVEN[0], again
    else:
        raise InputsError(_missing(model))
    ids = ids.long() if name == GIVEN[0] else ids
    mask = _mask(told, ids, words)
    _check(model, ids, arguments, mask)
    if words is not None and words.shape == mask.shape:
        labels = words.masked_fill(~mask, NO_LABEL)
    return DecoderInputs({name: ids}, mask, labels)


def batch_of_both(
    model: nn.Module,
    name: str,
    arguments: Mapping[str, Any],
    source: Tensor,
    labels: Any,
) -> Batch:
    """A batch of an encoder–decoder: its mask is that of the decoder's tokens.

    Args:
        model: The model.
        name: Which of the arguments the encoder reads.
        arguments: What it is called with, without the labels.
        source: Tokens that count of what the encoder reads, bool [batch, source].
        labels: The labels, if there are some.

    Raises:
        InputsError: As `decoder_inputs`; or if the encoder would not run.
    """
    if arguments.get("encoder_outputs") is not None:
        raise InputsError(
            "Expected what the encoder reads, got `encoder_outputs`: its blocks would "
            "not run. Pass `input_ids`."
        )
    given = labels if isinstance(labels, Tensor) else None
    found = decoder_inputs(model, arguments, given)
    if name not in MAIN:  # sounds: the encoder has positions of its own
        config: Any = model.config
        source = source[:, :1].expand(-1, config.max_source_positions)
    return Batch(
        {**arguments, **found.arguments},
        found.mask,
        found.labels,
        index=tuple(range(len(source))),
        source=source,
    )


def _missing(model: nn.Module) -> str:
    return (
        f"Expected `labels` or `decoder_input_ids` in the inputs of "
        f"{type(model).__name__}: they say what its decoder reads. Of texts pass rows "
        'such as {"text": "…", "target": "…"} and `tokenizer=`. If only the encoder '
        "is of interest, pass it as the model: `model.get_encoder()`."
    )


def _ended(labels: Tensor, pad: int | None, *, ends: bool = False) -> Tensor:
    """Labels without the padding at their end, as tokenizers leave it there.

    Args:
        labels: They, [batch, seq].
        pad: The token for padding.
        ends: Whether it also ends a text: then the first of them is kept.

    Example:
        >>> labels = torch.tensor([[5, 0, 7, 1, 0, 0]])
        >>> _ended(labels, pad=0)
        tensor([[   5,    0,    7,    1, -100, -100]])
        >>> _ended(labels, pad=0, ends=True)
        tensor([[   5,    0,    7,    1,    0, -100]])
    """
    if pad is None:
        return labels
    padding = (labels == pad) | (labels == NO_LABEL)
    behind = padding.flip(1).cumprod(1).flip(1).bool()
    if ends:
        behind[:, 1:] &= behind[:, :-1].clone()
        behind[:, 0] = False
    return labels.masked_fill(behind, NO_LABEL)


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """The labels as the model itself shifts them."""
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels)
    config: Any = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None:
        raise InputsError(
            f"Expected `decoder_input_ids`: {type(model).__name__} does not say which "
            "token its decoder starts with (`config.decoder_start_token_id`)."
        )
    rest = labels[:, :-1].masked_fill(labels[:, :-1] == NO_LABEL, pad or 0)
    return torch.cat([torch.full_like(labels[:, :1], start), rest], dim=1)


def _mask(given: object, ids: Tensor, labels: Tensor | None) -> Tensor:
    """The tokens that count, bool [batch, seq]."""
    shape = ids.shape[:2]
    if given is not None:
        if not isinstance(given, Tensor) or given.shape != shape:
            got = tuple(getattr(given, "shape", ())) or type(given).__name__
            raise InputsError(
                f"Expected a `decoder_attention_mask` of shape {tuple(shape)}, got "
                f"{got}."
            )
        return given.bool()
    if labels is None or labels.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=ids.device)
    return (labels != NO_LABEL).flip(1).cumsum(1).flip(1) > 0


def _check(
    model: nn.Module, ids: Tensor, arguments: Mapping[str, Any], mask: Tensor
) -> None:
    """Refuse what does not go with the encoder's inputs, or is too long."""
    rows = {len(v) for v in arguments.values() if isinstance(v, Tensor) and v.ndim > 1}
    if len(rows | {len(ids)}) > 1:
        raise InputsError(
            "Expected as many sequences for the decoder as for the encoder, got "
            f"{len(ids)} among {sorted(rows | {len(ids)})}."
        )
    config: Any = model.config
    limit = getattr(config, "max_target_positions", None) or limit_of(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputsError(
            f"Expected at most {limit} tokens for the decoder (its positions), got "
            f"{ids.shape[1]}. Cut or split them."
        )
    given_positions(model, {"attention_mask": mask}, mask)  # refused, where columns are
