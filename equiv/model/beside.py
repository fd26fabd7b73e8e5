"""What reaches the blocks beside the residual stream: the arguments of their calls.

Each block's call is recorded once, at the base. A parameter that is in an argument of
it, such as a table of relative positions that every block attends with, would move the
blocks in a way that no stage sees.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from equiv.model.stubs import Calls


def beside_the_stream(
    tensors: Mapping[str, Tensor],
    parameters: Container[str],
    run: Callable[[Mapping[str, Tensor], Calls], object],
) -> frozenset[str]:
    """Parameters that the arguments of the blocks' calls are made of.

    Args:
        tensors: Parameters and buffers outside the blocks, by name.
        parameters: Which of them are parameters.
        run: Runs what comes before the blocks on such tensors, and records the calls.
    """
    with torch.inference_mode(False), torch.enable_grad():
        own = {
            name: _leaf(value) if name in parameters else value
            for name, value in tensors.items()
        }
        calls: Calls = {}
        run(own, calls)
        made = [t.sum() for t in _tensors(list(calls.values())) if t.requires_grad]
        if not made:
            return frozenset()
        wanted = {name: value for name, value in own.items() if value.requires_grad}
        found = torch.autograd.grad(made, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return frozenset(name for name, gradient in pairs if gradient is not None)


def _leaf(value: Tensor) -> Tensor:
    """The same numbers, to be differentiated by."""
    if not value.is_floating_point():
        return value
    # What was made in inference mode can only be copied out of it.
    own = value.clone() if value.is_inference() else value.detach()
    return own.requires_grad_()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in the arguments of calls, however deep."""
    if isinstance(value, Tensor):
        yield value
    entries = value.values() if isinstance(value, Mapping) else value
    if isinstance(entries, (tuple, list)) or isinstance(value, Mapping):
        for entry in entries:
            yield from _tensors(entry)
