"""Bytes that batched shifts have to move, from the launches that were really made.

The operators of `equiv.kernels` are watched while something runs: of every call the
tensors it was given, which rows its index steers and which steers of the bank it names.
What has to be read or written is counted once, however often a kernel does it: rows of
activations, weights of the steers that occur, index, scale, and the float32 z that the
gradient needs. Nothing is assumed of the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Launches:
    """What was launched.

    Attributes:
        names: Of the operators, in order.
        bytes: Their floors, in order.
    """

    names: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    @property
    def floor(self) -> int:
        """Bytes of all together."""
        return sum(self.bytes)


def launches_of(function: Callable[[], object]) -> Launches:
    """Run something and note its batched shifts.

    Example:
        >>> from equiv.kernels import vector_shift
        >>> h, bank = torch.zeros(10, 4), torch.ones(3, 4)
        >>> index = torch.tensor([0] * 5 + [-1] * 5)
        >>> launches_of(lambda: vector_shift(h, bank, index)).bytes  # 2·160 + 16 + 80
        [416]
    """
    found = Launches()
    with _Watch(found):
        function()
    return found


class _Watch(TorchDispatchMode):
    def __init__(self, found: Launches) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "equiv":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            name = func._schema.name.removeprefix("equiv::")
            self.found.names.append(name)
            self.found.bytes.append(_floor(name, given, out))
        return out


def _floor(name: str, given: dict[str, Any], out: Any) -> int:
    h = given["h"] if "h" in given else given["x"]
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    small = _size(given.get("scale")) + _size(given.get("index"))
    if name == "candidate_shifts":
        return _size(h) + _size(given["bank"]) + _size(outs[0]) + small
    index = given["index"]
    numbers = index[index >= 0].unique().numel()
    weights = 0
    for part in ("bank", "down", "up", "bias"):
        if given.get(part) is not None:
            weights += _size(given[part]) // given[part].shape[0] * numbers
    if name.endswith("_"):  # in place: only the rows that are steered, there and back
        steered = int((index >= 0).sum()) * (h.shape[0] // index.shape[0])
        return 2 * steered * h.shape[1] * h.element_size() + weights + small
    more = _size(given.get("base")) + _size(given.get("gate"))
    return _size(h) + more + sum(_size(t) for t in outs) + weights + small


def _size(tensor: Tensor | None) -> int:
    """Bytes of the numbers that are there; what is expanded is there once."""
    if tensor is None:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return torch.Size([n if step else 1 for n, step in pairs]).numel() * (
        tensor.element_size()
    )
