"""Weights that a library keeps quantised, in tensors that can give their values back.

Such a tensor looks like any other from outside, with the shape and a floating dtype of
the weight that it stands for, but knows few operations. What reads weights here asks
for the values, one weight at a time; the model keeps what it has. torchao's are so.
"""

from torch import Tensor, nn

_OWN = (Tensor, nn.Parameter)


def is_packed(tensor: Tensor) -> bool:
    """Whether this is of a kind with a `dequantize` of its own.

    Example:
        >>> import torch
        >>> is_packed(torch.ones(2)), is_packed(nn.Parameter(torch.ones(2)))
        (False, False)
    """
    kind = type(tensor)
    return kind not in _OWN and kind.dequantize is not Tensor.dequantize


def unpacked(tensor: Tensor) -> Tensor:
    """The values of a tensor, without its history; itself, if it is not packed.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> torch.equal(unpacked(x), x)
        True
    """
    return tensor.dequantize().detach() if is_packed(tensor) else tensor.detach()


def packed_kinds(model: nn.Module) -> tuple[str, ...]:
    """The kinds of packed tensors among a model's parameters, by name."""
    kinds = {type(p).__name__ for p in model.parameters() if is_packed(p)}
    return tuple(sorted(kinds))
