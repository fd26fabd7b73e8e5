"""`equiv.steer`: a model with steering added at its sites, for as long as a `with`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from equiv.errors import ArgumentError, SiteError
from equiv.model.families import find_blocks
from equiv.model.sites import Place, SiteKey, first_tensor, with_first
from equiv.steering.forms import Steering


@contextmanager
def steer(
    model: nn.Module, steering: Mapping[SiteKey, Steering]
) -> Iterator[nn.Module]:
    """Add steering at sites of a live model.

    Every token of every forward is steered, prompt and generated alike. Nothing is
    left on the model afterwards, also when an exception is raised inside.

    Args:
        model: A Hugging Face model of a known family, or any module (layer 0, sites by
            submodule name).
        steering: (layer, site) → steering.

    Yields:
        The model itself.

    Raises:
        SiteError: If a layer or site does not exist.
        ArgumentError: If a value is not callable.

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
    blocks = find_blocks(model)
    with ExitStack() as stack:
        for key, value in steering.items():
            if not callable(value):
                raise ArgumentError(
                    f"Expected a steering at {key!r}, got {type(value).__name__}."
                )
            layer, site = key
            if blocks is not None:
                place = blocks.place(layer, site)
            else:
                place = module_place(model, layer, site)
            stack.callback(add_hook(place, value).remove)
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


def add_hook(place: Place, steering: Steering) -> Any:
    """Register the hook that adds `steering` at a place; returns its handle."""
    if place.side == "output":

        def after(_module: nn.Module, _args: Any, output: object) -> object:
            hidden = first_tensor(output)
            return with_first(output, hidden + steering(hidden))

        return place.module.register_forward_hook(after)

    def before(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] + steering(args[0]), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden + steering(hidden)}

    return place.module.register_forward_pre_hook(before, with_kwargs=True)
