"""`equiv.steer`: a model with steering added at its sites, for as long as a `with`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError, SiteError
from equiv.model.families import Blocks, find_blocks
from equiv.model.hooks import Combine, Writes, hook_on
from equiv.model.sites import Place, Site, SiteKey, as_site_key, check_flow
from equiv.steering.forms import Steering
from equiv.update.adapters import base_of, is_peft


@contextmanager
def steer(
    model: nn.Module, steering: Mapping[SiteKey, Steering]
) -> Iterator[nn.Module]:
    """Add steering at sites of a live model.

    Every token of every forward is steered, prompt and generated alike. The shift is
    computed in float32 (float64 in a float64 model) and added there, so that half
    precision rounds once. A steer reads what the steered model computes at its site,
    before what steering adds at that very site. Nothing is left on the model
    afterwards, also when an exception is raised inside.

    Args:
        model: A Hugging Face model of a known family, also inside a `PeftModel`, or any
            module (layer 0, sites by submodule name).
        steering: (layer, site) → steering, or any callable h → shift. A site is a name
            (see `equiv.model.sites`), a `Site` that reads and writes different places,
            or TransformerLens' name for it.

    Yields:
        The model itself.

    Raises:
        SiteError: If a layer or site does not exist.
        ArgumentError: If `steering` is no mapping or a value is not callable; while
            the model runs, if a steering does not return a tensor shaped as what it
            writes.

    Example:
        >>> from equiv.steering.vector import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> h = torch.ones(1, 2)
        >>> with steer(model, {(0, "0"): Vector(torch.zeros(2))}):
        ...     unchanged = model(h)
        >>> torch.equal(unchanged, model(h))
        True
    """
    inner = base_of(model) if is_peft(model) else model
    blocks = find_blocks(inner)
    with ExitStack() as stack:
        for layer, steers in by_layer(steering).items():
            combine = {
                site: _combine(_prepared(value, (layer, site)), (layer, site))
                for site, value in steers.items()
            }
            _hook_layer(stack, inner, blocks, layer, combine)
        yield model


def by_layer(
    steering: Mapping[SiteKey, Steering],
) -> dict[int, dict[str, Callable[[Tensor], Tensor]]]:
    """Layer → site → steer, from bottom to top.

    Raises:
        ArgumentError: If it is no mapping, or a value is not callable.
        SiteError: If a key is no site.
    """
    if not isinstance(steering, Mapping):
        raise ArgumentError(
            "Expected `steering` to be a mapping of (layer, site) → steering, got "
            f"{type(steering).__name__}."
        )
    found: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {}
    for key, value in steering.items():
        if not callable(value):
            raise ArgumentError(
                f"Expected a steering at {key!r}, got {type(value).__name__}."
            )
        layer, site = as_site_key(key)
        found.setdefault(layer, {})[site] = value
    return dict(sorted(found.items()))


def _hook_layer(
    stack: ExitStack,
    model: nn.Module,
    blocks: Blocks | None,
    layer: int,
    combine: Mapping[str, Combine],
) -> None:
    """Put the hooks of one layer's steers on its modules, removed with the stack."""
    writes = Writes(combine, joins_middle=bool(blocks and blocks.joins_middle))
    touched = writes.reads() | writes.by_site.keys()
    if blocks is None:
        places = {site: module_place(model, layer, site) for site in touched}
    else:
        for key in combine:
            check_flow(Site(key))
        if writes.joins_middle and "resid_mid" in writes.by_site:
            touched.add("attn_out")
        places = {site: blocks.place(layer, site) for site in touched}
        entered = Place(blocks.block(layer), "input")
        stack.callback(hook_on(entered, _entering(writes)).remove)
    for site, place in places.items():
        stack.callback(hook_on(place, _at(writes, site)).remove)


def _entering(writes: Writes) -> Callable[[Tensor], Tensor]:
    def enter(hidden: Tensor) -> Tensor:
        writes.enter(hidden)
        return hidden

    return enter


def _at(writes: Writes, site: str) -> Callable[[Tensor], Tensor]:
    def at(hidden: Tensor) -> Tensor:
        return writes.at(site, hidden)

    return at


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


def _combine(shift_of: Callable[[Tensor], object], key: SiteKey) -> Combine:
    """Add a shift in at least float32, and round once."""

    def combine(h: Tensor, x: Tensor) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        shift = shift_of(x.to(wide))
        if not isinstance(shift, Tensor) or shift.shape != h.shape:
            kind = type(shift).__name__
            got = tuple(shift.shape) if isinstance(shift, Tensor) else kind
            raise ArgumentError(
                f"Expected the steering at {key!r} to return a tensor shaped as the "
                f"activations, {tuple(h.shape)}, got {got}."
            )
        return (h.to(wide) + shift).to(h.dtype)

    return combine


def _prepared(
    steering: Callable[[Tensor], Tensor], key: SiteKey
) -> Callable[[Tensor], object]:
    """The steer as a function that keeps its tensors where they are needed."""
    moved: dict[tuple[Any, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def shift_of(x: Tensor) -> object:
        place = (x.device, x.dtype)
        if place not in moved:
            own = isinstance(steering, Steering)
            moved[place] = steering.to(*place) if own else steering
        try:
            return moved[place](x)
        except RuntimeError as error:
            raise ArgumentError(
                f"The steering at {key!r} cannot be applied to activations of shape "
                f"{tuple(x.shape)}: {str(error).rstrip('.')}."
            ) from error

    return shift_of
