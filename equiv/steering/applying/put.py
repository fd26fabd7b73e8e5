"""The hooks of one layer's steers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from equiv.errors import SiteError
from equiv.model.calls import Note, note_calls
from equiv.model.families import Blocks
from equiv.model.hooks import Combine, Writes, ahead_of_recorders, hook_on
from equiv.model.sites import FLOW, Place, Site, Sites, check_flow
from equiv.steering.applying.bank import StackedBank
from equiv.steering.applying.placed import Placed
from equiv.steering.applying.rows import steered
from equiv.steering.applying.tokens import Tokens

# Site that is written → number of the steer → site that is read → steer.
Banks = Mapping[str, Mapping[int, Mapping[str, Placed]]]


def put_on(
    stack: ExitStack,
    model: nn.Module,
    blocks: Blocks | None,
    layer: int,
    banks: Banks,
    tokens: Tokens | None,
) -> None:
    """Put the hooks of one layer's steers on its modules, removed with the stack.

    Args:
        stack: What removes them.
        model: The model.
        blocks: Its blocks, if it has any.
        layer: Which of them; 0 for a module without.
        banks: The steers, by the site that they write.
        tokens: Which steer each token gets; `None`: every token the only one.

    Raises:
        SiteError: If a layer or site does not exist.
    """
    pairs = {
        (read, write)
        for write, bank in banks.items()
        for own in bank.values()
        for read in own
    }
    joined = "" if blocks is None else blocks.joined(layer)
    middle = joined and "resid_mid" in banks  # formed from what several places see
    sites = {site for pair in pairs for site in pair}
    if middle:
        sites |= {"attn_out", joined}
    # In the block's own order: in OLMo-2 two sites are one place.
    order = {site: number for number, site in enumerate(FLOW)}
    places = {
        site: _place(model, blocks, layer, site)
        for site in sorted(sites, key=lambda site: order.get(site, -1))
    }
    for read, write in pairs:
        if blocks is not None:
            check_flow(Site(write, read=read))
    _prepare(places, banks)
    combine = {
        site: _combine(bank, tokens, places[site]) for site, bank in banks.items()
    }
    if not middle and all(read == write for read, write in pairs):
        for site, place in places.items():
            _hook(stack, place, _alone(site, combine[site]))
        return
    writes = Writes(combine, joined=joined)
    if blocks is not None:
        block = blocks.block(layer)
        _hook(stack, Place(block, "input"), _entering(writes))
    for site, place in places.items():
        _hook(stack, place, _at(writes, site))
    if blocks is not None:
        _hook(stack, Place(blocks.block(layer), "output"), _leaving(writes))


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


def _place(model: nn.Module, blocks: Blocks | None, layer: int, site: str) -> Place:
    if blocks is None:
        return module_place(model, layer, site)
    return blocks.place(layer, site)


def _prepare(places: Mapping[str, Place], banks: Banks) -> None:
    """Copy tensors where the activations will most likely be, before any forward."""
    for site, bank in banks.items():
        own = [p for p in places[site].module.parameters() if p.is_floating_point()]
        for steers in bank.values() if own else ():
            for placed in steers.values():
                dtype = torch.promote_types(own[0].dtype, torch.float32)
                placed.prepare((own[0].device, dtype))


def _hook(stack: ExitStack, place: Place, change: Callable[[Tensor], Tensor]) -> None:
    """A hook that those who record, and compiled graphs, take notice of.

    Every hook has a note of its own, since graphs are guarded by how many there are.
    """
    handle = hook_on(place, change)
    stack.callback(handle.remove)
    if place.side == "output":
        ahead_of_recorders(place.module, handle)
    stack.callback(note_calls(place.module, "forward", Note()))


def _combine(
    bank: Mapping[int, Mapping[str, Placed]], tokens: Tokens | None, place: Place
) -> Combine:
    """What is done where a bank's steers write."""
    if tokens is None:
        (steers,) = bank.values()
        return lambda h, seen: steered(h, seen, steers)

    stacked = StackedBank(bank, len(tokens.chosen))
    own = [p for p in place.module.parameters() if p.is_floating_point()]
    if own:
        stacked.prepare(own[0].device, own[0].dtype)

    def combine(h: Tensor, seen: Sites) -> Tensor:
        used, index = tokens.now(h)
        return stacked.steered(h, seen, used, index)

    return combine


def _alone(site: str, combine: Combine) -> Callable[[Tensor], Tensor]:
    return lambda hidden: combine(hidden, {site: hidden})


def _entering(writes: Writes) -> Callable[[Tensor], Tensor]:
    def enter(hidden: Tensor) -> Tensor:
        writes.enter(hidden)
        return hidden

    return enter


def _leaving(writes: Writes) -> Callable[[Tensor], Tensor]:
    def leave(hidden: Tensor) -> Tensor:
        writes.leave()
        return hidden

    return leave


def _at(writes: Writes, site: str) -> Callable[[Tensor], Tensor]:
    return lambda hidden: writes.at(site, hidden)
