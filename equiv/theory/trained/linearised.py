"""The oracle's best linear approximation, applied at every block's output.

h → Δ is regressed on the expressions that the fine-tune was trained on: the affine map
that is nearest, of full rank or of a given one. With several layers a regression needs
an order:

    sequential    each layer on the stream that is already steered below, towards the
                  tuned state: what is still missing there
    propagated    all layers on the unsteered stream, the whole shift: what the layers
                  below make arrives again through the stream
    local         all layers on the unsteered stream, only the block's own shift
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiv.behaviour.distance import kl_divergence
from equiv.steering.fits.sequential import fit_sequential
from equiv.theory.trained.adapting import Adapted, Asked

ORDERS: Mapping[str, Mapping[str, Any]] = {
    "sequential": {"order": "sequential"},
    "propagated": {"order": "simultaneous", "scope": "propagated"},
    "local": {"order": "simultaneous", "scope": "local"},
}


def linearised(
    base: nn.Module, tuned: nn.Module, data: Sequence[Asked], rank: int | None
) -> dict[str, Adapted]:
    """The base steered by the linear oracle, in each order.

    Args:
        base: A Llama.
        tuned: Its full fine-tune.
        data: Batches to fit on.
        rank: Of the maps; `None` for full rank.
    """
    inputs = {
        "input_ids": torch.cat([batch.ids for batch in data]),
        "attention_mask": torch.cat([batch.mask for batch in data]),
    }
    found = {}
    for name, order in ORDERS.items():
        steering = fit_sequential(base, tuned, inputs, rank=rank, **order)
        found[name] = Adapted(base, steering, steering.num_parameters)
    return found


def kl_to(tuned: Tensor, other: Adapted, held_out: Asked) -> float:
    """Mean KL(tuned ‖ other) at the answers, in nats.

    Args:
        tuned: Logits of the answers, [batch, vocabulary].
        other: What is compared with it.
        held_out: The expressions.
    """
    found = held_out.answers(other.logits(held_out))
    return float(kl_divergence(tuned.double(), found.double())[0].mean())
