"""Forms of steering: maps h → shift that are added to an activation at a site."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

FORMS = ("vector", "affine")


class Steering(ABC):
    """Any map h → shift; `steering(h)` is what is added at the site.

    `h` has shape [*batch, d]; the shift has the same shape, dtype and device.
    """

    @abstractmethod
    def __call__(self, h: Tensor) -> Tensor:
        """The shift for activations `h` [*batch, d]."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """How many numbers the map has."""

    @abstractmethod
    def scaled(self, strength: float) -> "Steering":
        """The same map, `strength` times as strong."""


@dataclass(frozen=True)
class Vector(Steering):
    """A fixed vector: shift = v, whatever h is.

    Example:
        >>> import torch
        >>> steering = Vector(torch.tensor([1.0, -1.0]))
        >>> steering(torch.zeros(3, 2)).shape, steering.num_parameters
        (torch.Size([3, 2]), 2)
    """

    vector: Tensor  # [d]

    def __call__(self, h: Tensor) -> Tensor:
        """The vector, once per row of `h`."""
        return self.vector.to(h.device, h.dtype).expand_as(h)

    @property
    def num_parameters(self) -> int:
        """The width d."""
        return self.vector.numel()

    def scaled(self, strength: float) -> "Vector":
        """The vector times `strength`."""
        return Vector(self.vector * strength)


@dataclass(frozen=True)
class Affine(Steering):
    """A low-rank affine map: shift = up (down h) + bias.

    Example:
        >>> import torch
        >>> steering = Affine(torch.eye(2)[:1], torch.tensor([[0.0], [2.0]]),
        ...                   torch.zeros(2))
        >>> steering(torch.tensor([3.0, 5.0]))
        tensor([0., 6.])
    """

    down: Tensor  # [r, d]
    up: Tensor  # [d, r]
    bias: Tensor  # [d]

    def __call__(self, h: Tensor) -> Tensor:
        """Up (down h) + bias, computed in the dtype of `h`."""
        down, up, bias = (
            part.to(h.device, h.dtype) for part in (self.down, self.up, self.bias)
        )
        return (h @ down.T) @ up.T + bias

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    @property
    def num_parameters(self) -> int:
        """2 r d + d; a map of full rank counts as its matrix, d² + d."""
        d = self.bias.numel()
        return min(2 * self.rank * d, d * d) + d

    def scaled(self, strength: float) -> "Affine":
        """Up-projection and bias times `strength`."""
        return Affine(self.down, self.up * strength, self.bias * strength)


@dataclass(frozen=True)
class Overwrite(Steering):
    """The oracle: whatever h is, h + shift is `target`, per token.

    No parametrisation: it needs the tuned model's own activations.
    """

    target: Tensor  # like h

    def __call__(self, h: Tensor) -> Tensor:
        """Target − h."""
        return self.target.to(h.device, h.dtype) - h

    @property
    def num_parameters(self) -> int:
        """Zero: nothing is fitted."""
        return 0

    def scaled(self, strength: float) -> "Overwrite":
        """Not defined for strengths other than 1."""
        if strength != 1:
            raise ValueError(f"Expected strength 1 for an overwrite, got {strength}.")
        return self
