"""How well the second order of KL tells what an update does to the output.

Symbols, per token: z the base's logits, p = softmax z, F = diag p − p pᵀ; δz the change
of the logits by the update at scale t, exact or its derivative times t.

    quadratic = ½ δzᵀ F δz,    KL = KL(softmax(z + exact δz) ‖ p)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import LOGITS
from equiv.model.stages import staged
from equiv.shift.propagate import propagate
from equiv.shift.traces import Point
from equiv.update.update import Update

# Scales of the update, from its full size down.
SCALES = tuple(2.0**-k for k in range(0, 9, 2))


@dataclass(frozen=True)
class OutputChange:
    """One scale's figures per token, each [tokens], float64.

    Attributes:
        kl: KL(scaled update ‖ base).
        exact: The quadratic of the exact change of the logits.
        first_order: The quadratic of their derivative times the scale.
        stream: ‖δh‖, the exact shift after the last block.
    """

    kl: Tensor
    exact: Tensor
    first_order: Tensor
    stream: Tensor


def output_changes(
    model: nn.Module,
    update: Update,
    inputs: object,
    scales: Sequence[float] = SCALES,
) -> dict[float, OutputChange]:
    """KL and its second order at every token that counts, by scale, in float64.

    Args:
        model: A model of a known family that returns logits.
        update: The update.
        inputs: As for `equiv.check`, tokenised.
        scales: By what the update is multiplied.
    """
    found: dict[float, list[tuple[Tensor, ...]]] = {t: [] for t in scales}
    points = [Point(0.0, tangent=True), *(Point(t) for t in scales)]
    with measured(model):
        batches = from_inputs(model, inputs, None)
        with staged(model, batches, torch.float64, sites=("block_out",)) as cut:
            streams: list[dict[float, Tensor]] = []
            for stage, _, traces in propagate(cut, update, points):
                if stage.name == "block":
                    streams = [
                        {t: trace.values[t]["block_out"] for t in (0.0, *scales)}
                        for trace in traces
                    ]
                    continue
                for trace in traces:
                    if stage.name != "head":
                        continue
                    mask, h = batches[trace.batch].mask, streams[trace.batch]
                    z, tangent = trace.values[0.0][LOGITS], trace.tangents[0.0][LOGITS]
                    for t in scales:
                        moved = trace.values[t][LOGITS]
                        each = (
                            divergence(moved, z),
                            quadratic(z, moved - z),
                            quadratic(z, t * tangent),
                            (h[t] - h[0.0]).norm(dim=-1),
                        )
                        found[t].append(tuple(part[mask] for part in each))
    return {
        t: OutputChange(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        for t, rows in found.items()
    }


def divergence(z: Tensor, other: Tensor) -> Tensor:
    """KL(softmax z ‖ softmax other) in nats.

    Example:
        >>> z = torch.tensor([0.0, 0.0])
        >>> float(divergence(z, z + 3))
        0.0
    """
    log_p, log_q = z.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def quadratic(z: Tensor, change: Tensor) -> Tensor:
    """½ δzᵀ (diag p − p pᵀ) δz.

    Example:
        >>> float(quadratic(torch.zeros(2), torch.tensor([2.0, 0.0])))  # p = ½, ½
        0.5
    """
    p = z.softmax(-1)
    mean = (p * change).sum(-1)
    return ((p * change.square()).sum(-1) - mean.square()) / 2
