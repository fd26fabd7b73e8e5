"""The fixed vector: one shift for every token."""

from dataclasses import dataclass

from torch import Tensor

from equiv.steering.forms.form import Steering, moved


@dataclass(frozen=True)
class Vector(Steering):
    """A fixed vector: shift = v, whatever h is.

    Example:
        >>> import torch
        >>> steering = Vector(torch.tensor([1.0, -1.0]))
        >>> steering(torch.zeros(3, 2)).shape, steering.num_parameters
        (torch.Size([3, 2]), 2)
    """

    vector: Tensor  # [e]

    def __call__(self, h: Tensor) -> Tensor:
        """The vector, once per row of `h`."""
        return moved(h, self.vector).expand(*h.shape[:-1], -1)

    @property
    def num_parameters(self) -> int:
        """The width e."""
        return self.vector.numel()

    def scaled(self, strength: float) -> "Vector":
        """The vector times `strength`."""
        return Vector(self.vector * strength)
