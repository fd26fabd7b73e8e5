"""What the calculus finds, as plain values: verdicts, orders, radii."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Outcome of a measurement; the row's `reason` says why."""

    HOLDS = "holds"
    EXACT = "exact"
    FAILS = "fails"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not applicable"


class Scope(StrEnum):
    """Whose update a shift answers to."""

    PROPAGATED = "propagated"  # the whole update, through the whole network below
    LOCAL = "local"  # this block's update alone, its input held at the base


@dataclass(frozen=True)
class TaylorPoint:
    """Remainders of the two first-order shifts at one scale of the update.

    Both are absolute norms: ‖f(t) − f(0) − t f′(0)‖ and ‖f(t) − f(0) − t f′(t/2)‖;
    `shift` is ‖f(t) − f(0)‖.
    """

    scale: float
    shift: float
    remainder: float
    remainder_midpoint: float | None


@dataclass(frozen=True)
class Order:
    """How fast a remainder shrinks when the update is halved, and the verdict."""

    verdict: Verdict
    reason: str
    order: float | None = None
    window: tuple[float, float] | None = None  # finest and coarsest scale used


@dataclass(frozen=True)
class Radius:
    """Largest update scale with a relative remainder within the tolerance.

    `at_least` is true when the largest scale probed was still within it; `predicted`
    comes from the next term of the Taylor series instead of from probing.
    """

    value: float
    at_least: bool
    predicted: float | None
    tolerance: float


@dataclass(frozen=True)
class Superposition:
    """Σ over stages of local first-order shifts carried to the output, against JVP."""

    verdict: Verdict
    reason: str
    relative_difference: float | None
    stages: int
