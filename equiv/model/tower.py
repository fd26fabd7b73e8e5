"""How many tokens a tower makes of an image or a sound: what its blocks are given.

An image becomes patches, with one or more tokens beside them, a sound frames that
convolutions made fewer: only the model's own code says how many. It is run up to its
first block, on one sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import EquivError, InputsError
from equiv.model.blocks import Blocks
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.stubs import reached, stubs


def tokens_of(
    model: nn.Module, name: str, arguments: Mapping[str, Any]
) -> tuple[int, ...]:
    """Shape of the tokens in a call, (batch, seq); (batch,) where there are no blocks.

    Args:
        model: A Hugging Face model with one stack of blocks, or none.
        name: Which of the arguments it reads.
        arguments: What it is called with.

    Raises:
        UnsupportedModelError: If its blocks are not known.
        InputsError: If it cannot be run on this.

    Example:
        >>> from equiv.testing.models import example, transformer
        >>> model = transformer("vit")  # reads 8 × 8 pixels, in patches of 4 × 4
        >>> tokens_of(model, "pixel_values", example(model))
        (2, 5)
    """
    rows = len(arguments[name])
    blocks = find_blocks(model)
    if blocks is None:
        return (rows,)
    try:
        hidden = _reached(model, blocks, _first_row(model, arguments, rows))
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        if isinstance(error, EquivError):
            raise
        raise InputsError(
            f"{type(model).__name__} cannot be run on `{name}` of shape "
            f"{tuple(arguments[name].shape)}: {str(error).rstrip('.')}."
        ) from error
    return (rows, *hidden.shape[1:-1])


def _reached(model: nn.Module, blocks: Blocks, arguments: Mapping[str, Any]) -> Tensor:
    """The stream that the blocks are given."""
    with measured(model), stubs(blocks):
        return reached(model, lambda: model(**arguments)).hidden


def _first_row(
    model: nn.Module, arguments: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    """The call with its first sequence alone, in the model's own dtype."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        one = value[:1] if value.ndim and value.shape[0] == rows else value
        return one.to(dtype) if one.is_floating_point() else one

    return {name: first(value) for name, value in arguments.items()}
