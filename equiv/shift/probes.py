"""What the output feels of a change anywhere in a block, by random probes.

Symbols
    J       Jacobian of the output, at the base, in what is added at some site
    R       root of the output's metric: RᵀR = F, see `output_metric.py`
    u       a probe: random signs, one per output entry of a token
    g       Jᵀ Rᵀ u, shaped like what is added

For any change e at that site, g · e summed over tokens is u · R J e, and the mean of
its square over probes is ‖R J e‖². One pass back through the model gives g at every
site of every block, and since it is linear in e, it judges any number of changes.
Sequences do not act on each other, so each can be squared by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiv.model.sites import Sites
from equiv.model.stages import Stage, StagedModel
from equiv.shift.derivative import pullback
from equiv.shift.output_metric import metric_of
from equiv.shift.propagate import propagate
from equiv.shift.traces import TUNED, Point
from equiv.update.update import Update


@dataclass(frozen=True)
class Passed:
    """How one batch passes a block: what comes in, base activations, the shift."""

    hidden: Tensor
    sites: Sites
    shift: Tensor  # of the block's output, by the update


# Per batch and probe: site → g.
Felt = Mapping[int, Sequence[Sites]]


@dataclass
class Probing:
    """Few sequences on their way up, by base and tuned model, and back by probes.

    Attributes:
        cut: The model with these sequences, `reads` and `writes` among its sites.
        update: The update.
        reads: Sites whose base activations are kept.
        writes: Sites where the output is asked what it feels; `block_out` always is.
        low: Names whose low-rank factors are applied beside the weight.
        count: Probes of each batch.
        passed: By layer and batch, once `backwards` has begun.
        bridged: By batch, what an encoder's blocks gave.
    """

    cut: StagedModel
    update: Update
    reads: frozenset[str]
    writes: frozenset[str]
    low: Sequence[str]
    count: int
    passed: dict[int, dict[int, Passed]] = field(default_factory=dict)
    bridged: dict[int, Tensor] = field(default_factory=dict)

    def backwards(self, seed: int) -> Iterator[tuple[int, Felt]]:
        """(layer, what the output feels there), from the last block to the first."""
        ends = self._upwards()
        generator = torch.Generator().manual_seed(seed)
        arriving = {
            batch: self._at_the_end(batch, *end, generator)
            for batch, end in ends.items()
        }
        for stage in reversed(self.cut.stages):
            if stage.name not in ("block", "bridge"):
                continue
            tensors = self.cut.tensors(stage)
            if stage.name == "bridge":
                for batch, weights in arriving.items():
                    arriving[batch] = self._back(
                        stage, self.bridged[batch], batch, weights
                    )
                continue
            felt: dict[int, Sequence[Sites]] = {}
            for batch, weights in arriving.items():
                arriving[batch], felt[batch] = self._through(
                    stage, tensors, batch, weights
                )
            yield stage.layer, felt

    def _upwards(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keep what is needed of every block; (head's input, output) per batch."""
        cut = self.cut
        hidden: dict[int, Tensor] = {}
        ends = {}
        points = (Point(0.0), TUNED)
        for stage, _, traces in propagate(cut, self.update, points, low=self.low):
            for trace in traces:
                base = trace.values[0.0]
                if stage.name == "head":
                    ends[trace.batch] = hidden[trace.batch], base[cut.output_site]
                    continue
                if stage.name == "block":
                    shift = trace.values[1.0]["block_out"] - base["block_out"]
                    wanted = (self.reads | self.writes) & set(stage.sites)
                    kept = {site: base[site] for site in wanted}
                    passed = Passed(hidden[trace.batch], kept, shift)
                    self.passed.setdefault(stage.layer, {})[trace.batch] = passed
                elif stage.name == "bridge":
                    self.bridged[trace.batch] = hidden[trace.batch]
                hidden[trace.batch] = base[stage.output]
        return ends

    def _at_the_end(
        self, batch: int, hidden: Tensor, output: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        """Every probe, pulled back to the head's input."""
        metric = metric_of(self.cut, output, batch)
        drawn = []
        for _ in range(self.count):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            drawn.append(metric.root(signs.to(output)))
        return self._back(self.cut.stages[-1], hidden, batch, drawn)

    def _back(
        self, stage: Stage, hidden: Tensor, batch: int, weights: Sequence[Tensor]
    ) -> list[Tensor]:
        """What is felt at the input of a stage without sites, for every probe."""
        cut, tensors = self.cut, self.cut.tensors(stage)
        noted = cut.notebooks(stage, tensors)

        def run(x: Tensor, own: dict[str, Tensor]) -> Tensor:
            return cut.run(stage, {**tensors, **own}, x, batch)[0]

        pull = pullback(run, hidden, noted)
        return [pull(weight)[0] for weight in weights]

    def _through(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        batch: int,
        weights: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Sites]]:
        """What is felt at a block's input, and at its sites, for every probe."""
        passed = self.passed[stage.layer][batch]
        known = {**passed.sites, "block_out": passed.shift}
        written = (self.writes & set(stage.sites)) | {"block_out"}
        none = {site: torch.zeros_like(known[site]) for site in written}

        def run(x: Tensor, added: Sites) -> Tensor:
            steer = {site: _always(value) for site, value in added.items()}
            return self.cut.run(stage, tensors, x, batch, steer=steer)[0]

        pull = pullback(run, passed.hidden, none)
        both = [pull(weight) for weight in weights]
        return [below for below, _ in both], [felt for _, felt in both]


def _always(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value
