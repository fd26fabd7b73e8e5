"""A table of relative positions that the first block holds and every block uses.

T5's first block makes a bias of it and hands it to the others. Here every block makes
it anew of the table, which so counts among the parameters of each of them: what an
update of it does is then seen block by block.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from equiv.model.blocks import Blocks

TABLE = "relative_attention_bias.weight"


def sharing(blocks: Blocks, layer: int) -> str:
    """The name of the attention whose table a later block uses; else empty."""
    path = blocks.known(layer).shares_bias
    first = 0 if layer < blocks.first else blocks.first
    return f"{blocks.name(first)}.{path}" if path and layer > first else ""


class _Bias(nn.Module):
    """The bias as a function of the attention's parameters."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention: Any = attention

    def forward(self, length: int) -> Tensor:
        return self.attention.compute_bias(length, length)


def position_bias(
    attention: nn.Module, name: str, tensors: Mapping[str, Tensor], length: int
) -> Tensor:
    """What is added to the scores of a sequence, [1, heads, length, length].

    Args:
        attention: The first block's attention.
        name: Its name in the model.
        tensors: Parameters by full name, the table among them.
        length: Tokens.
    """
    own = {f"attention.{TABLE}": tensors[f"{name}.{TABLE}"]}
    return functional_call(_Bias(attention), own, (length,))
