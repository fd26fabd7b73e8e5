"""The weight differences in one block, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiv.steering.weights.deltas import as_dense, transposed
from equiv.steering.weights.halves import Layer, layer_at
from equiv.update.low_rank import Delta


@dataclass(frozen=True)
class Difference:
    """What is added to one layer.

    Attributes:
        layer: The layer in the base.
        weight: ΔW, [out, in] whatever the module, or [d] of a LayerNorm; `None` for
            zero.
        bias: Δb in float64; `None` for zero.
    """

    layer: Layer
    weight: Delta | None
    bias: Tensor | None

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """The base's bias and Δb, with zeros for what there is not."""
        own = self.layer.bias
        zero = torch.zeros(
            self.layer.shape[0], dtype=torch.float64, device=self.layer.device
        )
        return (
            zero if own is None else own,
            zero if self.bias is None else self.bias,
        )


@dataclass(frozen=True)
class Differences:
    """The differences in one block.

    Attributes:
        model: The base.
        prefix: Path of the block.
        deltas: Parameter name → difference, of the whole model.
    """

    model: nn.Module
    prefix: str
    deltas: Mapping[str, Delta]

    def changes(self, path: str) -> bool:
        """Whether a layer's weight or bias is changed; `path` from the block."""
        name = f"{self.prefix}.{path}"
        return f"{name}.weight" in self.deltas or f"{name}.bias" in self.deltas

    def at(self, path: str) -> Difference:
        """What is added to a layer.

        Raises:
            UnsupportedModelError: If it is no plain layer, or shares its weight.
        """
        layer = layer_at(self.model, f"{self.prefix}.{path}", adapted=True)
        weight = self.deltas.get(f"{layer.name}.weight")
        if weight is not None and layer.is_conv1d:
            weight = transposed(weight)
        return Difference(layer, weight, self.bias(path))

    def bias(self, path: str) -> Tensor | None:
        """What is added to the bias of a layer, of whatever kind."""
        found = self.deltas.get(f"{self.prefix}.{path}.bias")
        return None if found is None else as_dense(found)
