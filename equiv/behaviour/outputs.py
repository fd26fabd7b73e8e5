"""What the steered and the tuned model return for a batch, one batch at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equiv.model.factors import UnusedFactorsError
from equiv.model.sites import LOGITS, Steer
from equiv.model.stages import StagedModel
from equiv.shift.stage_update import StageUpdate
from equiv.update.update import Update


class Outputs:
    """Runs a model cut into stages, steered or tuned; nothing of a run is kept.

    Args:
        cut: The model, ready to be run.
        update: An update that fits it.
        low: Names whose low-rank factors are applied beside the weight.
    """

    def __init__(self, cut: StagedModel, update: Update, low: Sequence[str]) -> None:
        self.cut, self.update, self.low = cut, update, set(low)
        self.tensors = [cut.tensors(stage) for stage in cut.stages]

    def steered(self, batch: int, steers: Mapping[int, Steer]) -> Tensor:
        """The output of the steered model, with gradients where they are on.

        Args:
            batch: Which batch.
            steers: Layer → what is added at its sites.
        """
        hidden = None
        for stage, tensors in zip(self.cut.stages, self.tensors, strict=True):
            inside = stage.name in ("block", "module")
            steer = steers.get(stage.layer) if inside else None
            hidden, _ = self.cut.run(stage, tensors, hidden, batch, steer=steer)
        assert hidden is not None
        return hidden

    @torch.no_grad()
    def tuned(self, batch: int) -> Tensor:
        """The output of the tuned model; its weights are made stage by stage."""
        try:
            return self._tuned(batch)
        except UnusedFactorsError as unused:
            # The weight is used in some way that a hook cannot see: make it dense.
            self.low -= unused.names
            return self.tuned(batch)

    def _tuned(self, batch: int) -> Tensor:
        hidden = None
        for stage, tensors in zip(self.cut.stages, self.tensors, strict=True):
            change = StageUpdate(self.cut, stage, self.update, self.low)
            moved = {name: tensors[name] + d for name, d in change.dense.items()}
            hidden, _ = self.cut.run(
                stage,
                {**tensors, **moved},
                hidden,
                batch,
                low=change.low,
                scale=1.0,
                at=1.0,
            )
        assert hidden is not None
        return hidden

    def has_classes(self, output: Tensor) -> bool:
        """Whether an output is logits; one alone is a regression."""
        return self.cut.output_site == LOGITS and output.shape[-1] > 1
