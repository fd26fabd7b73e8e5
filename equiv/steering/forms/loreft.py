"""LoReFT: edit h inside one subspace of orthonormal directions.

Symbols: R [r, d] with R Rᵀ = I, W [r, d], b [r]:

    shift = Rᵀ (W h + b − R h)

It is the affine map with up = Rᵀ, down = W − R, bias = Rᵀ b. The other way, an affine
map whose bias lies in the columns of `up` is a LoReFT of the same rank; any other is
one of rank r + 1, with the bias as one direction more. Both ways are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from equiv.errors import ArgumentError
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering, like

# How far R Rᵀ may be from I: a bfloat16 file's rounding of unit vectors.
_ORTHONORMAL = 2.0**-6


@dataclass(frozen=True)
class LoReFT(Steering):
    """Low-rank linear subspace edit (Wu et al. 2024): shift = Rᵀ (W h + b − R h).

    Example:
        >>> steering = LoReFT(torch.eye(2)[:1], torch.zeros(1, 2), torch.ones(1))
        >>> steering(torch.tensor([3.0, 5.0]))  # the first coordinate becomes 1
        tensor([-2.,  0.])
        >>> LoReFT.from_affine(steering.affine()).num_parameters  # 2 r d + r
        5
    """

    rotation: Tensor  # R, [r, d], orthonormal rows
    weight: Tensor  # W, [r, d]
    bias: Tensor  # b, [r]

    def __post_init__(self) -> None:
        if self.rotation.is_meta:
            return
        gram = self.rotation.double() @ self.rotation.double().T
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        off = float((gram - eye).abs().max()) if len(gram) else 0.0
        if not off <= _ORTHONORMAL:
            raise ArgumentError(
                "Expected `rotation` with orthonormal rows, but R Rᵀ is up to "
                f"{off:.2g} from the identity. `torch.linalg.qr` makes rows "
                "orthonormal; `Affine` needs none."
            )

    def __call__(self, h: Tensor) -> Tensor:
        """Rᵀ (W h + b − R h), with W − R formed first: two thin products."""
        rotation, weight, bias = like(h, self.rotation, self.weight, self.bias)
        return linear(h, weight - rotation, bias) @ rotation

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.rotation.shape[0]

    @property
    def num_parameters(self) -> int:
        """2 r d + r."""
        return self.rotation.numel() + self.weight.numel() + self.bias.numel()

    def scaled(self, strength: float) -> "LoReFT":
        """R h + strength (W h + b − R h) in the subspace: still a LoReFT."""
        weight = self.rotation + (self.weight - self.rotation) * strength
        return LoReFT(self.rotation, weight, self.bias * strength)

    def affine(self) -> Affine:
        """The same map with up = Rᵀ, down = W − R, bias = Rᵀ b."""
        return Affine(
            self.weight - self.rotation, self.rotation.T, self.rotation.T @ self.bias
        )

    @classmethod
    def from_affine(cls, affine: Affine) -> "LoReFT":
        """The same map as a LoReFT, exactly.

        Its rank is that of `up` together with the bias: the affine map's own, or one
        more.

        Raises:
            ArgumentError: If it writes another width than it reads.
        """
        (rank, d), e = affine.down.shape, affine.up.shape[0]
        if d != e:
            raise ArgumentError(
                "A LoReFT writes what it reads: expected one width, got a map from "
                f"{d} to {e}."
            )
        up, down = affine.up.double(), affine.down.double()
        bias = up.new_zeros(d) if affine.bias is None else affine.bias.double()
        columns = torch.cat([up, bias[:, None]], 1)
        left, values, _ = torch.linalg.svd(columns, full_matrices=False)
        tiny = max(columns.shape) * torch.finfo(up.dtype).eps
        kept = int((values > tiny * values.max().clamp_min(1e-300)).sum())
        rotation = left[:, : max(kept, min(1, rank))].T  # [r', d]
        weight = rotation @ up @ down + rotation
        return cls(rotation, weight, rotation @ bias)
