"""Which tokens differ, in words: rows, positions, steering that is not there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equiv.gate.outputs import Group, exact, pair, relative
from equiv.gate.sides import Side, TopK
from equiv.report.numbers import figure

# A token is unsteered when it lies this near to the unsteered output, as a share of the
# way that steering would have moved it.
UNSTEERED = 0.1
# Strengths among which the one that was used is looked for.
STRENGTHS = (-2.0, 3.0)


def pattern(
    expected: Side,
    groups: Sequence[Group],
    pairs: Sequence[tuple[Tensor, Tensor]],
    wrong: Sequence[Tensor],
    seen: Sequence[Tensor | TopK],
) -> str:
    """What the wrong tokens have in common; "" if nothing is recognised."""
    if expected.steering is not None:
        return _steering(expected, groups, pairs, wrong, seen)
    if _all(wrong):
        factor = _factor(pairs)
        return "" if factor is None else f"all outputs times {figure(factor)}"
    where = _where(wrong)
    return f"wrong {where} only" if where else ""


def _steering(
    expected: Side,
    groups: Sequence[Group],
    pairs: Sequence[tuple[Tensor, Tensor]],
    wrong: Sequence[Tensor],
    seen: Sequence[Tensor | TopK],
) -> str:
    """The tokens at which steering is not there, or how strong it is."""
    where = "anywhere" if _all(wrong) else _where(wrong) or "at some tokens"
    plain = _outputs(expected, groups, seen, 0.0)
    norm = torch.linalg.vector_norm
    unsteered = [
        norm(value - without, dim=-1) <= UNSTEERED * norm(right - without, dim=-1)
        for (value, right), without in zip(pairs, plain, strict=True)
    ]
    if all(bool((u | ~w).all()) for u, w in zip(unsteered, wrong, strict=True)):
        return f"not steered {where}"
    if not _all(wrong):
        return f"steered otherwise {where}"
    strength, left = _strength(expected, groups, pairs, seen)
    if left > UNSTEERED:
        return ""
    return f"steered with {figure(strength)} times the strength"


def _strength(
    expected: Side,
    groups: Sequence[Group],
    pairs: Sequence[tuple[Tensor, Tensor]],
    seen: Sequence[Tensor | TopK],
) -> tuple[float, float]:
    """(strength that comes nearest, share of the steering's effect that it leaves)."""
    from scipy.optimize import minimize_scalar

    def left(strength: float) -> float:
        made = _outputs(expected, groups, seen, strength)
        return sum(
            float((value - here).square().sum())
            for (value, _), here in zip(pairs, made, strict=True)
        )

    none = sum(
        float((right - without).square().sum())
        for (_, right), without in zip(
            pairs, _outputs(expected, groups, seen, 0.0), strict=True
        )
    )
    found: Any = minimize_scalar(
        left, bounds=STRENGTHS, method="bounded", options={"xatol": 1e-4}
    )
    return float(found.x), (float(found.fun) / none) ** 0.5 if none else 0.0


def _outputs(
    expected: Side,
    groups: Sequence[Group],
    seen: Sequence[Tensor | TopK],
    strength: float,
) -> list[Tensor]:
    """What the steered model would answer at a strength, in the form of `seen`."""
    assert expected.steering is not None
    scaled = {key: s.scaled(strength) for key, s in expected.steering.items()}
    side = replace(expected, steering=scaled)
    return [
        pair(observed, logits)[1]
        for observed, logits in zip(seen, exact(side, groups), strict=True)
    ]


def _where(wrong: Sequence[Tensor]) -> str:
    """The wrong tokens' rows or positions, where these are all of a kind."""
    first = all(
        not bool(bad[0].any()) and bool(bad[1:].all()) for bad in wrong if len(bad) > 1
    )
    if first and any(len(bad) > 1 for bad in wrong):
        return "in any row of a batch but the first"
    columns = [bad.any(0) for bad in wrong]
    if any(
        not bool((bad == some).all()) for bad, some in zip(wrong, columns, strict=True)
    ):
        return ""
    starts = {_first(some) for some in columns}
    to_end = all(
        bool(some[_first(some) :].all()) for some in columns if bool(some.any())
    )
    if to_end and len(starts) == 1 and (start := starts.pop()) > 0:
        return f"from position {start} on"
    from_start = all(
        bool(some[: int(some.sum())].all()) and not bool(some.all()) for some in columns
    )
    ends = {int(some.sum()) for some in columns}
    if from_start and len(ends) == 1:
        return f"at the first {ends.pop()} positions"
    if all(bool(some[:-1].all()) and not bool(some[-1]) for some in columns):
        return "at any position but the last"
    return ""


def _first(some: Tensor) -> int:
    return int(torch.nonzero(some)[0]) if bool(some.any()) else len(some)


def _all(wrong: Sequence[Tensor]) -> bool:
    return all(bool(bad.all()) for bad in wrong)


def _factor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The constant between two outputs, if one explains them."""
    product = sum(float((a * e).sum()) for a, e in pairs)
    size = sum(float(e.square().sum()) for _, e in pairs)
    factor = product / size if size else 0.0
    left = (
        max(float(relative(a, factor * e).max()) for a, e in pairs) if factor else 1.0
    )
    return factor if left < 1e-3 else None
