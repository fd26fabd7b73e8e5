"""Faults of a whole model, told apart by the outputs that each would lead to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from equiv.gate.faults import at_layer, kind_of, layer_of
from equiv.gate.outputs import Group, exact, pair
from equiv.gate.sides import Side, TopK
from equiv.update.update import Update

# A story explains outputs when it leaves at most this share of what separates them from
# the outputs that were expected.
EXPLAINED = 0.05


def told_by_outputs(
    expected: Side,
    groups: Sequence[Group],
    observed: Sequence[Tensor | TopK],
    right: Sequence[Tensor],
) -> str:
    """The fault whose outputs are the observed ones; "" if none is."""
    reference = _distance(right, observed)
    best, left = "", EXPLAINED * reference
    for story, side in stories(expected):
        found = _distance(exact(side, groups), observed)
        if found <= left:
            best, left = story, found
    return best


def stories(expected: Side) -> Iterator[tuple[str, Side]]:
    """Named faults of merging an update, as sides."""
    assert expected.update is not None
    weights = expected.weights()
    deltas = {n: d for n in weights if (d := expected.delta(n)) is not None}
    for story, made in _misplaced(weights, deltas):
        real = {expected.real_name(name): delta for name, delta in made.items()}
        yield story, replace(expected, update=Update(real, {}, story))


def _misplaced(
    weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    square = {n for n, d in deltas.items() if d.ndim == 2 and d.shape[0] == d.shape[1]}
    if square:
        yield (
            "square matrices applied transposed",
            {n: d.T if n in square else d for n, d in deltas.items()},
        )
    for step in (-1, 1):
        moved = {}
        for name, delta in deltas.items():
            layer = layer_of(name)
            target = name if layer is None else at_layer(name, layer + step)
            if target in weights and weights[target].shape == delta.shape:
                moved[target] = delta
        if moved and moved.keys() != deltas.keys():
            yield f"every difference given to the layer {_side(step)} its own", moved
    kinds = sorted({kind_of(name) for name in deltas})
    for i, one in enumerate(kinds):
        for other in kinds[i + 1 :]:
            made = _exchanged(deltas, one, other)
            if made is not None:
                yield f"{one} and {other} exchanged", made


def _exchanged(
    deltas: Mapping[str, Tensor], one: str, other: str
) -> dict[str, Tensor] | None:
    """The update with two kinds of weight exchanged, where their shapes allow it."""
    made = dict(deltas)
    changed = False
    for name, delta in deltas.items():
        for mine, theirs in ((one, other), (other, one)):
            if kind_of(name) != mine:
                continue
            twin = name.replace(f".{mine}.", f".{theirs}.")
            if twin == name or twin not in deltas or deltas[twin].shape != delta.shape:
                return None
            made[name], changed = deltas[twin], True
    return made if changed else None


def _side(step: int) -> str:
    return "below" if step < 0 else "above"


def _distance(made: Sequence[Tensor], observed: Sequence[Tensor | TopK]) -> float:
    total = 0.0
    for logits, seen in zip(made, observed, strict=True):
        one, two = pair(seen, logits)
        total += float((one - two).square().sum())
    return total
