"""One stage of a model: what it has, takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from equiv.model.blocks import Blocks
from equiv.model.position_bias import TABLE, sharing
from equiv.model.sites import FLOW, STREAM


@dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Attributes:
        name: "embed", "block", "bridge", "head" or "module".
        layer: Index of the block; the number of blocks for the head, else −1.
        names: Full names of its parameters and buffers.
        sites: Sites inside it whose activations it returns.
        output: The name its output goes by among the activations.
        encodes: Whether its tokens are those of an encoder before a decoder.
    """

    name: str
    layer: int
    names: tuple[str, ...]
    sites: tuple[str, ...]
    output: str
    encodes: bool = False


def block_stage(
    blocks: Blocks, layer: int, inside: tuple[str, ...], asked: Sequence[str]
) -> Stage:
    """The stage of one block.

    Args:
        blocks: The model's blocks.
        layer: Which of them.
        inside: Full names of the block's parameters and buffers.
        asked: Sites wanted anywhere; those that the block has are captured.
    """
    encodes = layer < blocks.first
    behind = blocks.encoder is not None and not encodes
    crosses = layer in blocks.layers_with("cross_out")
    sites = tuple(n for n in FLOW if n in asked and (crosses or n != "cross_out"))
    if shared := sharing(blocks, layer):
        inside = (*inside, f"{shared}.{TABLE}")
    output = STREAM if behind else "block_out"
    return Stage("block", layer, inside, sites, output, encodes)
