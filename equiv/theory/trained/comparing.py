"""Methods of the study `adapting`, compared by the losses of their answers."""

from collections.abc import Iterable, Mapping

from equiv.theory.trained.certainty import Mean, Side, difference
from equiv.theory.values import ClaimResult, Value, Verdict


def compared(results: Mapping[str, Value], first: str, second: str) -> Mean:
    """Loss of the first method − loss of the second, over seeds; above 0: worse."""
    return difference(results["loss"][first], results["loss"][second])


def untaught(results: Mapping[str, Value], names: Iterable[str]) -> ClaimResult | None:
    """`inconclusive` where a method did not come out better than the base."""
    gains = {name: compared(results, "base", name) for name in names}
    for name, gain in gains.items():
        if gain.side() is not Side.ABOVE:
            return ClaimResult(
                Verdict.INCONCLUSIVE,
                f"{name} did not learn the task: loss of the base − its own is {gain}",
                evidence={"gain": gain.to_dict()},
            )
    return None


def averages(results: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """Mean loss, accuracy and trained parameters of methods, for evidence."""
    table: dict[str, Value] = {}
    for name in names:
        row = {
            quantity: sum(results[quantity][name]) / len(results[quantity][name])
            for quantity in ("loss", "accuracy")
        }
        trained = results["parameters"].get(name)
        table[name] = row if trained is None else {**row, "parameters": trained}
    return table
