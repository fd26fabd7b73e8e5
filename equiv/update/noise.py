"""Random differences of a given size, for trying things out."""

import torch
from torch import nn

from equiv.update.low_rank import Delta, norm_of


def noise(
    model: nn.Module, relative_norm: float, seed: int
) -> tuple[dict[str, Delta], dict[str, float]]:
    """Normal differences of a model's parameters, and the parameters' norms.

    Each has `relative_norm` times the norm of its parameter; parameters that are zero
    everywhere are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    norms: dict[str, float] = {}
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        size = norm_of(weight.detach())
        if size == 0:
            continue
        scaled = drawn * (relative_norm * size / drawn.norm())
        deltas[name], norms[name] = scaled.to(weight.device), size
    return deltas, norms
