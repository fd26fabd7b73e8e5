"""Does an update fit a model? Names, shapes, devices and ties, checked at the door."""

import difflib
import math
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.model.packed import unpacked
from equiv.update.entries import Deferred, mapped, norm_at, shape_at, some
from equiv.update.low_rank import Delta, LowRank, norm_of
from equiv.update.ties import aliases, same, tied_error
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
    names = aliases(model)
    every = model.named_parameters(remove_duplicate=False)
    uses = Counter(names[name] for name, _ in every)
    kept: dict[str, str] = {}  # the model's name → the update's
    for name in update.deltas:
        if (canonical := names.get(name)) is None:
            raise UpdateMismatchError(_unknown(name, model, names))
        if canonical in kept and not same(
            update.deltas[kept[canonical]], update.deltas[name]
        ):
            raise UpdateError(
                f"`{name}` and `{canonical}` are one tied weight, but the update gives "
                "them two different values. Give one of them."
            )
        kept.setdefault(canonical, name)
    modules = dict(model.named_modules())

    def fit(name: str, delta: Delta) -> Delta:
        module = kept[name].rpartition(".")[0]
        if isinstance(delta, LowRank):
            if uses[name] > 1:  # it adds to one module, the weight to all
                raise tied_error(module)
            delta = delta.oriented(modules.get(module))
        else:
            delta = delta.detach()
            if isinstance(update.deltas, Deferred):  # files do not say where it goes
                delta = delta.to(own[name].device)
        _check_fits(kept[name], delta, own[name])
        return delta

    for name in kept:
        _check_size(kept[name], shape_at(update.deltas, kept[name]), own[name])
    deltas = mapped(some(update.deltas, kept), fit)
    _check_differences(deltas, own)
    return Update(deltas, {}, update.source)


# A fine-tune moves weights by a few percent of their norm. What lies this near to the
# weights themselves is no difference.
_LOOKS_LIKE_WEIGHTS = 0.3


def _check_differences(
    deltas: Mapping[str, Delta], own: Mapping[str, nn.Parameter]
) -> None:
    """Refuse whole weights: their distance to the model's own is a small share."""
    if not isinstance(deltas, Deferred) and any(
        isinstance(delta, LowRank) for delta in deltas.values()
    ):
        return
    size = math.hypot(*(norm_at(deltas, name) for name in deltas))
    whole = math.hypot(*(norm_of(own[name].detach()) for name in deltas))
    if not whole or abs(size - whole) > _LOOKS_LIKE_WEIGHTS * whole:
        return  # no two things of such different lengths are near to each other
    square = 0.0
    for name, delta in deltas.items():
        if isinstance(delta, LowRank):
            return
        weight = unpacked(own[name]).double()
        square += float((delta.to(weight) - weight).square().sum())
    apart = math.sqrt(square) / whole
    if apart <= _LOOKS_LIKE_WEIGHTS:
        raise UpdateError(
            "The entries of the update look like the weights themselves, not like "
            f"differences: they are {apart:.0%} away from the model's own. Pass the "
            "tuned model or its folder, or "
            "`equiv.Update.from_state_dicts(base, tuned)`."
        )


def _unknown(name: str, model: nn.Module, known: Collection[str]) -> str:
    if name in dict(model.named_buffers()):
        return (
            f"`{name}` is a buffer of the model, not a parameter. Expected differences "
            "of parameters only: a buffer has no derivative here."
        )
    path, _, last = name.rpartition(".")
    if last == "bias" and f"{path}.weight" in known:
        return (
            f"The update has `{name}`, which {type(model).__name__} does not have: the "
            "layer is without a bias in the base, so there is no parameter to move. "
            "Give it a bias of zeros first; for steering that does the same there is "
            "`equiv.to_steering`."
        )
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"The update has `{name}`, which {type(model).__name__} does not have.{hint} "
        "Expected names from `model.named_parameters()`."
    )


def _check_size(
    name: str, shape: tuple[int, ...], parameter: Tensor, *, turned: bool = True
) -> None:
    """Refuse another shape; factors from a file may still be turned round."""
    expected = tuple(parameter.shape)
    if shape != expected and not (turned and shape == expected[::-1]):
        raise UpdateMismatchError(
            f"The update has `{name}` of shape {shape}; the model expects {expected}."
        )


def _check_fits(name: str, delta: Delta, parameter: Tensor) -> None:
    _check_size(name, tuple(delta.shape), parameter, turned=False)
    device = delta.left.device if isinstance(delta, LowRank) else delta.device
    if device.type != parameter.device.type:
        raise UpdateMismatchError(
            f"The update has `{name}` on {device}, the model on {parameter.device}. "
            "Move one of them with `.to(device)`."
        )
