"""Decoders that read the encoder's text again, as classifiers on top of them have it.

What the model itself gives its decoder is taken, by running it up to there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equiv.model.stubs import replaced_forward


def read_again(
    model: nn.Module, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """What a model gives its decoder by itself: its text again, and the mask of that.

    Args:
        model: A Hugging Face encoder–decoder.
        arguments: What it is called with.

    Returns:
        Token ids and the tokens among them that count, if the arguments have a mask;
        `None` where a model gives its decoder nothing, or generates: then the decoder
        has something else to say.
    """
    whole: Any = model
    if whole.can_generate():
        return None
    encoder, decoder = whole.get_encoder(), whole.get_decoder()
    source = arguments.get("attention_mask")

    def encode(*_: Any, **__: Any) -> tuple[Tensor]:
        return (torch.zeros(1, 1, 1),)

    def decode(*_: Any, **given: Any) -> None:
        raise _Reached(given["input_ids"])

    with replaced_forward(encoder, encode), replaced_forward(decoder, decode):
        try:
            whole(**arguments)
        except _Reached as reached:
            if reached.ids is not None:
                return reached.ids, _shifted_mask(source, reached.ids)
        except (ValueError, TypeError, KeyError):
            return None  # it asks for what its decoder reads
    return None


class _Reached(Exception):
    """Raised in place of the decoder's forward."""

    def __init__(self, ids: Tensor | None) -> None:
        self.ids = ids


def _shifted_mask(source: object, ids: Tensor) -> Tensor | None:
    """The mask of a text that is shifted by one: its start token counts too."""
    if not isinstance(source, Tensor) or source.shape != ids.shape:
        return None
    return torch.cat([torch.ones_like(source[:, :1]), source[:, :-1]], dim=1)
