"""What the oracle at one layer and site does for the model's output.

The steered base goes on, at this layer and site alone, with the tuned model's
activation. ΔKL = KL(tuned ‖ steered)/KL(tuned ‖ base) − 1: −1 where the output is the
tuned model's, above 0 where it is farther from it than the base's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equiv.model.sites import SITES
from equiv.shift.activations import shifts
from equiv.steering.applying.apply import steer
from equiv.steering.forms.oracle import Overwrite
from equiv.theory.trained.output_changes import divergence
from equiv.update.update import Update


@torch.no_grad()
def oracle_changes(
    base: Any, tuned: Any, inputs: dict[str, Tensor], sites: Sequence[str] = SITES
) -> dict[str, list[float]]:
    """ΔKL per site and layer, the mean over tokens that count.

    Args:
        base: A model of a known family.
        tuned: The same, tuned.
        inputs: `input_ids` and `attention_mask`, padded on the right.
        sites: Of the oracle.
    """
    mask = inputs["attention_mask"].bool()

    def logits(model: Any) -> Tensor:
        return model(**inputs, use_cache=False).logits[mask].double()

    target = logits(tuned)
    plain = float(divergence(target, logits(base)).mean())
    found: dict[str, list[float]] = {site: [] for site in sites}
    update = Update.between(base, tuned)
    for shift in shifts(base, update, inputs, sites=sites, dtype=torch.float64):
        oracle = Overwrite(shift.base + shift.exact)
        with steer(base, {(shift.layer, shift.site): oracle}):
            left = float(divergence(target, logits(base)).mean())
        found[shift.site].append(left / plain - 1)
    return found
