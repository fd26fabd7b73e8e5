"""From figures to a verdict, the same way in every claim about an exact identity."""

from collections.abc import Mapping

from torch import Tensor

from equiv.report.numbers import figure
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

# Toys have at most 64 numbers a side with entries near 1, so sums of products carry a
# relative rounding error near 64 · 2⁻⁵³ ≈ 1e-14; the rest is for solves.
TOLERANCE = 1e-10
# What is said to differ has to differ by far more than anything that rounding does.
VISIBLE = 1e-3


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, or the plain norm where nothing is expected.

    Example:
        >>> import torch
        >>> relative(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    size = float(expected.norm()) or 1.0
    return float((found - expected).norm()) / size


def identity(
    equal: Mapping[str, float],
    says: str,
    *,
    differ: Mapping[str, float] | None = None,
    conditions: Mapping[str, Value] | None = None,
    evidence: Mapping[str, Value] | None = None,
    as_written: AsWritten | None = None,
    tolerance: float = TOLERANCE,
) -> ClaimResult:
    """The result of comparing both sides of identities.

    Args:
        equal: Name → relative difference of what must be equal.
        says: What was found if it is; the largest difference is added.
        differ: Name → relative difference of what must not be equal, if the claim
            says that something is not.
        conditions: What it rests on, with figures.
        evidence: More figures.
        as_written: What becomes of the source's statement.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        `holds` (`holds with conditions` where some are named), or `fails` with the
        names of what does not agree.

    Example:
        >>> identity({"both sides": 2e-16}, "They agree").says
        'They agree (largest difference 2e-16)'
        >>> identity({"both sides": 0.5}, "They agree").says
        'both sides: expected no difference, got 0.5'
    """
    apart = differ or {}
    wrong = [
        f"{name}: expected no difference, got {figure(gap)}"
        for name, gap in equal.items()
        if not gap <= tolerance
    ]
    wrong += [
        f"{name}: expected a difference, got {figure(gap)}"
        for name, gap in apart.items()
        if not gap > VISIBLE
    ]
    figures = {**equal, **apart, **(evidence or {})}
    if wrong:
        text, verdict = "; ".join(wrong), Verdict.FAILS
    else:
        largest = max(equal.values())
        text = f"{says} (largest difference {figure(largest, 2)})" if largest else says
        verdict = Verdict.CONDITIONAL if conditions else Verdict.HOLDS
    return ClaimResult(verdict, text, conditions or {}, figures, as_written)
