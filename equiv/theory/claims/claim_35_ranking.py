"""Claim 35: post-block steering against LoReFT, crossed so that the cause shows."""

from collections.abc import Mapping

from equiv.report.numbers import percent
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, Side, difference, mean
from equiv.theory.trained.comparing import averages, compared, untaught
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

OURS, SAME_POSITIONS, REFT = (
    "linear block_out all",
    "loreft mlp_out all",
    "loreft mlp_out last",
)
VECTOR, HEADS, FULL = "vector block_out all", "heads attn_heads all", "all weights"
# What is varied: the two levels, the one of post-block steering first.
FACTORS = {
    "form": ("linear", "loreft"),
    "site": ("block_out", "mlp_out"),
    "positions": ("all", "last"),
}


@claim(
    35,
    title="linear steering at block_out beats LoReFT at mlp_out, a vector head offsets",
    formula="loss(linear, block_out) < loss(LoReFT, mlp_out), and block_out < mlp_out",
    assumptions="equal rank and positions, the same steps and data, each its best rate",
    source="blog: tables; paper: Table 1, second-hand",
    falsified_by="LoReFT at mlp_out better, or block_out no better with all else equal",
    kind="trained",
    study="adapting",
    as_written="post-block steering beats ReFT because of where it is",
    derivation="""
        Published comparisons of post-block steering with ReFT differ in three things
        at once: the site (block_out or mlp_out), the positions (all tokens or the
        prompt's last ones) and the form (a linear map or LoReFT). Here all eight
        combinations are trained at the same rank, so each cause has an effect of its
        own: the mean over the four pairs that differ in it alone, one figure per seed.

        Holds: all of the interval of each of three differences lies above 0: LoReFT at
        mlp_out − linear at block_out, both at all tokens; head offsets − vector at
        block_out, of equal size; and the effect of the site. With conditions: the first
        does, another does not. Fails: the first lies below 0. Else undecided.

        As written, location explains the gap of LoReFT at mlp_out and the last token
        to linear steering at block_out and all tokens: judged by whether moving that
        LoReFT to block_out alone closes half of it, seed by seed.
    """,
)
def ranking(results: Mapping[str, Value]) -> ClaimResult:
    """Held-out losses of the answers."""
    crossed = [" ".join(levels) for levels in _combinations()]
    names = (*crossed, VECTOR, HEADS, FULL)
    if (untold := untaught(results, (OURS, SAME_POSITIONS, FULL))) is not None:
        return untold
    parts = {
        "LoReFT at mlp_out − linear at block_out": compared(
            results, SAME_POSITIONS, OURS
        ),
        "head offsets − vector": compared(results, HEADS, VECTOR),
        "effect of the site": effect(results, "site"),
    }
    effects = {factor: effect(results, factor) for factor in FACTORS}
    left = compared(results, OURS, FULL)
    evidence = {
        **averages(results, ("base", *names)),
        **{name: part.to_dict() for name, part in parts.items()},
        **{f"effect of {name}": found.to_dict() for name, found in effects.items()},
        "linear at block_out − all weights": left.to_dict(),
    }
    says = "; ".join(f"{name}: {part}" for name, part in parts.items())
    says += (
        f"; effects of positions {effects['positions']}, form {effects['form']}; "
        f"linear at block_out − all weights: {left}"
    )
    written = _as_written(results)
    sides = [part.side() for part in parts.values()]
    if all(side is Side.ABOVE for side in sides):
        return ClaimResult(Verdict.HOLDS, says, evidence=evidence, as_written=written)
    if sides[0] is Side.ABOVE:
        conditions = {
            f"{name}, not above 0": f"{part}"
            for name, part in parts.items()
            if part.side() is not Side.ABOVE
        }
        return ClaimResult(Verdict.CONDITIONAL, says, conditions, evidence, written)
    verdict = Verdict.FAILS if sides[0] is Side.BELOW else Verdict.INCONCLUSIVE
    return ClaimResult(verdict, says, evidence=evidence, as_written=written)


def effect(results: Mapping[str, Value], factor: str) -> Mean:
    """Of the second level over the first, the mean over what else is varied."""
    place = [*FACTORS].index(factor)
    first, second = FACTORS[factor]
    gaps = []
    for levels in _combinations():
        if levels[place] == first:
            other = (*levels[:place], second, *levels[place + 1 :])
            pair = results["loss"][" ".join(other)], results["loss"][" ".join(levels)]
            gaps.append([a - b for a, b in zip(*pair, strict=True)])
    return mean([sum(own) / len(own) for own in zip(*gaps, strict=True)])


def _combinations() -> list[tuple[str, ...]]:
    forms, sites, positions = FACTORS.values()
    return [(f, s, p) for f in forms for s in sites for p in positions]


def _as_written(results: Mapping[str, Value]) -> AsWritten:
    """Half of the gap, against what moving LoReFT to block_out does."""
    loss = results["loss"]
    gap = compared(results, REFT, OURS)
    moved = {
        "site": compared(results, REFT, "loreft block_out last"),
        "positions": compared(results, REFT, SAME_POSITIONS),
        "form": compared(results, REFT, "linear mlp_out last"),
    }
    # What is left after the move, against half-way between both ends.
    half = [(a + b) / 2 for a, b in zip(loss[REFT], loss[OURS], strict=True)]
    side = difference(half, loss["loreft block_out last"]).side()
    verdicts = {Side.ABOVE: Verdict.HOLDS, Side.BELOW: Verdict.FAILS}
    shares = ", ".join(
        f"{name} {percent(found.mean / gap.mean)}" for name, found in moved.items()
    )
    return AsWritten(
        verdicts.get(side, Verdict.INCONCLUSIVE)
        if gap.side() is Side.ABOVE
        else Verdict.INCONCLUSIVE,
        f"of a gap of {gap}, one change to LoReFT at the last token closes: {shares}",
        {"gap": gap.to_dict(), **{n: found.to_dict() for n, found in moved.items()}},
    )
