"""`equiv.diagnose`: what really happened to a model that was to get an update."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from equiv.gate.fates import pooled, share_of, summary, told
from equiv.gate.faults import kind_of, layer_of
from equiv.gate.matrices import different, leaning
from equiv.gate.outputs import (
    Group,
    answered,
    as_batches,
    exact,
    rows_of,
    stored,
    vocabulary_of,
)
from equiv.gate.shares import Solution, solve
from equiv.gate.sides import Side, TopK, as_side
from equiv.gate.stories import told_by_outputs
from equiv.gate.values import Diagnosis, Share, WeightDifference
from equiv.model.batches import at_most
from equiv.model.drawn import random_inputs
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.report.numbers import percent
from equiv.update.adapters import clean
from equiv.update.sources import resolve
from equiv.update.update import Update

OUTSIDE = "outside the blocks"
# Tokens that are looked at: the cost is theirs, times the layers.
TOKENS = 512
# Below this share of the change explained, scaling parts of the update is not what
# happened; storage in bfloat16 alone leaves a few thousandths.
EXPLAINED = 0.99
# ‖y − z(c)‖ in units of what storing in bfloat16 does to the outputs: two roundings of
# one computation are √2 apart, and the two here need not be equal in size.
ROUNDING = 2.0


def diagnose(
    base: nn.Module,
    update: object,
    actual: object,
    inputs: object = None,
    *,
    tokenizer: object = None,
) -> Diagnosis:
    """What actually happened to a model that was to get an update.

    Where `actual` has weights these are compared matrix by matrix. Where it only
    answers, the share of each layer's update that was really applied is found from the
    outputs by least squares (see `equiv.gate.shares`), and that of each kind of weight.

    Args:
        base: The model before the update.
        update: The update, in any form that `equiv.check` takes.
        actual: What came of it: a model, a directory, `(model, update)`, `(model,
            steering)`, or a function from token ids to logits or to `TopK`.
        inputs: As for `equiv.check`; `None`: random token ids. At most 512 tokens are
            looked at.
        tokenizer: Tokenizer for texts.

    Returns:
        Per layer and kind of weight, the share that was applied, its standard error and
        what that looks like.

    Raises:
        UpdateError: If the update cannot be used.
        OutputsError: If what `actual` answers cannot be compared with the base.
        ArgumentError: If `actual` is none of these.

    Example:
        >>> from equiv.testing.models import transformer
        >>> base = transformer("llama")
        >>> update = Update.random(base, 0.05, seed=0)
        >>> diagnose(base, update, (base, update.scaled(2))).looks_like
        'every layer applied twice'
    """
    check_model(base)
    fitted = resolve(base, update)
    expected = Side(f"base + {fitted.source}", model=base, update=fitted)
    side = as_side(actual, "actual")
    if side.has_weights:
        return by_weights(side, expected, different(side, expected)[0])
    given = random_inputs(base, 0) if inputs is None else inputs
    batches = at_most(from_inputs(base, given, tokenizer), TOKENS, 0)
    groups = rows_of(batches, vocabulary_of(base))
    observed = [answered(side, group) for group in groups]
    return by_outputs(side, expected, groups, observed, exact(expected, groups))


def part_of(name: str) -> str:
    """The layer of a parameter, in words."""
    layer = layer_of(name)
    return OUTSIDE if layer is None else f"layer {layer}"


def by_weights(
    actual: Side, expected: Side, found: Sequence[WeightDifference]
) -> Diagnosis:
    """The diagnosis of a side with weights, from the matrices that differ."""
    update = expected.update
    assert update is not None
    wrong = {row.name: row.looks_like for row in found}
    weights = actual.weights()
    matrices, sizes = [], []
    for name, weight in expected.weights().items():
        delta = expected.delta(name)
        if delta is None or name not in weights or not bool(delta.any()):
            continue
        share, error = 0.0, math.inf
        if weights[name].shape == weight.shape:
            share, error, _ = leaning(actual, expected, name)
        matrices.append(told(name, share, error, wrong.get(name, "")))
        sizes.append(float(delta.square().sum()))
    layers = _pooled(matrices, sizes, part_of)
    kinds = _pooled(matrices, sizes, kind_of)
    beside = [name for name in wrong if name not in {s.part for s in matrices}]
    story = summary(layers, kinds)
    if beside:
        story += (
            f"; {len(beside)} matrices outside the update are not the base's, first "
            f"{beside[0]}: {wrong[beside[0]]}"
        )
    return Diagnosis(
        actual=actual.name,
        update=update.source,
        evidence="weights",
        layers=layers,
        kinds=kinds,
        matrices=tuple(matrices),
        explained=None,
        looks_like=story,
        forwards=0.0,
    )


def _pooled(
    shares: Sequence[Share], sizes: Sequence[float], key: Callable[[str], str]
) -> tuple[Share, ...]:
    parts: dict[str, list[int]] = {}
    for i, share in enumerate(shares):
        parts.setdefault(key(share.part), []).append(i)
    return tuple(
        pooled(part, [shares[i] for i in rows], [sizes[i] for i in rows])
        for part, rows in parts.items()
    )


def by_outputs(
    actual: Side,
    expected: Side,
    groups: Sequence[Group],
    observed: Sequence[Tensor | TopK],
    right: Sequence[Tensor],
) -> Diagnosis:
    """The diagnosis of a side from its outputs on some rows.

    Args:
        actual: The side.
        expected: The base with its update.
        groups: The rows.
        observed: What the side answered to each group.
        right: What it had to answer, in float64.
    """
    base, update = expected.model, expected.update
    assert base is not None and update is not None
    rounded = stored(expected, groups, torch.bfloat16)
    rounding = [one - two for one, two in zip(rounded, right, strict=True)]
    with (
        measured(base),
        staged(base, as_batches(groups), torch.float64) as cut,
    ):
        by_layer = solve(
            cut, observed, update.deltas, _parts(update, part_of), rounding
        )
        by_kind = solve(
            cut,
            observed,
            update.deltas,
            _parts(update, kind_of),
            rounding,
            start=sum(by_layer.shares.values()) / len(by_layer.shares),
        )
    layers, kinds = _shares(by_layer), _shares(by_kind)
    return Diagnosis(
        actual=actual.name,
        update=update.source,
        evidence="outputs",
        layers=layers,
        kinds=kinds,
        matrices=(),
        explained=max(by_layer.explained, by_kind.explained),
        looks_like=_story(expected, groups, observed, right, by_layer, by_kind),
        forwards=by_layer.forwards + by_kind.forwards,
    )


def _story(
    expected: Side,
    groups: Sequence[Group],
    observed: Sequence[Tensor | TopK],
    right: Sequence[Tensor],
    by_layer: Solution,
    by_kind: Solution,
) -> str:
    if _explains(by_layer):
        return summary(_shares(by_layer), _shares(by_kind))
    if _explains(by_kind):
        kinds = _shares(by_kind)
        return summary(kinds, kinds).replace("every layer", "every kind of weight")
    if story := told_by_outputs(expected, groups, observed, right):
        return story
    lost = 1 - max(by_layer.explained, by_kind.explained)
    return (
        f"not explained by scaling parts of the update: {percent(lost)} of the change "
        "in the outputs comes from something else"
    )


def _parts(update: Update, key: Callable[[str], str]) -> dict[str, list[str]]:
    """The update's parameters by what their names, without PEFT's wrappings, say."""
    parts: dict[str, list[str]] = {}
    for name in update.deltas:
        parts.setdefault(key(clean(name)), []).append(name)
    return parts


def _explains(found: Solution) -> bool:
    """Whether what is left is little, or no more than storing in bfloat16 leaves."""
    return found.explained >= EXPLAINED or found.left <= ROUNDING


def _shares(found: Solution) -> tuple[Share, ...]:
    lost = ""
    if not _explains(found):
        lost = f"scaling explains {percent(found.explained)} of the change only"
    return tuple(
        share_of(part, found.shares[part], found.errors[part], lost)
        for part in found.shares
    )
