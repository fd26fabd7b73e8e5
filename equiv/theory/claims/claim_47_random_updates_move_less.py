"""Claim 47: a random update of equal norm moves the stream less."""

from collections.abc import Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import mean
from equiv.theory.trained.deciding import at_layer, decided, layers, unlearned
from equiv.theory.values import ClaimResult, Value


@claim(
    47,
    title="a random update of equal norm moves block_out less than the fine-tune does",
    formula="‖δ(ΔW)‖ > ‖δ(random ΔW)‖ at block_out, each entry of equal norm",
    assumptions="exact propagated shifts on held-out tokens",
    source="this project",
    falsified_by="a ratio of 1",
    kind="trained",
    study="fine_tunes",
    derivation="""
        A normal matrix of Frobenius norm c turns x into a vector of norm about c
        ‖x‖/√d, whatever x is. Gradients are sums of (error) xᵀ, so a fine-tune's
        matrices are aligned with the inputs they meet, and with what later layers pass
        on. How much that is worth is a matter of measurement.

        Per update and layer the ratio of norms is averaged over seeds; the claim holds
        if Student's 95 % interval lies above 1 everywhere, fails where one lies below,
        and is inconclusive otherwise. The control of equal singular values stands
        beside it: what it moves is what directions alone explain.
    """,
)
def random_updates_move_less(results: Mapping[str, Value]) -> ClaimResult:
    """Ratios of norms by update, control and layer."""
    if (undecided := unlearned(results["accuracy"])) is not None:
        return undecided
    ratios = {
        control: {
            f"{name}, layer {layer}": mean(
                [
                    own / drawn
                    for own, drawn in zip(
                        at_layer(sizes["update"], layer),
                        at_layer(sizes[control], layer),
                        strict=True,
                    )
                ]
            )
            for name, sizes in results["size"].items()
            for layer in layers(sizes["update"])
        }
        for control in ("equal norm", "same spectrum")
    }
    found = [ratio.mean for ratio in ratios["equal norm"].values()]
    return ClaimResult(
        decided(ratios["equal norm"].values(), 1.0),
        f"fine-tunes move block_out {figure(min(found), 2)} to {figure(max(found), 2)} "
        "times as far, by layer",
        evidence={
            control: {name: ratio.to_dict() for name, ratio in by_place.items()}
            for control, by_place in ratios.items()
        },
    )
