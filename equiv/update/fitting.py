"""Does an update fit a model? Names, shapes, devices and ties, checked at the door."""

import difflib
from collections import Counter
from collections.abc import Collection

from torch import Tensor, nn

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.low_rank import Delta, LowRank
from equiv.update.ties import same, tied_error
from equiv.update.update import Update


def fitted(update: Update, model: nn.Module) -> Update:
    """The update under the model's own parameter names, each tied weight once.

    Names of the model before PEFT wrapped its layers are understood.

    Raises:
        UpdateMismatchError: Unknown name, buffer, other shape or device.
        UpdateError: Tied weights with two different differences; an adapter on one of
            the modules that share a weight; whole weights instead of differences.
    """
    own = dict(model.named_parameters())
    aliases = _aliases(model, own)
    modules = dict(model.named_modules())
    every = model.named_parameters(remove_duplicate=False)
    uses = Counter(aliases[name] for name, _ in every)
    deltas: dict[str, Delta] = {}
    for name, delta in update.deltas.items():
        canonical = aliases.get(name)
        if canonical is None:
            raise UpdateMismatchError(_unknown(name, model, aliases))
        if isinstance(delta, LowRank):
            if uses[canonical] > 1:  # it adds to one module, the weight to all
                raise tied_error(name.rpartition(".")[0])
            delta = delta.oriented(modules.get(name.rpartition(".")[0]))
        _check_shape(name, delta, own[canonical])
        if canonical in deltas and not same(deltas[canonical], delta):
            raise UpdateError(
                f"`{name}` and `{canonical}` are one tied weight, but the update gives "
                "them two different values. Give one of them."
            )
        deltas[canonical] = delta if isinstance(delta, LowRank) else delta.detach()
    _check_differences(deltas, own)
    return Update(deltas, {}, update.source)


# A fine-tune moves weights by a few percent of their norm. What lies this near to the
# weights themselves is no difference.
_LOOKS_LIKE_WEIGHTS = 0.3


def _check_differences(deltas: dict[str, Delta], own: dict[str, nn.Parameter]) -> None:
    """Refuse whole weights: their distance to the model's own is a small share."""
    apart = whole = 0.0
    for name, delta in deltas.items():
        if isinstance(delta, LowRank):
            return
        weight = own[name].detach().double()
        apart += float((delta.to(weight) - weight).square().sum())
        whole += float(weight.square().sum())
    if whole and apart <= _LOOKS_LIKE_WEIGHTS**2 * whole:
        raise UpdateError(
            "The entries of the update look like the weights themselves, not like "
            f"differences: they are {(apart / whole) ** 0.5:.0%} away from the model's "
            "own. Pass the tuned model or its folder, or "
            "`equiv.Update.from_state_dicts(base, tuned)`."
        )


def _aliases(model: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, str]:
    """Every name a parameter goes by → the name in `named_parameters()`."""
    canonical = {id(parameter): name for name, parameter in own.items()}
    found = {
        name: canonical[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, first in list(found.items()):
        for inner in (".base_layer.", ".original_module."):
            if inner in name:
                found.setdefault(name.replace(inner, "."), first)
    return found


def _unknown(name: str, model: nn.Module, known: Collection[str]) -> str:
    if name in dict(model.named_buffers()):
        return (
            f"`{name}` is a buffer of the model, not a parameter. Expected differences "
            "of parameters only: a buffer has no derivative here."
        )
    path, _, last = name.rpartition(".")
    if last == "bias" and f"{path}.weight" in known:
        return (
            f"The update adds a bias to `{path}`, which has none in the base, so there "
            "is no parameter to move. Give the base's layer a bias of zeros first; for "
            "steering that does the same there is `equiv.to_steering`."
        )
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"The update has `{name}`, which {type(model).__name__} does not have.{hint} "
        "Expected names from `model.named_parameters()`."
    )


def _check_shape(name: str, delta: Delta, parameter: Tensor) -> None:
    if tuple(delta.shape) != tuple(parameter.shape):
        raise UpdateMismatchError(
            f"The update has `{name}` of shape {tuple(delta.shape)}; the model expects "
            f"{tuple(parameter.shape)}."
        )
    device = delta.left.device if isinstance(delta, LowRank) else delta.device
    if device.type != parameter.device.type:
        raise UpdateMismatchError(
            f"The update has `{name}` on {device}, the model on {parameter.device}. "
            "Move one of them with `.to(device)`."
        )
