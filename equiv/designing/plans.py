"""The best plan for a budget: what a plan is predicted to leave, and the search.

Symbols
    A(i, l)   the share of the output's change that the stages above layer i add, up to
              layer l (`shift/contributions.py`); all stages together add 1
    μ         the share that a steer leaves of the effect of what it is fitted to

A steer at layer l is fitted to everything that is missing there: what the steer below,
at layer i, has left, and what the stages between the two have added. It is taken to
leave the same share of this as of the unsteered model's shift, where μ was measured:

    left(l) = μ_l · (left(i) + A(i, l)),        finally  left(last) + A(last, end)

(and 0 where A is so negative that nothing would be missing).

Everything below a layer thus enters by one number, and the final figure grows with it:
of all plans up to a layer that cost the same, the one that leaves least can be part of
the best plan, the others need not be. Keeping these, layer by layer, finds the best
plan that there is (dynamic programming), not only a good one; a larger budget allows
every plan that a smaller one does, so it never captures less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equiv.shift.contributions import Contributions


@dataclass(frozen=True)
class Candidate:
    """A steer that could be part of a plan.

    Attributes:
        layer: Index of the block.
        site: Where it reads and writes, as `Site.key`.
        form: "vector" or "affine".
        rank: Rank of the map; `None` for a vector.
        num_parameters: What it costs.
        left: μ, the share that it leaves.
    """

    layer: int
    site: str
    form: str
    rank: int | None
    num_parameters: int
    left: float


class Added:
    """A(i, l) of every two layers; `None` is below the first and above the last."""

    def __init__(self, contributions: Contributions) -> None:
        self._end = max(contributions.stages) + 2  # the embedding is stage −1
        shares = [contributions.share(stage) for stage in range(-1, self._end - 1)]
        self._sums = np.concatenate([[0.0], np.cumsum(shares)])

    def between(self, below: int | None, layer: int | None) -> float:
        """What the stages above `below` add together, up to `layer`."""
        first = 0 if below is None else min(below + 2, self._end)
        last = self._end if layer is None else min(layer + 2, self._end)
        return float(self._sums[last] - self._sums[first])


def missing(plan: Sequence[Candidate], added: Added, layer: int | None = None) -> float:
    """What is missing at a layer above a plan, or at the end: a share of the change.

    Args:
        plan: Steers, from the first layer to the last, at most one per layer.
        added: What the layers add.
        layer: Where to look, before it is steered; `None` is the end.
    """
    left, below = 0.0, None
    for steer in plan:
        left = steer.left * max(0.0, left + added.between(below, steer.layer))
        below = steer.layer
    return max(0.0, left + added.between(below, layer))


@dataclass(frozen=True)
class _Front:
    """Plans whose last steer is at one layer: the cheapest first, each leaving less.

    `came` points to the plan below (which front, which entry) and to the steer added.
    """

    cost: np.ndarray  # [n]
    left: np.ndarray  # [n]
    came: np.ndarray  # [n, 3]

    def best(self) -> "_Front":
        """Without the plans that cost no less than another and leave no less."""
        order = np.lexsort((self.left, self.cost))
        left = self.left[order]
        least = np.minimum.accumulate(np.concatenate([[np.inf], left[:-1]]))
        kept = order[left < least]
        return _Front(self.cost[kept], self.left[kept], self.came[kept])


def best_plan(
    candidates: Sequence[Candidate], added: Added, budget: int
) -> tuple[Candidate, ...]:
    """The plan within the budget that leaves least; of equals, the cheapest.

    Args:
        candidates: What may be chosen, at most one per layer.
        added: What the layers add.
        budget: The most parameters.

    Returns:
        The steers, from the first layer to the last; none if nothing helps.
    """
    by_layer: dict[int, list[Candidate]] = {}
    for steer in candidates:
        if steer.num_parameters <= budget:
            by_layer.setdefault(steer.layer, []).append(steer)
    layers = sorted(by_layer)
    nothing = _Front(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 3), np.int64))
    fronts = [nothing]
    for layer in layers:
        arriving = _arriving(fronts, [None, *layers], layer, added)
        fronts.append(_steered(arriving, by_layer[layer], budget))
    final = _arriving(fronts, [None, *layers], None, added)
    return _traced(final, fronts, layers, by_layer)


def _arriving(
    fronts: Sequence[_Front],
    layers: Sequence[int | None],
    layer: int | None,
    added: Added,
) -> _Front:
    """What may be missing at a layer, over all plans that end below it."""
    parts = [
        (front.cost, np.maximum(front.left + added.between(below, layer), 0.0), i)
        for i, (front, below) in enumerate(zip(fronts, layers, strict=False))
    ]
    cost = np.concatenate([cost for cost, _, _ in parts])
    left = np.concatenate([left for _, left, _ in parts])
    came = [
        np.stack([np.full(len(c), i), np.arange(len(c)), np.zeros(len(c), int)], 1)
        for c, _, i in parts
    ]
    return _Front(cost, left, np.concatenate(came)).best()


def _steered(arriving: _Front, steers: Sequence[Candidate], budget: int) -> _Front:
    """Every plan that arrives, with every steer that may follow."""
    costs = np.array([steer.num_parameters for steer in steers])
    shares = np.array([steer.left for steer in steers])
    cost = (arriving.cost[:, None] + costs).ravel()
    left = (arriving.left[:, None] * shares).ravel()
    came = np.repeat(arriving.came, len(steers), 0)
    came[:, 2] = np.tile(np.arange(len(steers)), len(arriving.cost))
    affordable = cost <= budget
    return _Front(cost[affordable], left[affordable], came[affordable]).best()


def _traced(
    final: _Front,
    fronts: Sequence[_Front],
    layers: Sequence[int],
    by_layer: dict[int, list[Candidate]],
) -> tuple[Candidate, ...]:
    """The steers of the plan that leaves least, found backwards."""
    chosen: list[Candidate] = []
    front, entry, _ = final.came[-1]
    while front:
        layer = layers[front - 1]
        below, under, steer = fronts[front].came[entry]
        chosen.append(by_layer[layer][steer])
        front, entry = below, under
    return tuple(reversed(chosen))
