"""What each stage's own update adds to the model's output, to first order.

Symbols
    δ_k     local first-order shift of stage k: its own ΔW, its input at the base
    c_k     J_{out←k} δ_k: that shift carried to the output, at the base
    c       Σ_k c_k, the first-order change of the output
    F       the metric of the output, see `output_metric.py`

With ⟨a, b⟩ = Σ_tokens aᵀ F b, half of ‖c‖² is to second order the summed KL between
base and tuned. Stage k's share of it is ⟨c_k, c⟩/‖c‖²; shares sum to 1. What it would
do alone, ‖c_k‖²/‖c‖², need not: stages may help or undo each other.

The logits of all stages at once would not fit into memory where the vocabulary is
large. At the head's input, where c_k = J x_k, it is ⟨c_k, c⟩ = x_k · Jᵀ F c.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiv.shift.output_metric import OutputMetric


@dataclass(frozen=True)
class Contributions:
    """First-order changes of the output, by the stage whose update makes them.

    Attributes:
        measure: "kl" where half the square is KL to second order, "output" where it is
            that of the final output.
        stages: The stages that the update touches: −1 is the embedding (of an
            encoder–decoder both, with the encoder's last norm), 0 … the blocks, the
            number of blocks the head.
        shares: ⟨c_k, c⟩/‖c‖² of each; they sum to 1, negative where an update undoes
            what others do.
        alone: ‖c_k‖²/‖c‖² of each; they need not sum to anything.

    Example:
        >>> found = Contributions("kl", (0, 2), (0.75, 0.25), (0.5, 0.1))
        >>> found.share(0), found.share(1)
        (0.75, 0.0)
    """

    measure: str
    stages: tuple[int, ...]
    shares: tuple[float, ...]
    alone: tuple[float, ...]

    def share(self, stage: int) -> float:
        """One stage's share of the whole change; zero where nothing is updated."""
        return dict(zip(self.stages, self.shares, strict=True)).get(stage, 0.0)


@dataclass
class Sums:
    """Running sums over batches: ⟨c_k, c⟩ and ‖c_k‖² by stage."""

    with_all: dict[int, float] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    classes: bool = False

    def add(
        self,
        shifts: Sequence[tuple[int, Tensor]],
        own: tuple[int, Tensor] | None,
        forward: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        metric: OutputMetric,
    ) -> Tensor:
        """Add one batch; returns c.

        Args:
            shifts: Stage and x_k at the head's input, [batch, seq, d].
            own: The head itself and its c_k, if the update touches it.
            forward: J, from the head's input to the output.
            back: Jᵀ.
            metric: F.
        """
        self.classes = metric.classes
        total = torch.zeros_like(metric.output)
        for stage, shift in shifts:
            total += self._one(stage, forward(shift), metric)
        if own is not None:
            total += self._one(*own, metric)
        weighted = metric.times(total)
        pulled = back(weighted) if shifts else weighted
        for stage, shift in shifts:
            self._count(self.with_all, stage, shift, pulled)
        if own is not None:
            self._count(self.with_all, *own, weighted)
        return total

    def result(self) -> Contributions | None:
        """The contributions; `None` where the output does not move."""
        whole = sum(self.with_all.values())
        if not whole > 0:
            return None
        return Contributions(
            "kl" if self.classes else "output",
            tuple(self.with_all),
            tuple(value / whole for value in self.with_all.values()),
            tuple(self.alone[stage] / whole for stage in self.with_all),
        )

    def _one(self, stage: int, change: Tensor, metric: OutputMetric) -> Tensor:
        self._count(self.alone, stage, change, metric.times(change))
        return change

    @staticmethod
    def _count(sums: dict[int, float], stage: int, a: Tensor, b: Tensor) -> None:
        sums[stage] = sums.get(stage, 0.0) + float((a * b).sum())
