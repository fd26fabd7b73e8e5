"""What reaches the blocks beside the residual stream: the arguments of their calls.

Each block's call is recorded once, at the base. A parameter that is in an argument of
it, such as a table of relative positions that every block attends with, would move the
blocks in a way that no stage sees. Which do is tried out: some code takes no part in
automatic differentiation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from equiv.model.stubs import Calls


def beside_the_stream(
    names: Iterable[str],
    tensors: Mapping[str, Tensor],
    base: Calls,
    run: Callable[[Mapping[str, Tensor], Calls], object],
) -> list[str]:
    """Those of some parameters that the arguments of the blocks' calls change with.

    Args:
        names: The parameters in question.
        tensors: Parameters and buffers outside the blocks, by name.
        base: How the blocks are called with these.
        run: Runs what comes before the blocks on such tensors, and records the calls.
    """

    def change(moved: Iterable[str]) -> bool:
        calls: Calls = {}
        run({**tensors, **{name: _moved(tensors[name]) for name in moved}}, calls)
        pairs = zip(_tensors(base), _tensors(calls), strict=True)
        return not all(torch.equal(one, other) for one, other in pairs)

    asked = list(names)
    if not asked or not change(asked):
        return []
    # Together they may do what none does alone.
    return [name for name in asked if change([name])] or asked


def _moved(value: Tensor) -> Tensor:
    """Other numbers, also where they are zero."""
    return value * 1.01 + 0.01


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in the arguments of calls, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
