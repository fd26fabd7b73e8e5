"""The low-rank affine map; linear where it has no bias."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from equiv.steering.forms.form import Steering, moved


@dataclass(frozen=True)
class Affine(Steering):
    """A low-rank affine map: shift = up (down h) + bias.

    Without a bias it is linear: the adapter of the paper's main results.

    Example:
        >>> import torch
        >>> steering = Affine(torch.eye(2)[:1], torch.tensor([[0.0], [2.0]]),
        ...                   torch.zeros(2))
        >>> steering(torch.tensor([3.0, 5.0]))
        tensor([0., 6.])
        >>> Affine(torch.zeros(1, 2), torch.zeros(2, 1)).num_parameters
        4
    """

    down: Tensor  # [r, d]
    up: Tensor  # [e, r]
    bias: Tensor | None = None  # [e]

    def __call__(self, h: Tensor) -> Tensor:
        """Up (down h) + bias."""
        bias = None if self.bias is None else moved(h, self.bias)
        return linear(linear(h, moved(h, self.down)), moved(h, self.up), bias)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    @property
    def num_parameters(self) -> int:
        """R (d + e), and e for the bias; a map of full rank counts as its matrix."""
        (rank, d), e = self.down.shape, self.up.shape[0]
        return min(rank * (d + e), d * e) + (0 if self.bias is None else e)

    def scaled(self, strength: float) -> "Affine":
        """Up-projection and bias times `strength`."""
        bias = None if self.bias is None else self.bias * strength
        return Affine(self.down, self.up * strength, bias)
