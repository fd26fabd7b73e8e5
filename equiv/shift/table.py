"""The shift at full size (t = 1) per layer, site and scope, and the coverage."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiv.errors import UpdateError
from equiv.model.batches import first_unmasked
from equiv.model.sites import Sites
from equiv.shift.calculus import RowKey, Selection, scopes
from equiv.shift.derivative import JVP
from equiv.shift.flips import Flips
from equiv.shift.measures import Comparison, Square, counted, has_tokens, ratio
from equiv.shift.results import Scope
from equiv.shift.traces import Trace


@dataclass
class FullSize:
    """Sums of one row: the base activation, and both first-order shifts.

    `rest` has the same sums without the first position of each sequence that counts;
    no tokens where there are no positions. `unflipped` has them over the tokens whose
    experts stay, propagated; `None` where no block up to here chooses experts.
    """

    base: Square = field(default_factory=Square)
    first: Comparison = field(default_factory=Comparison)
    midpoint: Comparison = field(default_factory=Comparison)
    tokens: int = 0
    derivative: str = JVP
    rest: "FullSize | None" = None
    unflipped: "FullSize | None" = None

    def add(self, base: Tensor, exact: Tensor, slopes: tuple[Tensor, ...]) -> None:
        """Add tokens [tokens, features]; slopes at the base and, if had, midway."""
        self.tokens += len(base)
        self.base.add(base)
        sums = (self.first, self.midpoint)
        for comparison, slope in zip(sums, slopes, strict=False):
            comparison.add(exact, slope)


@dataclass
class StreamSums:
    """Norms of the base stream after a block: tokens at first positions, and others."""

    first: float = 0.0
    rest: float = 0.0
    firsts: int = 0
    others: int = 0

    def add(self, stream: Tensor, mask: Tensor) -> None:
        """Add a batch, [batch, seq, d]; what has no positions is left out."""
        if mask.ndim < 2 or not has_tokens(stream, mask):
            return
        norms = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float64)
        first = first_unmasked(mask)
        rest = mask & ~first
        self.first += float(norms[first].sum())
        self.rest += float(norms[rest].sum())
        self.firsts += int(first.sum())
        self.others += int(rest.sum())


@dataclass
class CoverageSums:
    """Norms behind the four coverage ratios of one (layer, scope)."""

    shift_mlp: Square = field(default_factory=Square)
    shift_block: Square = field(default_factory=Square)
    shift_skip: Square = field(default_factory=Square)
    mlp: Square = field(default_factory=Square)
    attn: Square = field(default_factory=Square)
    block: Square = field(default_factory=Square)

    def ratios(self, plain_add: bool) -> tuple[float | None, ...]:
        """The four ratios, in the order of `Coverage`'s fields.

        In a post-norm block the skip is not the block minus the MLP: no such share.
        """
        mlp, skip = self.shift_mlp.norm, self.shift_skip.norm
        share = ratio(mlp, mlp + skip) if plain_add else None
        return (
            ratio(mlp, self.shift_block.norm),
            share,
            ratio(self.mlp.norm, self.mlp.norm + self.attn.norm),
            ratio(self.mlp.norm, self.block.norm),
        )


@dataclass
class Table:
    """Everything measured at full size; fed trace by trace."""

    selection: Selection
    rows: dict[RowKey, FullSize] = field(default_factory=dict)
    coverage: dict[tuple[int, Scope], CoverageSums] = field(default_factory=dict)
    streams: dict[int, StreamSums] = field(default_factory=dict)
    flips: Flips = field(default_factory=Flips)

    def add(self, trace: Trace, mask: Tensor) -> None:
        """Add one batch of one stage."""
        self.flips.add(trace, mask)
        unflipped = self.flips.kept(trace, mask)
        for key, values, tangents in scopes(trace, self.selection):
            row = self.rows.setdefault(key, FullSize())
            kept = unflipped if key[2] is Scope.PROPAGATED else None
            _add_row(row, key[1], values, tangents, mask, kept)
            row.derivative = trace.derivative
        stage = trace.stage
        if stage.name != "block" or not self.selection.takes(stage):
            return
        stream = self.streams.setdefault(stage.layer, StreamSums())
        stream.add(trace.values[0.0][stage.output], mask)
        pairs = [(Scope.PROPAGATED, trace.values), (Scope.LOCAL, trace.local_values)]
        for scope, values in pairs:
            if values and {"attn_out", "mlp_out"} <= set(values[0.0]):
                sums = self.coverage.setdefault((stage.layer, scope), CoverageSums())
                _add_coverage(sums, values, mask)


def _add_row(
    row: FullSize,
    site: str,
    values: Mapping[float, Sites],
    tangents: Mapping[float, Sites],
    mask: Tensor,
    unflipped: Tensor | None,
) -> None:
    base = counted(values[0.0][site], mask)
    exact = counted(values[1.0][site], mask) - base
    zero = torch.zeros_like(exact)
    scales = [s for s in (0.0, 0.5) if s in tangents]
    slopes = tuple(counted(tangents[s][site], mask) for s in scales)
    slopes = slopes if tangents else (zero, zero)
    row.add(base, exact, slopes)
    if not math.isfinite(row.first.exact):
        raise UpdateError(
            f"With this update the activation at {site} is not finite: the tuned model "
            f"overflows {exact.dtype}. Use a smaller update (`update.scaled(t)`), or "
            "dtype=torch.float64."
        )
    if mask.ndim < 2 or not has_tokens(values[0.0][site], mask):
        return
    row.rest = row.rest or FullSize()
    _add_part(row.rest, ~first_unmasked(mask)[mask], base, exact, slopes)
    if unflipped is not None:
        row.unflipped = row.unflipped or FullSize()
        _add_part(row.unflipped, unflipped[mask], base, exact, slopes)


def _add_part(
    sums: FullSize,
    keep: Tensor,
    base: Tensor,
    exact: Tensor,
    slopes: tuple[Tensor, ...],
) -> None:
    sums.add(base[keep], exact[keep], tuple(slope[keep] for slope in slopes))


def _add_coverage(
    sums: CoverageSums, values: Mapping[float, Sites], mask: Tensor
) -> None:
    base, tuned = (
        {site: counted(values[s][site], mask) for site in values[s]} for s in (0.0, 1.0)
    )
    mlp = tuned["mlp_out"] - base["mlp_out"]
    block = tuned["block_out"] - base["block_out"]
    sums.shift_mlp.add(mlp)
    sums.shift_block.add(block)
    sums.shift_skip.add(block - mlp)
    sums.mlp.add(base["mlp_out"])
    sums.attn.add(base["attn_out"])
    if "cross_out" in base:
        sums.attn.add(base["cross_out"])
    sums.block.add(base["block_out"])
