"""Which blocks a model has: by its family's line in the table, or by their looks."""

from torch import nn

from equiv.errors import UnsupportedModelError
from equiv.model.architecture import Architecture as Architecture
from equiv.model.blocks import Blocks as Blocks
from equiv.model.blocks import list_of_blocks
from equiv.model.blocks import model_type as model_type
from equiv.model.discovery import discover
from equiv.model.known_families import FAMILIES as FAMILIES
from equiv.model.known_families import REFUSED, architecture
from equiv.model.known_pairs import pair_of
from equiv.model.pairing import both_stacks


def is_pair(model: nn.Module) -> bool:
    """Whether this is an encoder–decoder of a known family, with both stacks."""
    family = model_type(model)
    pair = None if family is None else pair_of(family, model.config)
    return pair is not None and both_stacks(model, pair).encoder is not None


def find_blocks(model: nn.Module) -> Blocks | None:
    """The blocks of a Hugging Face model; `None` for a module that is one stage.

    Of an encoder–decoder those of both stacks, the encoder's first.

    Of a family that is not in the table they are looked for, which runs the model on a
    few random tokens, once.

    Raises:
        UnsupportedModelError: If the blocks are not found, or it is not proven that
            they are the model's.
    """
    family = model_type(model)
    if family is None:
        return None
    if family in REFUSED:
        raise UnsupportedModelError(
            f"`{type(model).__name__}` (model type {family!r}) cannot be measured: "
            f"{REFUSED[family]}."
        )
    pair = pair_of(family, model.config)
    if pair is not None:
        return both_stacks(model, pair)
    known = architecture(family, model.config)
    if known is None:
        return discover(model)
    path, modules = list_of_blocks(model, known)
    return Blocks(path, tuple(modules), known)
