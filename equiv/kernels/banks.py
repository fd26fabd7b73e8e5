"""Banks of steers of different ranks as one pair of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equiv.errors import ArgumentError


def stack_ranks(parts: Sequence[Tensor]) -> Tensor:
    """Weights of different ranks in one tensor, the smaller ones filled with zeros.

    A row of zeros in `down` and in `up` adds nothing, exactly: φ(0) = 0 for every
    activation here.

    Args:
        parts: Of each steer `down` or `up` [r, d], or its bias [r].

    Returns:
        [n, largest r, d], or [n, largest r].

    Raises:
        ArgumentError: If there are none, or they differ in more than the rank.

    Example:
        >>> stack_ranks([torch.ones(1, 3), torch.ones(2, 3)]).sum(-1)
        tensor([[3., 0.],
                [3., 3.]])
    """
    if len({(part.ndim, *part.shape[1:]) for part in parts}) != 1:
        raise ArgumentError(
            "Expected tensors [r, d] that differ in r only, got "
            f"{[tuple(part.shape) for part in parts]}."
        )
    rank = max(part.shape[0] for part in parts)
    filled = [
        torch.cat([p, p.new_zeros(rank - p.shape[0], *p.shape[1:])]) for p in parts
    ]
    return torch.stack(filled)
