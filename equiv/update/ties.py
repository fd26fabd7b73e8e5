"""Weights that several modules share: an adapter on one of them is no weight update."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.low_rank import Delta, LowRank, norm_of
from equiv.update.peft_names import clean


def each_once(deltas: Mapping[str, Delta], base: nn.Module) -> dict[str, Delta]:
    """The differences, those of a shared weight once and dense.

    Args:
        deltas: What adapters add, under the name of every module they are on.
        base: The model whose modules they are on.

    Raises:
        UpdateError: If not all modules that share a weight get the same difference.
    """
    kept = dict(deltas)
    for names in shared_names(base):
        found = [kept.pop(name) for name in names if name in kept]
        if not found:
            continue
        if len(found) < len(names) or not all(same(found[0], d) for d in found):
            touched = next(name for name in names if name in deltas)
            raise tied_error(touched.rpartition(".")[0])
        first = found[0]
        kept[names[0]] = first.dense() if isinstance(first, LowRank) else first
    return kept


def shared_names(model: nn.Module) -> list[list[str]]:
    """Names of each parameter that has several, as they were before PEFT came."""
    names: dict[int, dict[str, None]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)][clean(name)] = None
    return [list(found) for found in names.values() if len(found) > 1]


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name a parameter goes by → the name in `named_parameters()`.

    Names from before PEFT wrapped the model's layers are among them.
    """
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        name: canonical[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, first in list(found.items()):
        found.setdefault(clean(name), first)
    return found


def norms_in(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Frobenius norms of some of a model's parameters, under any of their names.

    Raises:
        UpdateMismatchError: If the model lacks one of them.
    """
    own, known = dict(model.named_parameters()), aliases(model)
    found: dict[str, float] = {}
    for name in names:
        if name not in known:
            raise UpdateMismatchError(
                f"The update has `{name}`, which {type(model).__name__} does not have: "
                "it belongs to another model."
            )
        found[name] = norm_of(own[known[name]].detach())
    return found


def same(first: Delta, second: Delta) -> bool:
    """Whether two differences are equal, entry by entry, up to a float64's rounding."""
    a, b = (
        d.dense() if isinstance(d, LowRank) else d.double() for d in (first, second)
    )
    if isinstance(first, LowRank) or isinstance(second, LowRank):
        size = float(a.abs().max())
        return a.shape == b.shape and torch.allclose(
            a, b, rtol=1e-12, atol=1e-12 * size
        )
    return torch.equal(a, b)


def tied_error(module: str) -> UpdateError:
    """The refusal of an adapter on a module that shares its weight."""
    return UpdateError(
        f"The adapter on `{module}` adds to that module alone, but its weight is tied "
        "to another module's: no update of the weight does what the adapter does. "
        "Untie the two (give the module a copy of its weight), or leave this module "
        "out of the adapter."
    )
