"""Forwards replaced for a while: blocks that hand the hidden state on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import UnsupportedModelError
from equiv.model.blocks import Blocks
from equiv.model.memory import by_name

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]  # block → how it is called


class ReachedBlocks(Exception):
    """Raised by the last stub: what follows the blocks need not be computed.

    Attributes:
        hidden: The stream that the blocks are given.
        memory: The encoder's output that a decoder's blocks are given beside it.
    """

    def __init__(self, hidden: Tensor, memory: Tensor | None = None) -> None:
        self.hidden, self.memory = hidden, memory


def reached(model: nn.Module, run: Callable[[], object]) -> ReachedBlocks:
    """What the last stub is given, in a run of a model.

    Raises:
        UnsupportedModelError: If the run does not come to it.
    """
    try:
        run()
    except ReachedBlocks as found:
        return found
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run its blocks in `forward`."
    )


@contextmanager
def stubs(
    blocks: Blocks, record: Calls | None = None, enter: Tensor | None = None
) -> Iterator[None]:
    """Blocks that hand the hidden state on.

    Args:
        blocks: The model's blocks, or one stack of them.
        record: Gets how each block is called, but for the stream and the memory.
        enter: What the last block returns, so that the head runs on it; `None`: the
            last block ends the run by `ReachedBlocks`.
    """
    last, known = len(blocks.modules) - 1, blocks.architecture
    handed: list[Tensor] = []

    def stub(index: int) -> Callable[..., object]:
        def forward(*args: Any, **kwargs: Any) -> object:
            hidden, args, kwargs = _taken(args, kwargs)
            memory = None
            if known.cross_out or known.shares_bias:  # what a stage gives by name
                memory, kwargs = by_name(blocks.modules[index], args, kwargs)
                args = ()
            if record is not None:
                _check_handed(blocks, index, hidden, handed)
                record[index] = (args, kwargs)
            if index < last:
                return as_returned(hidden, known.returns)
            if enter is None:
                raise ReachedBlocks(hidden, memory)
            return as_returned(enter, known.returns)

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.enter_context(replaced_forward(block, stub(index)))
        yield


def _taken(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state that a block is called with, and what else."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def as_returned(hidden: Tensor, entries: int) -> object:
    """What a block returns: a tensor, or a tuple that starts with it."""
    return (hidden, *[None] * (entries - 1)) if entries else hidden


def _check_handed(
    blocks: Blocks, index: int, hidden: Tensor, handed: list[Tensor]
) -> None:
    """Refuse a model that does more with its blocks than run one after the other."""
    found = f"Block {index} of `{blocks.path}`"
    if index != len(handed):
        raise UnsupportedModelError(
            f"{found} is run where block {len(handed)} was expected: only blocks that "
            "run once each, one after the other, can be measured one by one."
        )
    if handed and hidden is not handed[-1] and not torch.equal(hidden, handed[-1]):
        raise UnsupportedModelError(
            f"{found} is not given what block {index - 1} returned: the model changes "
            "the stream between its blocks, where no site is."
        )
    handed.append(hidden)


@contextmanager
def replaced_forward(
    module: nn.Module, forward: Callable[..., object]
) -> Iterator[None]:
    """A module with another forward; its own, or its class's, is put back."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
