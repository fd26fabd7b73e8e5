"""Forwards replaced for a while: blocks that hand the hidden state on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from equiv.model.families import Blocks

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]  # block → how it is called


class ReachedBlocks(Exception):
    """Raised by the last stub: what follows the blocks need not be computed."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def stubs(
    blocks: Blocks, record: Calls | None = None, enter: Tensor | None = None
) -> Iterator[None]:
    """Blocks that hand the hidden state on.

    Args:
        blocks: The model's blocks.
        record: Gets how each block is called.
        enter: What the last block returns, so that the head runs on it; `None`: the
            last block ends the run by `ReachedBlocks`.
    """
    last = len(blocks.modules) - 1

    def stub(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if record is not None:
                record[index] = (args, kwargs)
            if index < last:
                return hidden_states
            if enter is None:
                raise ReachedBlocks(hidden_states)
            return enter

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.enter_context(replaced_forward(block, stub(index)))
        yield


@contextmanager
def replaced_forward(
    module: nn.Module, forward: Callable[..., Tensor]
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
