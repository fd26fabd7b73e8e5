"""How large a change is: norms that claims are measured in.

A norm answers for the output of a model, token by token. Claims about a change inside
the model carry it to the output first (`Setting.carried`) if the norm asks for that.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from equiv.arguments import as_choice


class Norm(ABC):
    """A length of changes, per token.

    Attributes:
        name: What it is called on the command line.
        of_logits: Whether it is defined on logits only.
    """

    name: ClassVar[str]
    of_logits: ClassVar[bool]

    @abstractmethod
    def squared(self, change: Tensor, base: Tensor) -> Tensor:
        """The squared length of every change.

        Args:
            change: [*, d].
            base: What is changed, [*, d].

        Returns:
            [*], never negative.
        """

    def total(self, change: Tensor, base: Tensor) -> float:
        """The length of all changes together: the root of the sum of their squares."""
        return float(self.squared(change, base).sum().sqrt())


class Euclidean(Norm):
    """‖c‖₂, of anything.

    Example:
        >>> Euclidean().total(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        5.0
    """

    name = "euclidean"
    of_logits = False

    def squared(self, change: Tensor, base: Tensor) -> Tensor:
        """Σ c²."""
        return (change * change).sum(-1)


class Fisher(Norm):
    """√(cᵀ F c) with F = diag p − p pᵀ, p = softmax of the base's logits.

    Half its square is the KL divergence that the change makes, to second order. It does
    not see what all logits have in common.

    Example:
        >>> even = torch.zeros(1, 2)  # p = ½, ½: F = ¼ (1, −1)ᵀ(1, −1)
        >>> Fisher().total(torch.tensor([[2.0, 0.0]]), even)
        1.0
        >>> Fisher().total(torch.tensor([[2.0, 2.0]]), even)
        0.0
    """

    name = "fisher"
    of_logits = True

    def squared(self, change: Tensor, base: Tensor) -> Tensor:
        """The variance of c under p, as a sum of squares: rounding keeps its sign."""
        p = torch.softmax(base, -1)
        mean = (p * change).sum(-1, keepdim=True)
        return (p * (change - mean) ** 2).sum(-1)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (Euclidean(), Fisher())}


def as_norm(norm: str | Norm) -> Norm:
    """A norm by name, or one of the caller's own.

    Raises:
        ArgumentError: If there is none of that name.

    Example:
        >>> as_norm("fisher").name
        'fisher'
    """
    return norm if isinstance(norm, Norm) else NORMS[as_choice("norm", norm, [*NORMS])]
