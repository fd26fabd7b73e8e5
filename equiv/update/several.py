"""Several updates of one model, each under a name of the caller's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import nn

from equiv.errors import EquivError, UpdateError
from equiv.model.guard import check_finite
from equiv.update.low_rank import Delta
from equiv.update.sources import as_update, resolve
from equiv.update.update import Update

OneUpdate: TypeAlias = Update | nn.Module | str | Path | Mapping[str, Delta]
# What is an update by itself; tensors and factors are entries of one.
_WHOLE = (Update, nn.Module, str, Path, Mapping)


def as_several(delta_w: object) -> dict[str, object] | None:
    """The updates of a mapping of names → updates; `None` for what is one update.

    A mapping of parameter names → tensors is one update, a task vector.

    Raises:
        UpdateError: If it mixes the two, or a name is no string.

    Example:
        >>> import torch
        >>> vector = {"weight": torch.ones(2)}
        >>> as_several(vector) is None
        True
        >>> list(as_several({"mine": vector, "yours": "folder"}))
        ['mine', 'yours']
    """
    if not isinstance(delta_w, Mapping):
        return None
    whole = [name for name, one in delta_w.items() if isinstance(one, _WHOLE)]
    if not whole:
        return None
    for name, one in delta_w.items():
        if not isinstance(one, _WHOLE):
            raise UpdateError(
                f"Expected updates by name, or one update as parameter name → tensor, "
                f"got both: {name!r} is a {type(one).__name__}, {whole[0]!r} is a "
                f"{type(delta_w[whole[0]]).__name__}. Wrap what belongs to one update "
                "in `equiv.Update.from_dict`."
            )
        if not isinstance(name, str):
            raise UpdateError(f"Expected names of updates as keys, got {name!r}.")
    return dict(delta_w)


def resolve_by_name(
    model: nn.Module, delta_w: object
) -> tuple[dict[str, Update], bool]:
    """Updates that fit `model`, and whether they are several.

    All are held at once: those of folders are read later, one weight at a time.

    Args:
        model: The base.
        delta_w: An update as for `resolve`, which goes by the name "", or several.

    Raises:
        EquivError: As `resolve`; of several, with the name of the update before it.
    """
    several = as_several(delta_w)
    if several is None:
        return {"": resolve(model, delta_w)}, False
    check_finite(model)
    found = {}
    for name, one in several.items():
        try:
            found[name] = as_update(model, one)
        except EquivError as error:
            raise type(error)(f"Update {name!r}: {error}") from error
    return found, True
