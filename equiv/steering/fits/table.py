"""Moments of the unsteered stream: what closed-form fits and their misfits need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from equiv.model.sites import Site, read_and_written
from equiv.model.stages import Stage, StagedModel
from equiv.shift.measures import counted
from equiv.shift.traces import Trace
from equiv.steering.fits.chain import aim
from equiv.steering.fits.moments import Moments
from equiv.steering.fits.sinks import fitted_tokens, stream_of

# (layer, where it reads and writes, whose shift is aimed at)
PairKey = tuple[int, str, str]


@dataclass
class MomentTable:
    """Moments of (activation, shift) per layer and site, fitting and held-out apart."""

    cut: StagedModel
    sites: Sequence[str]
    target: str
    fitting: dict[PairKey, Moments] = field(default_factory=dict)
    held_out: dict[PairKey, Moments] = field(default_factory=dict)

    def fit_target(self, site: str) -> str:
        """Whose shift a fit that reads `site` is measured against."""
        has_blocks = self.cut.blocks is not None
        whole = self.target == "block" and has_blocks
        return "block_out" if whole else Site(site).write

    def pairs(self, site: str) -> set[tuple[str, str]]:
        """(read, target) pairs of one site: for the fit's row and for applying it."""
        return {
            (site, self.fit_target(site)),
            (site, aim(self.cut, site, self.target)),
        }

    def add(self, stage: Stage, trace: Trace) -> None:
        """Add one batch of a block; nothing where there is no shift."""
        if not trace.moved:
            return
        held = self.cut.batches[trace.batch].held_out
        table = self.held_out if held else self.fitting
        base, tuned = trace.values[0.0], trace.values[1.0]
        for site in self.sites:
            if not set(read_and_written([site])) <= set(stage.sites):
                continue
            for read, aimed in self.pairs(site):
                moments = table.setdefault((stage.layer, read, aimed), Moments())
                mask = self.cut.mask(stage, trace.batch)
                x = base[Site(read).read]
                keep = fitted_tokens(mask, stream_of(base, Site(read).read))
                shift = tuned[aimed] - base[aimed]
                moments.add(counted(x, keep), counted(shift, keep))

    def applied(self, layer: int) -> Mapping[str, Moments]:
        """Per site, the fitting moments of what a steer there aims at when applied."""
        return {
            site: self.fitting[layer, site, aim(self.cut, site, self.target)]
            for site in self.sites
            if (layer, site, aim(self.cut, site, self.target)) in self.fitting
        }
