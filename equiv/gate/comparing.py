"""`equiv.assert_same` and `equiv.compare`: is this model that one?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError, NotSameError
from equiv.gate.diagnosing import TOKENS, by_outputs, by_weights
from equiv.gate.matrices import different, missing
from equiv.gate.outputs import (
    Group,
    answered,
    exact,
    pair,
    relative,
    rows_of,
    stored,
    vocabulary_of,
)
from equiv.gate.patterns import pattern
from equiv.gate.settings import different_settings
from equiv.gate.sides import Side, TopK, as_side
from equiv.gate.values import Agreement, OutputDifference
from equiv.model.batches import at_most
from equiv.model.drawn import random_inputs
from equiv.model.inputs import from_inputs
from equiv.report.numbers import percent

# Two results of one computation may round in opposite directions, and the largest of
# many roundings of one run may be twice the largest of another.
ROOM = 4.0


def assert_same(
    actual: object,
    expected: object,
    inputs: object = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    tokenizer: object = None,
) -> None:
    """Raise unless one model is the other, to rounding.

    Args:
        actual: What is tested: a model, a directory, `(model, update)`, `(model,
            steering)`, or a function from token ids to logits or to `TopK`.
        expected: What it has to be, in any of these forms.
        inputs: As for `equiv.check`. Without them two sides with weights are compared
            by their weights alone, others on random token ids.
        rtol: Relative tolerance; `None`: derived from the storage dtype (weights, see
            `equiv.gate.rounding`) and from its rounding as measured on these inputs
            (outputs). The error says which.
        atol: Absolute tolerance, beside `rtol`.
        tokenizer: Tokenizer for texts.

    Raises:
        NotSameError: One line: what differs most, where, by how much against what
            tolerance, and what it looks like.
        EquivError: If the two cannot be compared.

    Example:
        >>> from equiv.testing.models import transformer
        >>> model = transformer("llama")
        >>> assert_same(model, model)
        >>> assert_same(lambda ids: 2 * model(ids).logits, model)
        Traceback (most recent call last):
        ...
        equiv.errors.NotSameError: the outputs differ most in sequence ...
    """
    found = compare(actual, expected, inputs, rtol=rtol, atol=atol, tokenizer=tokenizer)
    if not found.same:
        raise NotSameError(found.reason)


def compare(
    actual: object,
    expected: object,
    inputs: object = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    tokenizer: object = None,
) -> Agreement:
    """As `assert_same`, but returns what was found.

    Example:
        >>> from equiv.testing.models import transformer
        >>> model = transformer("llama")
        >>> compare(model, model).same
        True
    """
    _check_tolerances(rtol, atol)
    mine, theirs = as_side(actual, "actual"), as_side(expected, "expected")
    both = mine.has_weights and theirs.has_weights
    parts: dict[str, Any] = {}
    if both:
        parts |= _weights(mine, theirs, rtol, atol)
    if inputs is not None or not both:
        parts |= _outputs(mine, theirs, inputs, rtol, atol, tokenizer, parts)
    rule = "; ".join(
        parts.pop(key) for key in ("by_weight", "by_output") if key in parts
    )
    return Agreement(actual=mine.name, expected=theirs.name, rule=rule, **parts)


def _weights(
    actual: Side, expected: Side, rtol: float | None, atol: float | None
) -> dict[str, Any]:
    found, compared = different(actual, expected, rtol, atol)
    only_actual, only_expected = missing(actual, expected)
    story = ""
    if found and expected.update is not None:
        story = by_weights(actual, expected, found).looks_like
    elif found:
        stories = {row.looks_like for row in found}
        story = found[0].looks_like if len(stories) == 1 else ""
    if rtol is None and atol is None:
        dtype = str(actual.dtype).removeprefix("torch.")
        rule = f"weights to the rounding of {dtype}"
    else:
        rule = f"weights to rtol={rtol or 0:g}, atol={atol or 0:g}"
    assert actual.model is not None and expected.model is not None
    return {
        "by_weight": rule,
        "settings": different_settings(actual.model, expected.model),
        "compared": compared,
        "weights": tuple(found),
        "only_actual": tuple(only_actual),
        "only_expected": tuple(only_expected),
        "looks_like": story,
    }


def _outputs(
    actual: Side,
    expected: Side,
    inputs: object,
    rtol: float | None,
    atol: float | None,
    tokenizer: object,
    known: dict[str, Any],
) -> dict[str, Any]:
    source = expected if expected.model is not None else actual
    groups = _groups(source.model, inputs, tokenizer)
    seen = [answered(actual, group) for group in groups]
    right = None if source.model is None else exact(source, groups)
    wanted: Sequence[Tensor | TopK] = right or []
    if source is actual:
        wanted = [answered(expected, group) for group in groups]
    limit, rule = _limit(actual, expected, groups, seen, right, rtol, atol)
    found = _compared(expected, groups, seen, wanted, limit, atol)
    story = known.get("looks_like") or found.looks_like
    if found.wrong and not story and expected.update is not None and right is not None:
        story = by_outputs(actual, expected, groups, seen, right).looks_like
    if not found.wrong and right is not None and source is expected:
        unseen = _unseen(expected, groups, right, limit)
        found, story = replace(found, undecided=bool(unseen)), unseen
    return {"by_output": rule, "outputs": found, "looks_like": story}


def _unseen(
    expected: Side, groups: Sequence[Group], right: Sequence[Tensor], limit: float
) -> str:
    """Why outputs that agree say nothing: what was added moves them less than that."""
    if expected.update is None and expected.steering is None:
        return ""
    what = "update" if expected.steering is None else "steering"
    plain = exact(replace(expected, update=None, steering=None), groups)
    pairs = (pair(a, b) for a, b in zip(plain, right, strict=True))
    effect = max(float(relative(a, b).max()) for a, b in pairs)
    if effect > limit:
        return ""
    return (
        f"the {what} moves these outputs by {percent(effect)} at most, within the "
        f"tolerance of {percent(limit)}: they cannot show whether it was applied; "
        + ("compare weights, or give" if what == "update" else "give")
        + " a smaller `rtol=`"
    )


def _groups(model: nn.Module | None, inputs: object, tokenizer: object) -> list[Group]:
    if model is None:
        if not isinstance(inputs, Tensor) or inputs.ndim != 2:
            raise ArgumentError(
                "Expected `inputs` to be token ids [batch, seq] where neither side is "
                f"a model, got {type(inputs).__name__}."
            )
        return [Group(inputs, tuple(range(len(inputs))))]
    given = random_inputs(model, 0) if inputs is None else inputs
    batches = at_most(from_inputs(model, given, tokenizer), TOKENS, 0)
    return rows_of(batches, vocabulary_of(model))


def _compared(
    expected: Side,
    groups: Sequence[Group],
    seen: Sequence[Tensor | TopK],
    wanted: Sequence[Tensor | TopK],
    limit: float,
    atol: float | None,
) -> OutputDifference:
    pairs = [pair(a, e) for a, e in zip(seen, wanted, strict=True)]
    apart = [relative(a, e) for a, e in pairs]
    allowed = [limit + _absolute(e, atol) for _, e in pairs]
    wrong = [~(d <= a) for d, a in zip(apart, allowed, strict=True)]
    count = sum(int(w.sum()) for w in wrong)
    g = max(range(len(groups)), key=lambda i: float((apart[i] - allowed[i]).max()))
    place = int((apart[g] - allowed[g]).argmax())
    row, position = divmod(place, apart[g].shape[1])
    tokens = sum(d.numel() for d in apart)
    same = sum(int((a.argmax(-1) == e.argmax(-1)).sum()) for a, e in pairs)
    return OutputDifference(
        tokens=tokens,
        wrong=count,
        largest=float(apart[g].flatten()[place]),
        tolerance=float(allowed[g].flatten()[place]),
        sequence=groups[g].index[row],
        position=position,
        same_top=same / tokens,
        looks_like=pattern(expected, groups, pairs, wrong, seen) if count else "",
    )


def _absolute(expected: Tensor, atol: float | None) -> Tensor:
    """What `atol` per logit adds to a token's relative tolerance."""
    size = torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-300)
    return (atol or 0.0) * expected.shape[-1] ** 0.5 / size


def _limit(
    actual: Side,
    expected: Side,
    groups: Sequence[Group],
    seen: Sequence[Tensor | TopK],
    right: Sequence[Tensor] | None,
    rtol: float | None,
    atol: float | None,
) -> tuple[float, str]:
    """Largest relative difference of a token, and where that comes from."""
    if rtol is not None or atol is not None:
        return rtol or 0.0, f"outputs to rtol={rtol or 0:g}, atol={atol or 0:g}"
    source = expected if expected.model is not None else actual
    if right is None:
        raise ArgumentError(
            "Expected `rtol=` or `atol=`: neither side is a model, so there is no "
            "dtype to derive a tolerance from."
        )
    dtype = coarsest(actual, expected)
    noise = 0.0
    for rounded, logits, observed in zip(
        stored(source, groups, dtype), right, seen, strict=True
    ):
        like = observed if isinstance(observed, TopK) else logits
        one, two = pair(like, rounded)[1], pair(like, logits)[1]
        noise = max(noise, float(relative(one, two).max()))
    name = str(dtype).removeprefix("torch.")
    rule = f"outputs to {ROOM:g} times the rounding of {name}, measured here"
    return ROOM * noise, rule


def coarsest(actual: Side, expected: Side) -> torch.dtype:
    """The coarser of the dtypes in which the two sides store their weights.

    Float32 at least: Hugging Face models round norms and softmax to it in any dtype.
    """
    known = [side.dtype for side in (actual, expected) if side.dtype is not None]
    return max([*known, torch.float32], key=lambda dtype: torch.finfo(dtype).eps)


def _check_tolerances(rtol: float | None, atol: float | None) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ArgumentError(f"Expected `{name}` to be None or >= 0, got {value!r}.")
