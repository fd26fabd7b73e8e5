"""From means over seeds to a verdict, the same way in every claim about training.

Results of studies have one list per seed with one value per layer. Verdicts follow from
averages over layers, which are few. Single layers are many comparisons: by chance alone
one interval in forty lies above, and one below.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from equiv.theory.trained.certainty import Mean, Side, difference
from equiv.theory.values import ClaimResult, Value, Verdict

Table = Sequence[Sequence[float]]


def decided(means: Iterable[Mean], level: float = 0.0) -> Verdict:
    """Holds where every interval lies above a level; fails where one lies below.

    Where neither is so the seeds do not tell: inconclusive.

    Example:
        >>> from equiv.theory.trained.certainty import mean
        >>> sure, unsure = mean([1.0, 1.1, 0.9]), mean([1.0, -1.1, 0.3])
        >>> decided([sure]).value, decided([sure, unsure]).value
        ('holds', 'inconclusive')
        >>> decided([sure, unsure, mean([-1.0, -1.1, -0.9])]).value
        'fails'
    """
    sides = {found.side(level) for found in means}
    if Side.BELOW in sides:
        return Verdict.FAILS
    return Verdict.HOLDS if sides == {Side.ABOVE} else Verdict.INCONCLUSIVE


def unlearned(accuracy: Mapping[str, Value]) -> ClaimResult | None:
    """Inconclusive, if a fine-tune is not surely better than its base; else `None`.

    What a fine-tune that has not learned does to a model is no evidence.

    Args:
        accuracy: Model, "base" among them → "new" → share of expressions with the new
            operators that it answers right, per seed.
    """
    gains = {
        name: difference(shares["new"], accuracy["base"]["new"])
        for name, shares in accuracy.items()
        if name != "base"
    }
    said = [f"{n} by {gain}" for n, gain in gains.items() if gain.low <= 0]
    if not said:
        return None
    return ClaimResult(
        Verdict.INCONCLUSIVE,
        f"a fine-tune is not surely better than its base: {'; '.join(said)}",
    )


def over_layers(table: Table) -> list[float]:
    """Per seed, the mean over layers.

    Example:
        >>> over_layers([[1.0, 2.0], [3.0, 5.0]])
        [1.5, 4.0]
    """
    return [fmean(row) for row in table]


def at_layer(table: Table, layer: int) -> list[float]:
    """Per seed, the value at a layer."""
    return [row[layer] for row in table]


def by_layer(table: Table) -> list[float]:
    """Per layer, the mean over seeds.

    Example:
        >>> by_layer([[1.0, 2.0], [3.0, 5.0]])
        [2.0, 3.5]
    """
    return [fmean(at_layer(table, layer)) for layer in layers(table)]


def layers(table: Table) -> range:
    """The layers of a table."""
    return range(len(table[0]))
