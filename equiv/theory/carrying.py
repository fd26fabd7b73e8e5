"""A change of an activation, carried to the model's output to first order.

J c with J the derivative of the output with respect to what is added at (layer, site),
at the base, in float64: where a norm is defined on logits, this is how it measures a
change inside the model.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp

from equiv.errors import UnsupportedModelError
from equiv.model.batches import Batch
from equiv.model.guard import measured
from equiv.model.sites import LOGITS
from equiv.model.stages import Stage, StagedModel, staged


def carried(
    model: nn.Module,
    batches: Sequence[Batch],
    layer: int,
    site: str,
    changes: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Change and base of the output, batch by batch.

    Args:
        model: The model; it is left as it is.
        batches: What it is run on.
        layer: Index of the block.
        site: Where the change is.
        changes: Per batch, [batch, seq, d].

    Yields:
        (J c, output), each [batch, seq, vocabulary].

    Raises:
        UnsupportedModelError: If the model returns no logits for these tokens.
        EquivError: If it has no such site or no forward-mode derivative.
    """
    with measured(model), staged(model, batches, torch.float64, sites=(site,)) as cut:
        _check(cut)
        inside = [(stage, cut.tensors(stage)) for stage in cut.stages]
        for batch, change in enumerate(changes):
            yield _carried(cut, inside, batch, layer, site, change.double())


def _check(cut: StagedModel) -> None:
    name = type(cut.model).__name__
    if cut.output_site != LOGITS:
        raise UnsupportedModelError(
            f"{name} returns no logits, so changes cannot be measured by what they do "
            'to them: use norm="euclidean".'
        )
    if any(batch.source is not None for batch in cut.batches):
        raise UnsupportedModelError(
            f"{name} has an encoder, whose tokens have no logits of their own: use "
            'norm="euclidean".'
        )


def _carried(
    cut: StagedModel,
    inside: Sequence[tuple[Stage, dict[str, Tensor]]],
    batch: int,
    layer: int,
    site: str,
    change: Tensor,
) -> tuple[Tensor, Tensor]:
    def output(scale: Tensor) -> Tensor:
        hidden = None
        for stage, tensors in inside:
            here = stage.layer == layer and stage.name in ("block", "module")
            steer = {site: lambda _: scale * change} if here else None
            hidden, _ = cut.run(stage, tensors, hidden, batch, steer=steer)
        assert hidden is not None
        return hidden

    zero = torch.zeros((), dtype=torch.float64)
    found = jvp(output, (zero,), (torch.ones_like(zero),))
    return found[1], found[0]
