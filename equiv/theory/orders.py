"""How fast something goes to zero with the scale t of an update.

    q(t) = c tᵖ (1 + O(t)),  so  log₂ q is a line in log₂ t as t → 0, and p its slope

by least squares over the finest scales at which q is more than rounding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from equiv.theory.values import Value

# A figure this many times its rounding error has an order good to log2(1 + 2/64) = 0.04
# between two scales in the worst case.
ABOVE_FLOOR = 64.0
# Scales of an update that orders are read off, coarsest first.
SCALES = tuple(2.0**-k for k in range(4, 9))
# A difference of two runs in float64 is right to about so much of the outputs: tens of
# operations in a row, each off by half a unit in the last place.
ROUNDING = 100 * 2.0**-52
# So many of the finest: fewer leave no spread, more reach where higher terms count.
FINEST = 4
# An order may be off by this much: the O(t) above at the scales that are left.
OFF = 0.2


@dataclass(frozen=True)
class Decay:
    """What a figure does as the update gets small.

    Attributes:
        order: p, by least squares.
        spread: Largest distance from it of the slope between two neighbouring scales.
        constant: c = q(t) / t^⌊p⌉ at the finest scale.
        scales: Those used, coarsest first.
    """

    order: float
    spread: float
    constant: float
    scales: tuple[float, ...]

    def near(self, expected: float, off: float = OFF) -> bool:
        """Whether the order is what is expected."""
        return abs(self.order - expected) <= off

    def to_dict(self) -> dict[str, Value]:
        """As evidence holds it."""
        return {"order": self.order, "spread": self.spread}


def decay(figures: Mapping[float, float], floor: float = 0.0) -> Decay | None:
    """The order of a figure in the scale.

    Args:
        figures: t → q(t), q a norm or a divergence.
        floor: Rounding error of q.

    Returns:
        The order; `None` where fewer than three scales lie above the floor.

    Example:
        >>> found = decay({t: 3 * t**2 + t**3 for t in (0.02, 0.01, 0.005)})
        >>> round(found.order, 2), found.spread < 0.01, round(found.constant, 1)
        (2.0, True, 3.0)
        >>> decay({t: 1e-16 for t in (0.4, 0.2, 0.1)}, floor=1e-16) is None
        True
    """
    kept = [t for t in sorted(figures) if figures[t] > ABOVE_FLOOR * floor]
    kept = [t for t in kept if math.isfinite(figures[t]) and figures[t] > 0][:FINEST]
    if len(kept) < 3:
        return None
    x, y = np.log2(kept), np.log2([figures[t] for t in kept])
    order = float(np.polyfit(x, y, 1)[0])
    spread = float(abs(np.diff(y) / np.diff(x) - order).max())
    constant = figures[kept[0]] / kept[0] ** round(order)
    return Decay(order, spread, constant, tuple(reversed(kept)))
