"""`equiv.steer`: a model with steering added at its sites, for as long as a `with`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from equiv.arguments import as_site_key
from equiv.errors import ArgumentError, SiteError
from equiv.model.families import find_blocks
from equiv.model.sites import Place, SiteKey, first_tensor, with_first
from equiv.steering.forms import Steering
from equiv.update.adapters import base_of, is_peft


@contextmanager
def steer(
    model: nn.Module, steering: Mapping[SiteKey, Steering]
) -> Iterator[nn.Module]:
    """Add steering at sites of a live model.

    Every token of every forward is steered, prompt and generated alike. Nothing is
    left on the model afterwards, also when an exception is raised inside.

    Args:
        model: A Hugging Face model of a known family, also inside a `PeftModel`, or any
            module (layer 0, sites by submodule name).
        steering: (layer, site) → steering.

    Yields:
        The model itself.

    Raises:
        SiteError: If a layer or site does not exist.
        ArgumentError: If `steering` is no mapping or a value is not callable; while
            the model runs, if a steering does not return a tensor shaped as what it
            read.

    Example:
        >>> import torch
        >>> from equiv.steering.forms import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> h = torch.ones(1, 2)
        >>> with steer(model, {(0, "0"): Vector(torch.zeros(2))}):
        ...     unchanged = model(h)
        >>> torch.equal(unchanged, model(h))
        True
    """
    if not isinstance(steering, Mapping):
        raise ArgumentError(
            "Expected `steering` to be a mapping of (layer, site) → steering, got "
            f"{type(steering).__name__}."
        )
    inner = base_of(model) if is_peft(model) else model
    blocks = find_blocks(inner)
    with ExitStack() as stack:
        for key, value in steering.items():
            if not callable(value):
                raise ArgumentError(
                    f"Expected a steering at {key!r}, got {type(value).__name__}."
                )
            layer, site = as_site_key(key)
            if blocks is not None:
                place = blocks.place(layer, site)
            else:
                place = module_place(inner, layer, site)
            stack.callback(add_hook(place, value, (layer, site)).remove)
        yield model


def module_place(model: nn.Module, layer: int, site: str) -> Place:
    """A site of a module without blocks: the output of a named submodule.

    Raises:
        SiteError: If the module has no submodule of that name.
    """
    modules = dict(model.named_modules())
    name = "" if site == "output" else site
    if layer != 0 or name not in modules:
        raise SiteError(
            f"{type(model).__name__} has one layer, 0, with sites "
            f"{', '.join(n for n in modules if n)} and output; got {(layer, site)!r}."
        )
    return Place(modules[name], "output")


def add_hook(place: Place, steering: Steering, key: SiteKey) -> Any:
    """Register the hook that adds `steering` at a place; returns its handle."""
    if place.side == "output":

        def after(_module: nn.Module, _args: Any, output: object) -> object:
            return with_first(output, _steered(first_tensor(output), steering, key))

        return place.module.register_forward_hook(after)

    def before(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_steered(args[0], steering, key), *args[1:]), kwargs
        hidden = _steered(kwargs["hidden_states"], steering, key)
        return args, {**kwargs, "hidden_states": hidden}

    return place.module.register_forward_pre_hook(before, with_kwargs=True)


def _steered(hidden: Tensor, steering: Steering, key: SiteKey) -> Tensor:
    try:
        shift = steering(hidden)
    except RuntimeError as error:
        raise ArgumentError(
            f"The steering at {key!r} cannot be applied to activations of shape "
            f"{tuple(hidden.shape)}: {str(error).rstrip('.')}."
        ) from error
    if not isinstance(shift, Tensor) or shift.shape != hidden.shape:
        got = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
        raise ArgumentError(
            f"Expected the steering at {key!r} to return a tensor shaped as the "
            f"activations, {tuple(hidden.shape)}, got {got}."
        )
    return hidden + shift
