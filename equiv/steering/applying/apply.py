"""`equiv.steer`: a model with steering added at its sites, for as long as a `with`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiv.arguments import as_integers, shown
from equiv.errors import ArgumentError
from equiv.model.families import Blocks, find_blocks
from equiv.model.sites import Site, SiteKey, as_site_key
from equiv.steering.applying.forwards import Chosen
from equiv.steering.applying.placed import Placed
from equiv.steering.applying.positions import Positions
from equiv.steering.applying.put import Banks, put_on
from equiv.steering.applying.rows import Shift
from equiv.steering.applying.tokens import Tokens
from equiv.steering.forms.form import Steering
from equiv.update.adapters import base_of, is_peft

Member = Mapping[SiteKey, Steering]


@contextmanager
def steer(
    model: nn.Module,
    steering: Member | Sequence[Member],
    *,
    positions: str | Tensor | None = None,
    index: Sequence[int] | Tensor | None = None,
) -> Iterator[nn.Module]:
    """Add steering at sites of a live model.

    A steer reads what the steered model computes at its site, before what steering adds
    at that very site. The shift is computed in float32 (float64 in a float64 model),
    under autocast too, and added there, so that half precision rounds once. Rows and
    tokens that are not steered are the unsteered model's, bit for bit. Inside another
    `steer` the model is the one that is steered there. `generate`, with or without a
    cache, and compiled models are steered as well. Nothing is left on the model
    afterwards, also when an exception is raised inside.

    With `index`, the steers of one form that write one site are stacked: hundreds of
    vectors, or of affine maps, LoReFTs and low-rank MLPs of whatever ranks, cost one
    pass over the activation (`equiv.kernels`).

    Positions are words: "all", "prompt", "generated", "last", "first N", "last N", or a
    sum such as "first 2 + generated". They count the prompt's tokens without padding,
    which the attention mask tells. The prompt is what `generate` is given, or a forward
    without a cache; what a forward is given on top of a cache is generated. Or they are
    a mask of tokens: its columns are those of the prompt, padding included, and tokens
    after its last column are not steered. In an encoder–decoder each stack counts what
    it reads: of the encoder all is prompt, of the decoder inside `generate` what comes
    before the first new token.

    Args:
        model: A Hugging Face model of a known family, also inside a `PeftModel` or
            compiled, or any module (layer 0, sites by submodule name).
        steering: (layer, site) → steering, or any callable h → shift. A site is a name
            (see `equiv.model.sites`), a `Site` that reads and writes different places,
            or TransformerLens' name for it. With `index`, a sequence of these.
        positions: Which tokens are steered: words, or a bool mask [batch, seq] (of a
            module that is no Hugging Face model: a mask like its activations, less
            their last axis). `None`: what each `SteeringSet` says itself, else all.
        index: For each row of the batch which of the `steering` it gets, from 0; −1 for
            none. Rows that `generate` repeats keep theirs.

    Yields:
        The model itself.

    Raises:
        SiteError: If a layer or site does not exist.
        ArgumentError: If an argument has no such value; while the model runs, if a
            steering does not return a tensor shaped as what it writes, or if rows,
            masks or attention masks do not fit.

    Example:
        >>> from equiv.steering.forms.vector import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> h, one = torch.ones(2, 2), {(0, "0"): Vector(torch.ones(2))}
        >>> with steer(model, [one], index=[-1, 0]):
        ...     steered = model(h)
        >>> (steered != model(h)).all(1)
        tensor([False,  True])
    """
    members: tuple[Any, ...] = (steering,) if index is None else _members(steering)
    layers = [by_layer(member) for member in members]
    chosen = [_chosen(member, positions) for member in members]
    rows = None if index is None else _rows(index, len(members))
    inner = inside(model)
    blocks = find_blocks(inner)
    banks = _banks(layers)
    told = rows is not None or not _everything(chosen[0])
    first = blocks.first if blocks is not None else 0
    with ExitStack() as stack:
        tokens: dict[bool, Tokens] = {}  # by whether their stack is a decoder's
        if told and blocks is None:
            _check_masks(chosen)
            tokens = {False: Tokens(chosen, rows)}
            tokens[False].fix()
        elif told and blocks is not None:
            _check_prompts(model, chosen)
            steered = {layer >= first > 0 for layer in banks}
            _check_one_stack(chosen, steered)
            for decodes in steered:
                own = tokens[decodes] = Tokens(chosen, rows)
                found = _backbone(inner, blocks.stacks[decodes])
                stack.callback(own.follow(inner, found, decodes=decodes))
        for layer, own_banks in banks.items():
            of_stack = tokens.get(layer >= first > 0)
            put_on(stack, inner, blocks, layer, own_banks, of_stack)
        yield model


def by_layer(
    steering: Member,
) -> dict[int, dict[str, Callable[[Tensor], Tensor]]]:
    """Layer → site → steer, from bottom to top.

    Raises:
        ArgumentError: If it is no mapping, or a value is not callable.
        SiteError: If a key is no site.
    """
    if not isinstance(steering, Mapping):
        raise ArgumentError(
            "Expected `steering` to be a mapping of (layer, site) → steering, or with "
            f"`index` a sequence of these, got {type(steering).__name__}."
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


def _banks(layers: Sequence[Mapping[int, Mapping[str, Shift]]]) -> Mapping[int, Banks]:
    """Layer → site that is written → number → site that is read → steer."""
    banks: dict[int, dict[str, dict[int, dict[str, Placed]]]] = {}
    for number, own in enumerate(layers):
        for layer, steers in own.items():
            for key, steering in steers.items():
                site = Site(key)
                bank = banks.setdefault(layer, {}).setdefault(site.write, {})
                placed = Placed(steering, (layer, key))
                bank.setdefault(number, {})[site.read] = placed
    return banks


def _members(steering: object) -> tuple[object, ...]:
    if isinstance(steering, Mapping | str) or not isinstance(steering, Sequence):
        raise ArgumentError(
            "Expected `steering` to be a sequence that `index` chooses from, got "
            f"{type(steering).__name__}."
        )
    return tuple(steering)


def _rows(index: object, count: int) -> tuple[int, ...]:
    rows = as_integers("index", index)
    if not set(rows) <= set(range(-1, count)):
        raise ArgumentError(
            f"Expected `index` within −1…{count - 1}, one of the {count} steerings or "
            f"−1 for none, got {shown(list(rows))}."
        )
    return rows


def _chosen(member: object, positions: object) -> Chosen:
    """The tokens that one steering is for."""
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool:
            raise ArgumentError(
                "Expected `positions` as a mask to be of dtype torch.bool, got "
                f"{positions.dtype}."
            )
        return positions
    own = getattr(member, "positions", "all")
    return Positions.parse(own if positions is None else positions)


def _everything(chosen: Chosen) -> bool:
    return isinstance(chosen, Positions) and chosen.everything


def _check_masks(chosen: Sequence[Chosen]) -> None:
    """Refuse words where nobody says what a token is."""
    if not all(isinstance(c, Tensor) or c.everything for c in chosen):
        raise ArgumentError(
            "Expected `positions` to be all, or a mask: only of a Hugging Face model "
            "is it known which tokens are prompt, padding or generated."
        )


def _check_prompts(model: nn.Module, chosen: Sequence[Chosen]) -> None:
    """Refuse positions where PEFT puts tokens of its own before the prompt."""
    config: Any = getattr(model, "active_peft_config", None) if is_peft(model) else None
    learned = getattr(config, "is_prompt_learning", False)
    if learned and not all(_everything(c) for c in chosen):
        raise ArgumentError(
            "Expected `positions` all with a prompt-learning adapter: its virtual "
            "tokens stand before the prompt, so no position means what it says."
        )
    for c in chosen:
        if isinstance(c, Tensor) and c.ndim != 2:
            raise ArgumentError(
                f"Expected `positions` as a mask [batch, seq], got {tuple(c.shape)}."
            )


def _check_one_stack(chosen: Sequence[Chosen], stacks: Collection[bool]) -> None:
    """Refuse a mask of tokens for an encoder and a decoder, which read two texts."""
    if len(stacks) > 1 and any(isinstance(c, Tensor) for c in chosen):
        raise ArgumentError(
            "Expected `positions` in words, or steering of one stack: a mask [batch, "
            "seq] is of the tokens that either the encoder or the decoder reads. Steer "
            "each inside the other's `with`."
        )


def _backbone(model: nn.Module, blocks: Blocks) -> nn.Module:
    """The part of a model that holds its blocks, and is given tokens."""
    path = blocks.path.removesuffix(blocks.architecture.blocks)
    return model.get_submodule(path.rstrip("."))


def inside(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrappers of `torch.compile` and PEFT."""
    while True:
        if isinstance(found := getattr(model, "_orig_mod", None), nn.Module):
            model = found
        elif is_peft(model):
            model = base_of(model)
        else:
            return model
