"""The low-rank MLP: the one form that is not affine in what it reads.

    shift = up φ(down h + inner) + bias

The paper's adapter has neither `inner` nor `bias`, φ = SiLU, and starts with up = 0: an
exact no-op. Since SiLU(x) = x/2 + O(x²), at small ‖down h‖ it is half a linear map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from equiv.arguments import as_choice, as_integer, as_seed
from equiv.steering.forms.form import Steering, moved

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class LowRankMLP(Steering):
    """A low-rank MLP: shift = up φ(down h + inner) + bias.

    Example:
        >>> steering = LowRankMLP.zero(4, rank=2, seed=0)
        >>> steering(torch.ones(3, 4)).abs().max()
        tensor(0.)
        >>> steering.num_parameters
        16
    """

    down: Tensor  # [r, d]
    up: Tensor  # [e, r]
    inner: Tensor | None = None  # [r]
    bias: Tensor | None = None  # [e]
    activation: str = "silu"

    def __post_init__(self) -> None:
        as_choice("activation", self.activation, tuple(ACTIVATIONS))

    def __call__(self, h: Tensor) -> Tensor:
        """Up φ(down h + inner) + bias."""
        inner = None if self.inner is None else moved(h, self.inner)
        bias = None if self.bias is None else moved(h, self.bias)
        hidden = functional.linear(h, moved(h, self.down), inner)
        hidden = ACTIVATIONS[self.activation](hidden)
        return functional.linear(hidden, moved(h, self.up), bias)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    @property
    def num_parameters(self) -> int:
        """R (d + e), and r and e for the biases it has."""
        parts = (self.down, self.up, self.inner, self.bias)
        return sum(part.numel() for part in parts if part is not None)

    def scaled(self, strength: float) -> "LowRankMLP":
        """Up-projection and bias times `strength`."""
        bias = None if self.bias is None else self.bias * strength
        return LowRankMLP(
            self.down, self.up * strength, self.inner, bias, self.activation
        )

    @classmethod
    def zero(
        cls, width: int, *, rank: int = 8, activation: str = "silu", seed: int = 0
    ) -> "LowRankMLP":
        """The paper's adapter as it starts: no biases, up = 0, so an exact no-op.

        `down` is uniform in ±10⁻³/√d, as `kaiming_uniform_(a=√5)` times 10⁻³ draws it.

        Raises:
            ArgumentError: If an argument is outside its set.
        """
        d, r = as_integer("width", width, 1), as_integer("rank", rank, 1)
        generator = torch.Generator().manual_seed(as_seed(seed))
        drawn = 2 * torch.rand(r, d, generator=generator) - 1
        return cls(
            drawn * (1e-3 / math.sqrt(d)), torch.zeros(d, r), activation=activation
        )
