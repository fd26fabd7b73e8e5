"""`equiv.sweep`: many steers tried on one batch, what lies below them computed once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.model.batches import MAIN
from equiv.model.families import Blocks, find_blocks
from equiv.model.sites import model_output
from equiv.model.stubs import ReachedBlocks, as_returned, replaced_forward
from equiv.steering.applying.apply import Member, by_layer, inside, steer


def sweep(
    model: nn.Module,
    candidates: Sequence[Member],
    inputs: Mapping[str, Any] | Tensor,
    *,
    positions: str | Tensor | None = None,
) -> Tensor:
    """What a model returns under each of many steers, for the same inputs.

    Strengths, layers, vectors of a search: the blocks below the first one that any
    candidate steers run once, on the batch as it is; those above run once too, on a
    batch with as many copies of it as there are candidates, each with its own steer.
    If all of them add to that first block's output, it runs once as well. The memory is
    that of the large batch; more candidates than fit go in several calls. Of models
    whose blocks pass more to each other than the stream (T5, encoder–decoders) nothing
    is shared below.

    Args:
        model: As of `equiv.steer`.
        candidates: Steering of each, as of `equiv.steer`.
        inputs: One batch: keyword arguments of the model, or its only argument.
        positions: Which tokens are steered, as of `equiv.steer`; a mask is for the
            batch as it is.

    Returns:
        Logits, else the last hidden states, [candidates, batch, …]; of each candidate
        what the model returns under `equiv.steer`, to the rounding of another batch
        size.

    Raises:
        ArgumentError: If there is no candidate, or the inputs come with a cache.
        SiteError: As of `equiv.steer`.

    Example:
        >>> import torch
        >>> from equiv.steering.forms.vector import Vector
        >>> model, v = nn.Sequential(nn.Identity()), Vector(torch.ones(2))
        >>> tried = [{(0, "0"): v.scaled(strength)} for strength in (0, 1, 5)]
        >>> sweep(model, tried, torch.zeros(4, 2))[:, 0, 0]
        tensor([0., 1., 5.])
    """
    if not isinstance(candidates, Sequence) or not candidates:
        raise ArgumentError(
            "Expected `candidates`, a sequence of one steering or more."
        )
    arguments = _arguments(model, inputs)
    main = _main(arguments)
    batch, count = main.shape[0], len(candidates)
    blocks = find_blocks(inside(model))
    shared = 0 if blocks is None else _shared(blocks, candidates)
    index = [number for number in range(count) for _ in range(batch)]
    if isinstance(positions, Tensor):
        positions = _copies(positions, batch, count)
    copied = {name: _copies(value, batch, count) for name, value in arguments.items()}
    with ExitStack() as stack:
        if blocks is not None and shared:
            hidden = _below(model, blocks, shared, arguments)
        stack.enter_context(steer(model, candidates, index=index, positions=positions))
        if blocks is not None and shared:
            copies = _copies(hidden, batch, count)
            stack.enter_context(_handing_on(blocks, shared, copies))
        return model_output(_call(model, copied)).unflatten(0, (count, batch))


def _shared(blocks: Blocks, candidates: Sequence[Member]) -> int:
    """How many blocks run on the batch as it is."""
    if blocks.encoder is not None or blocks.architecture.shares_bias:
        return 0
    layers = [by_layer(candidate) for candidate in candidates]
    steered = [layer for own in layers for layer in own]
    first = min(steered, default=0)
    behind = all(set(own.get(first, {})) <= {"block_out"} for own in layers)
    return first + (1 if steered and behind else 0)


def _below(
    model: nn.Module, blocks: Blocks, shared: int, arguments: Mapping[str, Any]
) -> Tensor:
    """What block `shared − 1` returns."""
    block, plain = blocks.block(shared - 1), blocks.block(shared - 1).forward

    def last(*args: Any, **kwargs: Any) -> object:
        out = plain(*args, **kwargs)
        raise ReachedBlocks(out if isinstance(out, Tensor) else out[0])

    try:
        with replaced_forward(block, last):
            _call(model, arguments)
    except ReachedBlocks as reached:
        return reached.hidden
    raise ArgumentError(f"{type(model).__name__} did not run its block {shared - 1}.")


@contextmanager
def _handing_on(blocks: Blocks, shared: int, hidden: Tensor) -> Iterator[None]:
    """The blocks below hand the stream on, the last of them as it is known to be."""

    def stub(layer: int) -> Callable[..., object]:
        entries = blocks.known(layer).returns

        def forward(*args: Any, **kwargs: Any) -> object:
            given = args[0] if args else kwargs["hidden_states"]
            return as_returned(hidden if layer == shared - 1 else given, entries)

        return forward

    with ExitStack() as stack:
        for layer in range(shared):
            stack.enter_context(replaced_forward(blocks.block(layer), stub(layer)))
        yield


def _arguments(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Arguments by name; "" is the only one that has none."""
    if isinstance(inputs, Tensor):
        return {"": inputs}
    arguments = dict(inputs)
    if arguments.get("past_key_values") is not None:
        raise ArgumentError(
            "Expected inputs without `past_key_values`: a sweep runs whole sequences."
        )
    if getattr(getattr(model, "config", None), "use_cache", False):
        arguments.setdefault("use_cache", False)
    return arguments


def _main(arguments: Mapping[str, Any]) -> Tensor:
    found = [arguments[n] for n in ("", *MAIN) if isinstance(arguments.get(n), Tensor)]
    found += [value for value in arguments.values() if isinstance(value, Tensor)]
    if not found:
        raise ArgumentError("Expected `inputs` with tensors, got none.")
    return found[0]


def _call(model: nn.Module, arguments: Mapping[str, Any]) -> object:
    if "" in arguments:
        return model(arguments[""])
    return model(**arguments)


def _copies(value: Any, batch: int, count: int) -> Any:
    """What has a row for each sequence, `count` times over."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != batch:
        return value
    return value.repeat(count, *[1] * (value.ndim - 1))
