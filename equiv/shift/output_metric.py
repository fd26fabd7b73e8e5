"""How large a small change of the model's output is: to second order, in KL.

With logits z, p = softmax z and F = diag p − p pᵀ, a change c of the logits of one
token moves the distribution by KL = ½ cᵀ F c, to second order. Without logits the
square of the change itself is taken. Only tokens that count enter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.model.sites import LOGITS
from equiv.model.stages import StagedModel
from equiv.shift.measures import has_tokens


@dataclass(frozen=True)
class OutputMetric:
    """F, or the identity; at the output [batch, seq, vocab or d] of the base.

    Example:
        >>> even = torch.zeros(1, 2, dtype=torch.float64)  # p = ½, ½
        >>> metric = OutputMetric(True, even, torch.ones(1, dtype=torch.bool))
        >>> metric.times(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
        tensor([[ 0.2500, -0.2500]], dtype=torch.float64)
    """

    classes: bool  # whether the output is logits of several classes
    output: Tensor
    mask: Tensor

    def times(self, change: Tensor) -> Tensor:
        """F c; zero at tokens that do not count."""
        if self.classes:
            p = torch.softmax(self.output, -1)
            change = p * (change - (p * change).sum(-1, keepdim=True))
        return self._counted(change)

    def root(self, probe: Tensor) -> Tensor:
        """Rᵀ u with Rᵀ R = F: its product with c has the mean square cᵀ F c.

        Over probes u of independent entries of mean 0 and variance 1. R is
        diag √p (I − 1 pᵀ).
        """
        if self.classes:
            p = torch.softmax(self.output, -1)
            scaled = p.sqrt() * probe
            probe = scaled - p * scaled.sum(-1, keepdim=True)
        return self._counted(probe)

    def _counted(self, change: Tensor) -> Tensor:
        if not has_tokens(change, self.mask):
            return change
        axes = [1] * (change.ndim - self.mask.ndim)
        return change * self.mask.reshape(*self.mask.shape, *axes)


def metric_of(cut: StagedModel, output: Tensor, batch: int) -> OutputMetric:
    """The metric at the base's output of one batch."""
    # One logit alone is no distribution: a regression's output.
    classes = cut.output_site == LOGITS and output.shape[-1] > 1
    return OutputMetric(classes, output, cut.batches[batch].mask)
