"""A weight difference kept as two factors, so that it is never made dense."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.model.packed import unpacked


@dataclass(frozen=True)
class LowRank:
    """ΔW = left @ right, in the shape of the weight it belongs to.

    For LoRA on a `Linear` weight [out, in]: left = scaling · B [out, r], right = A
    [r, in]; for GPT-2's `Conv1D` weight [in, out] the transposes trade places.
    Factors are combined in float64, never in the model's dtype.

    Example:
        >>> delta = LowRank(torch.ones(3, 1), torch.tensor([[1.0, 2.0]]))
        >>> delta.shape, delta.norm() == delta.dense().norm()
        ((3, 2), tensor(True))
    """

    left: Tensor
    right: Tensor
    as_linear: bool = False  # [out, in] whatever the module; see `oriented`

    def oriented(self, module: object) -> "LowRank":
        """In the shape of the module's weight, which is [in, out] for a `Conv1D`.

        Adapter files hold every layer's factors as for a `Linear`, and do not say which
        layers are of the other kind.
        """
        if not self.as_linear:
            return self
        if type(module).__name__ == "Conv1D":
            return LowRank(self.right.T, self.left.T)
        return LowRank(self.left, self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (self.left.shape[0], self.right.shape[1])

    def dense(self) -> Tensor:
        """The difference as a float64 matrix."""
        return self.left.double() @ self.right.double()

    def scaled(self, t: float) -> "LowRank":
        """T times the difference."""
        return LowRank(self.left.double() * t, self.right, self.as_linear)

    def norm(self) -> Tensor:
        """Frobenius norm: ‖LR‖² = tr(LᵀL · RRᵀ)."""
        left, right = self.left.double(), self.right.double()
        square = ((left.T @ left) * (right @ right.T)).sum()
        return square.clamp_min(0).sqrt()


Delta = Tensor | LowRank


def norm_of(delta: Delta) -> float:
    """Frobenius norm of a dense or low-rank difference, summed in float64."""
    if isinstance(delta, LowRank):
        return float(delta.norm())
    return float(torch.linalg.vector_norm(unpacked(delta), dtype=torch.float64))
