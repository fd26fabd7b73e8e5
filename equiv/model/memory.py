"""The decoder's stream with the encoder's output beside it, as one tensor.

Every block of a decoder reads what the encoder gives, so that a change of it arrives
in each of them. What the decoder's stages hand on is therefore

    [batch, source + seq, d]: the encoder's output, then the decoder's stream

and whatever carries a stream, a tangent or a gradient from stage to stage carries
both. A block changes the second part alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

NAME = "encoder_hidden_states"  # what the blocks of transformers call it


def packed(memory: Tensor, hidden: Tensor) -> Tensor:
    """The encoder's output and the decoder's stream as one.

    Args:
        memory: [batch, source, d].
        hidden: [batch, seq, d].

    Example:
        >>> packed(torch.zeros(1, 2, 4), torch.ones(1, 3, 4)).shape
        torch.Size([1, 5, 4])
    """
    return torch.cat([memory, hidden], dim=1)


def parted(stream: Tensor, source: int) -> tuple[Tensor, Tensor]:
    """The encoder's output and the decoder's stream, by the length of the first."""
    return stream[:, :source], stream[:, source:]


def by_name(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """What a block of a decoder reads of the encoder, and its other arguments by name.

    Args:
        block: The block.
        args: What it is called with after the hidden state.
        kwargs: What else, by name.
    """
    names = list(inspect.signature(type(block).forward).parameters)[2:]
    rest = dict(zip(names, args, strict=False)) | kwargs
    return rest.pop(NAME, None), rest
