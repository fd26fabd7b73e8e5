"""Which blocks a model has: by its family's line in the table, or by their looks."""

from torch import nn

from equiv.errors import UnsupportedModelError
from equiv.model.architecture import Architecture as Architecture
from equiv.model.blocks import Blocks as Blocks
from equiv.model.blocks import list_of_blocks
from equiv.model.blocks import model_type as model_type
from equiv.model.known_families import FAMILIES as FAMILIES
from equiv.model.known_families import TABLE, architecture


def find_blocks(model: nn.Module) -> Blocks | None:
    """The blocks of a Hugging Face model; `None` for a module that is one stage.

    Raises:
        UnsupportedModelError: If the family is not in the table.
    """
    family = model_type(model)
    if family is None:
        return None
    known = architecture(family, model.config)
    if known is None:
        raise UnsupportedModelError(
            f"No architecture entry for `{type(model).__name__}` (model type "
            f"{family!r}); known: {', '.join(sorted(TABLE))}. Add a line to "
            "`equiv.model.known_families.TABLE`."
        )
    path, modules = list_of_blocks(model, known)
    return Blocks(path, tuple(modules), known)
