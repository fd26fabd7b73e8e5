"""An update by where it lies: in which block, or outside all of them.

Steering at block_out sees what blocks do. What an update changes in the embedding lies
before the first of these sites, and what it changes in the final norm or the head after
the last one.
"""

from torch import nn

from equiv.errors import UnsupportedModelError
from equiv.model.blocks import Blocks
from equiv.model.families import find_blocks
from equiv.update.update import Update


def blocks_of(model: nn.Module) -> Blocks:
    """The model's blocks.

    Raises:
        UnsupportedModelError: If it has none.
    """
    blocks = find_blocks(model)
    if blocks is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks, so nothing is steered at block_out."
        )
    return blocks


def in_layer(model: nn.Module, update: Update, layer: int) -> Update | None:
    """The part of the update in one block, if there is one."""
    return _part(update, [f"{blocks_of(model).name(layer)}."], inside=True)


def in_blocks(model: nn.Module, update: Update) -> Update | None:
    """The part of the update in the blocks, if there is one."""
    return _part(update, _prefixes(model), inside=True)


def outside_blocks(model: nn.Module, update: Update) -> Update | None:
    """The part of the update in no block, if there is one."""
    return _part(update, _prefixes(model), inside=False)


def _prefixes(model: nn.Module) -> list[str]:
    blocks = blocks_of(model)
    return [f"{blocks.name(layer)}." for layer in range(len(blocks.modules))]


def _part(update: Update, prefixes: list[str], *, inside: bool) -> Update | None:
    names = [n for n in update.deltas if n.startswith(tuple(prefixes)) == inside]
    if len(names) == len(update.deltas):
        return update
    return update.restricted(names=names) if names else None
