"""Claim 17: what a steer at each site leaves of the block's shift, at equal rank."""

from collections.abc import Iterator, Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, Side, difference
from equiv.theory.trained.deciding import (
    at_layer,
    by_layer,
    decided,
    layers,
    over_layers,
    unlearned,
)
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

# The source's order, from the site that is said to fit best.
ORDER = ("block_out", "mlp_out", "mlp_in", "attn_out")


@claim(
    17,
    title="a steer that reads the stream fits better than one that reads mlp_out",
    formula=(
        "misfit(block_out) < misfit(mlp_out), of affine maps of one rank, as shares of "
        "‖δ_block‖² on held-out tokens"
    ),
    assumptions="an update of whole blocks; misfits averaged over layers",
    source="paper: the post-block output is the most expressive site",
    falsified_by="mlp_out leaves less than block_out beyond the spread over seeds",
    kind="trained",
    study="fine_tunes",
    as_written=(
        "at every layer block_out fits best, then mlp_out, then mlp_in and attn_out"
    ),
    derivation="""
        mlp_out and block_out write to the same place; what differs is what the steer
        reads. The block's shift holds the skip's, which is a function of x′ and of the
        blocks below. A map of the MLP's output y sees x′ only through the MLP, a map of
        h = x′ + y sees both, mixed. No theorem says which is better at equal rank: an
        update of W_d alone is C y at mlp_out.

        Every steer here is added at block_out and fitted in closed form to the
        propagated shift of the block. Per update and rank the misfits are averaged over
        layers and their difference taken seed by seed. The claim holds if Student's 95
        % interval of every such difference lies above 0, and with conditions where a
        layer, or the part of the update that is W_d's, goes the other way beyond its
        own interval; it fails if an interval lies below 0, and is inconclusive
        otherwise.

        The same of random updates of equal norm stands in the evidence and judges
        nothing: what it shows too has not been learned.
    """,
)
def sites_at_equal_rank(results: Mapping[str, Value]) -> ClaimResult:
    """Differences between sites, seed by seed."""
    if (undecided := unlearned(results["accuracy"])) is not None:
        return undecided
    misfits = results["misfit"]
    means = _gaps(misfits)
    control = {name: found["misfit"] for name, found in results["control"].items()}
    verdict = decided(means.values())
    alone = {"W_d alone": results["misfit of W_d alone"]}
    against = {
        place: str(found)
        for place, found in _layer_by_layer({**misfits, **alone}, "block_out")
        if found.side() is Side.BELOW
    }
    if verdict is Verdict.HOLDS and against:
        verdict = Verdict.CONDITIONAL
    least = min(means.values(), key=lambda found: found.low)
    return ClaimResult(
        verdict,
        f"mlp_out leaves more than block_out by {least} of the squared shift, or "
        f"more, in {len(means)} comparisons"
        if verdict in (Verdict.HOLDS, Verdict.CONDITIONAL)
        else f"mlp_out less block_out is as low as {least} of the squared shift",
        conditions={
            f"mlp_out less block_out, {place}": said for place, said in against.items()
        },
        evidence={
            "mlp_out less block_out": {n: m.to_dict() for n, m in means.items()},
            "mlp_out less block_out, random update of equal norm": {
                name: found.to_dict() for name, found in _gaps(control).items()
            },
            "x′ less block_out, both written at block_out": _reading(misfits),
            "misfit of the update, full rank, by layer": _shown(misfits),
            "misfit of W_d alone, full rank, by layer": _shown(alone),
        },
        as_written=_as_written(misfits),
    )


def _gaps(misfits: Mapping[str, Value]) -> dict[str, Mean]:
    """mlp_out less block_out, averaged over layers, for every update and rank."""
    return {
        f"{name}, rank {rank}": difference(
            over_layers(by_site["mlp_out"][rank]), over_layers(table)
        )
        for name, by_site in misfits.items()
        for rank, table in by_site["block_out"].items()
    }


def _layer_by_layer(
    misfits: Mapping[str, Value], better: str, worse: str = "mlp_out"
) -> Iterator[tuple[str, Mean]]:
    """Worse less better, for every update, rank and layer."""
    for name, by_site in misfits.items():
        for rank, table in by_site[better].items():
            for layer in layers(table):
                found = difference(
                    at_layer(by_site[worse][rank], layer), at_layer(table, layer)
                )
                yield f"{name}, rank {rank}, layer {layer}", found


def _reading(misfits: Mapping[str, Value]) -> dict[str, Value]:
    """What reading x′ leaves, less what reading h leaves."""
    return {
        f"{name}, rank {rank}": difference(
            over_layers(by_site["resid_mid"][rank]), over_layers(table)
        ).to_dict()
        for name, by_site in misfits.items()
        for rank, table in by_site["block_out"].items()
    }


def _shown(misfits: Mapping[str, Value]) -> dict[str, Value]:
    """Means over seeds by site, one per layer, of full rank."""
    return {
        f"{name}, {site}": by_layer(by_rank["full"])
        for name, by_site in misfits.items()
        for site, by_rank in by_site.items()
    }


def _as_written(misfits: Mapping[str, Value]) -> AsWritten:
    """The place where the order is broken by most, beyond the spread over seeds."""
    broken = [
        (found.mean, f"{worse} less {better}, {place}", found)
        for n, better in enumerate(ORDER[:-1])
        for worse in ORDER[n + 1 :]
        if (better, worse) != ("mlp_in", "attn_out")  # the source does not order them
        for place, found in _layer_by_layer(misfits, better, worse)
        if found.side() is Side.BELOW
    ]
    if not broken:
        return AsWritten(Verdict.HOLDS, "no pair of sites is out of this order")
    size, place, found = min(broken)
    return AsWritten(
        Verdict.FAILS,
        f"{len(broken)} pairs are out of this order; {place} is {figure(size)}",
        {place: found.to_dict()},
    )
