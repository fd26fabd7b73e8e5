"""Sites by name or pattern → the sites that a model has.

In a model of blocks a pattern such as "mlp_*" stands for the sites of a block that it
matches. In a module without blocks a site is the output of a submodule that is called
once in a forward and returns one floating tensor; what is asked for and is none is
refused with its reason.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from equiv.arguments import shown
from equiv.errors import SiteError
from equiv.model.batches import Batch
from equiv.model.families import Blocks
from equiv.model.sites import FLOW, Site, activation_of, read_and_written
from equiv.model.stages import prepared

_MANY = 12  # names of submodules that a message lists


def is_pattern(site: str) -> bool:
    """Whether this stands for several sites.

    Example:
        >>> is_pattern("mlp_*"), is_pattern("layers.0.mlp")
        (True, False)
    """
    return any(sign in site for sign in "*?[")


def block_sites(blocks: Blocks, sites: Sequence[str]) -> tuple[str, ...]:
    """The sites of a block that names and patterns stand for.

    Raises:
        SiteError: If a pattern matches none.
    """
    chosen: dict[str, None] = {}
    for site in sites:
        matched = [name for name in FLOW if fnmatchcase(name, site)]
        if is_pattern(site):
            found = [name for name in matched if _has(blocks, name)]
            if not found:
                raise SiteError(
                    f"No site matches {site!r}: there are {', '.join(FLOW)}."
                )
            chosen |= dict.fromkeys(found)
        else:
            chosen[site] = None
    return tuple(chosen)


def module_sites(
    model: nn.Module, batches: Sequence[Batch], dtype: torch.dtype, sites: Sequence[str]
) -> tuple[str, ...]:
    """The submodules that names and patterns stand for, of a module without blocks.

    Args:
        model: The module, ready to be measured.
        batches: Inputs; it is run on the first of them.
        dtype: Compute dtype.
        sites: Names and patterns of submodules.

    Raises:
        SiteError: If a name is no site, or a pattern matches none.
    """
    with _noted(model) as calls:
        (stage,) = prepared(model, batches[:1], dtype, None).stages
    chosen: dict[str, None] = {}
    for site in sites:
        if is_pattern(site):
            found = [name for name in stage.sites if fnmatchcase(name, site)]
            if not found:
                raise SiteError(_no_match(site, stage.sites, calls, model))
            chosen |= dict.fromkeys(found)
            continue
        for name in read_and_written([site]):
            if reason := _why_not(name, calls, model):
                raise SiteError(f"`{name}` is no site: {reason}.")
        chosen[Site(site).key] = None
    return tuple(chosen)


def _has(blocks: Blocks, name: str) -> bool:
    try:
        blocks.place(blocks.layers_with(name)[0], name)
    except SiteError:
        return False
    return True


@contextmanager
def _noted(model: nn.Module) -> Iterator[dict[str, list[str]]]:
    """By submodule, what each of its calls returns, in words; "" for an activation."""
    calls: dict[str, list[str]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _arguments: object, out: object) -> None:
            words = _kind(out) if activation_of(out) is None else ""
            calls.setdefault(name, []).append(words)

        return note

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(hook_of(name))
                stack.callback(handle.remove)
        yield calls


def _kind(out: object) -> str:
    if isinstance(out, torch.Tensor):
        return f"a tensor of {out.dtype} with shape {tuple(out.shape)}"
    if isinstance(out, (tuple, list)):
        return f"a {type(out).__name__} of {len(out)}"
    return f"a {type(out).__name__}"


def _why_not(
    name: str, calls: Mapping[str, Sequence[str]], model: nn.Module
) -> str | None:
    """Why a name is no site; `None` if it is one."""
    every = dict(model.named_modules(remove_duplicate=False))
    if name not in every or not name:
        near = difflib.get_close_matches(name, [n for n in every if n], n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else _listed([n for n in every if n])
        )
        return f"the model has no such submodule; {hint}"
    first = next(n for n, module in model.named_modules() if module is every[name])
    if first != name:
        return f"it is the same module as `{first}`; ask for it by that name"
    made = calls.get(name, [])
    if not made:
        return "it is not called on these inputs"
    if len(made) > 1:
        return (
            f"it is called {len(made)} times in one forward, so it is no one place; "
            "ask for a module that is called once, around it"
        )
    if made[0]:
        return (
            f"it returns {made[0]}, not one floating tensor with a feature axis, alone "
            "or first in a tuple with no other; ask for a module inside it or around it"
        )
    return None


def _no_match(
    pattern: str,
    sites: Sequence[str],
    calls: Mapping[str, Sequence[str]],
    model: nn.Module,
) -> str:
    """Why a pattern stands for nothing."""
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
    if not names:
        return f"No submodule matches {pattern!r}; {_listed(sites)}."
    reason = _why_not(names[0], calls, model)
    why = reason or "it hands on what another returns"
    return (
        f"No submodule that {pattern!r} matches is a site ({len(names)} of them); of "
        f"`{names[0]}`: {why}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return f"there are {', '.join(names[:_MANY]) or shown(list(names))}{more}"
