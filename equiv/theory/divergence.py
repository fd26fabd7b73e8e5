"""How far an output is from the tuned model's, exact also where it is tiny.

With logits, KL(tuned ‖ output). With δ their difference, centred so that Σ p δ = 0,

    KL = log Σ p e^δ − Σ p δ = log(1 + Σ p (e^δ − 1 − δ)),

whose terms are all positive: where δ is 1e-6 and KL 1e-12, p (log p − log q) would be
a sum of terms of size 1e-6 that cancel. To second order KL is ½ Σ p δ² = ½ δᵀ F δ, with
F = diag p − p pᵀ.

Without logits it is half of the squared difference, and F the identity.
"""

import torch
from torch import Tensor

from equiv.theory.norms import Euclidean, Fisher, Norm


def divergence(tuned: Tensor, output: Tensor, classes: bool = True) -> Tensor:
    """KL(softmax tuned ‖ softmax output), or half the squared difference, per token.

    Args:
        tuned: [tokens, vocabulary or d], float64.
        output: The same.
        classes: Whether they are logits.

    Example:
        >>> even = torch.zeros(1, 2, dtype=torch.float64)
        >>> odd = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
        >>> round(float(divergence(even, odd)), 4)  # ½ ln(½/¼) + ½ ln(½/¾)
        0.1438
        >>> near = torch.tensor([[1e-9, -1e-9]], dtype=torch.float64)
        >>> float(divergence(even, near))  # ½ δ²
        5e-19
    """
    change = output - tuned
    if not classes:
        return change.square().sum(-1) / 2
    p = torch.softmax(tuned, -1)
    centred = change - (p * change).sum(-1, keepdim=True)
    return torch.log1p((p * _beyond_first(centred)).sum(-1))


def quadratic(change: Tensor, base: Tensor, classes: bool = True) -> Tensor:
    """½ δᵀ F δ per token, F at the base: the divergence to second order."""
    norm: Norm = Fisher() if classes else Euclidean()
    return norm.squared(change, base) / 2


def _beyond_first(x: Tensor) -> Tensor:
    """E^x − 1 − x; by its series where the difference would cancel."""
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return torch.where(x.abs() < 1e-2, series, torch.expm1(x) - x)
