"""From a share with its standard error to what became of a part of an update."""

import math
from collections.abc import Sequence

from equiv.gate.values import Fate, Share
from equiv.report.numbers import figure

# Beyond this standard error four of them around 0 and four around 1 overlap.
UNKNOWN = 0.125
# Standard errors within which a share is taken for a round one; and the least distance
# that is called one, whatever the standard error: no fault scales by less.
SURE, NEAR = 4.0, 0.01

_ROUND = {
    1.0: Fate.APPLIED,
    0.0: Fate.NOT_APPLIED,
    -1.0: Fate.FLIPPED,
    2.0: Fate.TWICE,
}
_STORIES = {
    "not applied": Fate.NOT_APPLIED,
    "applied twice": Fate.TWICE,
    "applied with its sign flipped": Fate.FLIPPED,
}


_MIXED = "matrices are wrong"


def share_of(part: str, coefficient: float, error: float, lost: str = "") -> Share:
    """A share with its verdict.

    Args:
        part: Name of the part.
        coefficient: How much of it was applied.
        error: Standard error; infinite where the outputs do not show it.
        lost: Why scaling does not explain the outputs, if it does not.

    Example:
        >>> share_of("layer 3", 0.002, 0.01).fate.value
        'not applied'
        >>> share_of("layer 3", 0.9375, 0.001).reason
        'applied times 0.938'
        >>> share_of("layer 3", 0.8, math.inf).coefficient is None
        True
    """
    if not error <= UNKNOWN:
        reason = "it moves these outputs not at all, or only as other parts do"
        if math.isfinite(error):
            reason = f"standard error {figure(error, 2)}: 0 and 1 cannot be told apart"
        return Share(part, None, error, Fate.NOT_IDENTIFIABLE, reason)
    if lost:
        return Share(part, coefficient, error, Fate.OTHER, lost)
    value = min(_ROUND, key=lambda round_one: abs(coefficient - round_one))
    if abs(coefficient - value) <= max(NEAR, SURE * error):
        return Share(part, coefficient, error, _ROUND[value])
    reason = f"applied times {figure(coefficient)}"
    return Share(part, coefficient, error, Fate.SCALED, reason)


def told(part: str, coefficient: float, error: float, story: str) -> Share:
    """A share of a matrix whose story is known from its weights."""
    known = error <= UNKNOWN
    if not story and not known:
        hidden = "ΔW is lost in the rounding of the weights"
        return Share(part, None, error, Fate.NOT_IDENTIFIABLE, hidden)
    if not story:
        return Share(part, coefficient, error, Fate.APPLIED)
    if not known:
        return Share(part, None, error, _STORIES.get(story, Fate.OTHER), story)
    scaled = Fate.SCALED if story.startswith("applied times") else Fate.OTHER
    return Share(part, coefficient, error, _STORIES.get(story, scaled), story)


def pooled(part: str, shares: Sequence[Share], weights: Sequence[float]) -> Share:
    """The share of a layer or kind from its matrices', weighted by ‖ΔW‖²."""
    known = [
        (s, w)
        for s, w in zip(shares, weights, strict=True)
        if s.fate is not Fate.NOT_IDENTIFIABLE
    ]
    if not known:
        reason = shares[0].reason
        return Share(part, None, None, Fate.NOT_IDENTIFIABLE, reason)
    pairs, shares = known, [s for s, _ in known]
    total = sum(w for _, w in pairs)
    mean = sum(w * (s.coefficient or 0.0) for s, w in pairs) / total
    error = sum((w * (s.uncertainty or 0.0)) ** 2 for s, w in pairs) ** 0.5 / total
    if alike(shares):
        reason = shares[0].reason
        if shares[0].fate is Fate.SCALED:
            reason = f"applied times {figure(mean)}"
        return Share(part, mean, error, shares[0].fate, reason)
    wrong = [s for s in shares if s.fate is not Fate.APPLIED]
    first = f"{wrong[0].part}: {_phrase(wrong[0])}"
    reason = f"{len(wrong)} of {len(shares)} {_MIXED}, first {first}"
    return Share(part, mean, error, Fate.OTHER, reason)


def alike(shares: Sequence[Share]) -> bool:
    """Whether all parts had the same fate, and the same scale if that is it."""
    if len({s.fate for s in shares}) > 1:
        return False
    if shares[0].fate is not Fate.SCALED:
        return len({s.reason for s in shares}) == 1
    found = [s.coefficient or 0.0 for s in shares]
    error = max(s.uncertainty or 0.0 for s in shares)
    return max(found) - min(found) <= max(NEAR, 2 * SURE * error)


def summary(layers: Sequence[Share], kinds: Sequence[Share]) -> str:
    """What happened, in one line: by layer, or by kind where that says it shorter."""
    known = [s for s in layers if s.fate is not Fate.NOT_IDENTIFIABLE]
    if not known:
        return "not identifiable from these outputs"
    hidden = len(layers) - len(known)
    unknown = f" ({hidden} of {len(layers)} not identifiable)" if hidden else ""
    wrong = [s for s in known if s.fate is not Fate.APPLIED]
    odd = [s for s in kinds if s.fate not in (Fate.APPLIED, Fate.NOT_IDENTIFIABLE)]
    if not wrong and not odd:
        return "applied in every layer" + unknown
    if not wrong:
        said = "; ".join(f"{s.part} {_phrase(s)}" for s in odd[:3])
        return f"on the average of all layers {said}{unknown}"
    if len(wrong) == len(known) and alike(wrong) and wrong[0].fate is not Fate.OTHER:
        return f"every layer {_together(wrong)}" + unknown
    mixed, clear = (sum(_MIXED in s.reason for s in part) for part in (wrong, odd))
    chosen = odd if odd and clear < mixed else wrong
    said = "; ".join(f"{s.part} {_phrase(s)}" for s in chosen[:3])
    more = f"; and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return said + more + unknown


def _together(shares: Sequence[Share]) -> str:
    if shares[0].fate is not Fate.SCALED:
        return _phrase(shares[0])
    mean = sum(s.coefficient or 0.0 for s in shares) / len(shares)
    return f"applied times {figure(mean)}"


def _phrase(share: Share) -> str:
    return share.reason or share.fate.value
