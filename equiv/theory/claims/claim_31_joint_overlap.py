"""Claim 31: trained together, an adapter and LoRA write into shared directions."""

from collections.abc import Mapping

import torch

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.subspaces import overlap
from equiv.theory.toys import Draw
from equiv.theory.trained.certainty import Side, mean
from equiv.theory.trained.deciding import over_layers
from equiv.theory.values import ClaimResult, Value, Verdict

DRAWS = 1000
# Squared cosines of float32 weights that were projected in float64 are near 1e-14.
NONE = 1e-6


@claim(
    31,
    title="joint training aligns adapter and LoRA beyond chance, projection parts them",
    formula="‖Q_Bᵀ Q_U‖²/r > r/d for naive joint training; 0 under the constraint",
    assumptions="B: LoRA on down_proj; U: its block's adapter at block_out; rank r",
    source="paper: joint adaptation, second-hand",
    falsified_by="a naive overlap no larger than chance, or a projected one above 1e-6",
    kind="trained",
    study="adapting",
    derivation="""
        Both parts write into the same stream, and the gradient of what they write is
        the same vector there: at a token, U moves along g zᵀ and B along g (A m)ᵀ with
        one g. So their columns are drawn to the same directions of gradients. Nothing
        bounds by how much.

        Two random spaces of r dimensions in d overlap by r/d, with a spread that is
        drawn here. The overlap is the mean over layers, one figure per seed. Holds: all
        of the interval over seeds lies above r/d, and the projected sides of the
        constrained models overlap by nothing. Fails: the interval lies within two
        spreads of chance, or below, or a projected side overlaps. Else undecided.

        Beside it stands what the adapter reads of LoRA's directions, ‖Q_Bᵀ Q_D‖²/r, and
        what each projection does to the side that it leaves alone.
    """,
)
def joint_overlap(results: Mapping[str, Value], seed: int) -> ClaimResult:
    """Layer means per seed, against chance with its spread."""
    by_side = results["overlap"]["joint none"]
    naive = {side: over_layers(own) for side, own in by_side.items()}
    d, r, layers = _sizes(results)
    centre, spread = chance(d, r, layers, seed)
    found = {side: mean(own) for side, own in naive.items()}
    largest = {
        side: max(max(own) for own in results["overlap"][f"joint {side}"][side])
        for side in ("output", "input")
    }
    evidence = {
        "naive, output": found["output"].to_dict(),
        "naive, input": found["input"].to_dict(),
        "chance": centre,
        "spread of chance": spread,
        "largest where projected": largest,
        "output overlap, input projected": sum(
            over_layers(results["overlap"]["joint input"]["output"])
        )
        / len(results["seeds"]),
    }
    says = (
        f"What both write overlaps by {found['output']}, chance is {figure(centre)} ± "
        f"{figure(spread, 2)}; what the adapter reads of it by {found['input']}; "
        f"projected, at most {figure(max(largest.values()), 2)}"
    )
    side = found["output"].side(centre)
    parted = max(largest.values()) <= NONE
    if side is Side.ABOVE and parted:
        return ClaimResult(Verdict.HOLDS, says, evidence=evidence)
    within = found["output"].high < centre + 2 * spread
    verdict = Verdict.FAILS if within or not parted else Verdict.INCONCLUSIVE
    return ClaimResult(verdict, says, evidence=evidence)


def chance(d: int, r: int, layers: int, seed: int) -> tuple[float, float]:
    """Mean, and spread of the mean over layers, for random spaces.

    Example:
        >>> centre, spread = chance(64, 8, 1, seed=0)
        >>> abs(centre - 8 / 64) < 0.005, 0.01 < spread < 0.03
        (True, True)
    """
    draw = Draw(seed)
    drawn = torch.tensor(
        [overlap(draw.normal(d, r), draw.normal(d, r)) for _ in range(DRAWS)]
    )
    return float(drawn.mean()), float(drawn.std()) / layers**0.5


def _sizes(results: Mapping[str, Value]) -> tuple[int, int, int]:
    sizes = results["sizes"]
    return (
        sizes["width"],
        sizes["rank"],
        len(results["overlap"]["joint none"]["output"][0]),
    )
