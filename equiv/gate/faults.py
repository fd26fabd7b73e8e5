"""What a matrix may have become instead: named faults, each with its exact result.

With a base and an update (W, ΔW) the faults are those of merging; without, those of
converting a matrix E. A fault explains an actual matrix when that lies within the
rounding bound of the fault's result.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.gate.sides import Side

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


@dataclass(frozen=True)
class Fault:
    """A story, and the weight that it leads to: exact, with the ΔW that is in it."""

    story: str
    weight: Tensor
    update: Tensor | None = None


def layer_of(name: str) -> int | None:
    """The index of the block in a parameter's name.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        (3, None)
    """
    found = _LAYER.search(name)
    return None if found is None else int(found[0])


def at_layer(name: str, layer: int) -> str:
    """The same parameter in another block.

    Example:
        >>> at_layer("model.layers.3.mlp.up_proj.weight", 4)
        'model.layers.4.mlp.up_proj.weight'
    """
    return _LAYER.sub(str(layer), name, count=1)


def kind_of(name: str) -> str:
    """What kind of weight it is: the module's own name, with the parameter's if odd.

    Example:
        >>> kind_of("layers.3.mlp.up_proj.weight"), kind_of("h.0.attn.c_attn.bias")
        ('up_proj', 'c_attn.bias')
    """
    *path, last = name.split(".")
    module = path[-1] if path else last
    return module if last == "weight" or not path else f"{module}.{last}"


def faults(side: Side, name: str) -> Iterator[Fault]:
    """Every named fault of one matrix of the expected side."""
    weight, delta = side.weights()[name].double(), side.delta(name)
    if delta is None:
        yield from _conversions(side, name, weight)
        return
    delta = delta.to(weight.device)
    yield Fault("not applied", weight)
    yield Fault("applied twice", weight + 2 * delta, 2 * delta)
    yield Fault("applied with its sign flipped", weight - delta, -delta)
    for story, other in _misread(side, name, delta):
        yield Fault(story, weight + other, other)
    yield from _conversions(side, name, weight + delta)


def _misread(side: Side, name: str, delta: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Differences that belong elsewhere, or are read the wrong way round."""
    if _square(delta):
        yield "applied transposed", delta.T
    layer = layer_of(name)
    if layer is not None:
        for step in (-1, 1):
            neighbour = at_layer(name, layer + step)
            found = side.delta(neighbour) if neighbour in side.weights() else None
            if found is not None and found.shape == delta.shape:
                yield f"given the difference of layer {layer + step}", found
        for other in _siblings(side.weights(), name):
            found = side.delta(other)
            if found is not None and found.shape == delta.shape:
                yield f"given the difference of {kind_of(other)}", found
    for story, order in _splits(name, delta):
        yield f"applied with {story}", order


def _conversions(side: Side, name: str, exact: Tensor) -> Iterator[Fault]:
    """The whole matrix in another place, another order or another precision."""
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        yield Fault(f"rounded to {_short(dtype)}", exact.to(dtype).double())
    if _square(exact):
        yield Fault("transposed", exact.T)
    yield Fault("negated", -exact)
    yield Fault("all zeros", torch.zeros_like(exact))
    layer = layer_of(name)
    if layer is not None:
        for step in (-1, 1):
            neighbour = at_layer(name, layer + step)
            if neighbour in side.weights():
                found = side.exact(neighbour)
                if found.shape == exact.shape:
                    yield Fault(f"the matrix of layer {layer + step}", found)
        for other in _siblings(side.weights(), name):
            found = side.exact(other)
            if found.shape == exact.shape:
                yield Fault(f"the matrix of {kind_of(other)}", found)
    for story, order in _splits(name, exact):
        yield Fault(f"read with {story}", order)


def _siblings(weights: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """Other parameters of the same block."""
    found = _LAYER.search(name)
    if found is None:
        return
    block = name[: found.end() + 1]
    yield from (n for n in weights if n.startswith(block) and n != name)


def _splits(name: str, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A fused matrix of queries, keys and values split in another order."""
    if not any(part in _FUSED for part in name.split(".")):
        return
    # GPT-2's Conv1D has its outputs in columns.
    axis = 1 if matrix.ndim == 2 and matrix.shape[1] > matrix.shape[0] else 0
    if matrix.shape[axis] % 3:
        return
    q, k, v = matrix.chunk(3, axis)
    orders = {"KQV": (k, q, v), "VKQ": (v, k, q), "QVK": (q, v, k)}
    orders |= {"KVQ": (k, v, q), "VQK": (v, q, k)}
    for story, parts in orders.items():
        yield (
            f"its queries, keys and values in the order {story}",
            torch.cat(parts, axis),
        )


def _square(matrix: Tensor) -> bool:
    return matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
