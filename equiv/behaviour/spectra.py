"""What steering of every size leaves, per layer and site: of the shift, of the output.

Symbols
    y, x    the shift of a block's output by the update, and what a steer there reads
    ŷ       what the steer adds where it writes, as it is fitted when applied
    J       Jacobian of the output at the base: in the block's output for y, in the
            written site for ŷ
    R       root of the output's metric, see `shift/output_metric.py`

On held-out tokens a steer leaves Σ‖y − ŷ‖²/Σ‖y‖² of the shift, and of what the shift
does to the output ‖R(J y − J ŷ)‖²/‖R J y‖². The two differ: most of a shift may lie
where the output does not feel it, and a small map that serves that part can do harm to
the part that is felt.

The second is measured by the probes g of `shift/probes.py`: the mean of (Σ g · e)² is
‖R J e‖². They judge maps of all ranks together: with the directions v_j of
`steering/fits.py`, summed over tokens,

    Σ g · ŷ_r = Σ g · ȳ + Σ_{j≤r} Σ (g · v_j) (v_jᵀ Bᵀ (x − x̄))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.model.sites import Site, read_and_written
from equiv.model.stages import StagedModel
from equiv.shift.probes import Felt, Passed, Probing
from equiv.steering.fits.chain import aim
from equiv.steering.fits.moments import Regression
from equiv.steering.fits.spectrum import misfits
from equiv.steering.fits.table import MomentTable
from equiv.update.update import Update

# Largest rank that is judged: beyond, a steer is hardly smaller than the weights.
RANKS = 64
# Held-out tokens that are probed, and probes of each sequence. With n sequences and
# probes in all, each square is known to √(2/n); the share is known better, since both
# its squares come from the same probes.
TOKENS = 512
PROBES = 8


@dataclass(frozen=True)
class Spectrum:
    """Shares that steering of every size leaves on held-out sequences, to four digits.

    Attributes:
        layer: Index of the block.
        reads: The site that the steer reads.
        writes: The site that it is added to.
        target: Whose shift it aims at: "block" or "shift", the site's own.
        read_width: Width of what is read.
        written_width: Width of what is written.
        vector: Share of the squared shift that a vector leaves.
        affine: The same for affine maps of rank 1, 2, …
        output_vector: Share of the shift's effect on the output that a vector leaves.
        output_affine: The same for affine maps of rank 1, 2, …
    """

    layer: int
    reads: str
    writes: str
    target: str
    read_width: int
    written_width: int
    vector: float
    affine: tuple[float, ...]
    output_vector: float
    output_affine: tuple[float, ...]

    @property
    def site(self) -> str:
        """Where it reads and writes, as `Site.key`."""
        return Site(self.writes, read=self.reads).key

    def num_parameters(self, rank: int | None) -> int:
        """Numbers in an affine map of that rank; in a vector for `None`."""
        bias = self.written_width
        return bias + (rank or 0) * (self.read_width + self.written_width)


def spectra(
    cut: StagedModel,
    update: Update,
    table: MomentTable,
    *,
    ridge: float,
    ranks: int,
    low: Sequence[str],
    seed: int,
) -> tuple[Spectrum, ...]:
    """Judge every size of steering at every layer and site of a table.

    Args:
        cut: The model with few held-out sequences, the table's sites captured.
        update: The update.
        table: Moments of all sequences, fitting and held out.
        ridge: Of the fits.
        ranks: The largest rank to judge.
        low: Names whose low-rank factors are applied beside the weight.
        seed: Draws the probes.

    Returns:
        Layer by layer, from the first; none where nothing moves or is held out.
    """
    sites = frozenset(read_and_written(table.sites))
    probing = Probing(cut, update, sites, sites, low, PROBES)
    found: list[Spectrum] = []
    for layer, felt in probing.backwards(seed):
        moments = table.applied(layer)
        for site in (site for site in reversed(table.sites) if site in moments):
            regression = Regression(moments[site], ridge)
            key = (layer, site, aim(table.cut, site, table.target))
            shares = None
            if key in table.held_out:
                shares = misfits(regression, table.held_out[key], ranks)
            if shares is not None:
                left = _left(regression, probing.passed[layer], felt, site, ranks)
                found.append(_spectrum(table, key, regression, shares, left))
        if not moments:
            break
    return tuple(reversed(found))


def _spectrum(
    table: MomentTable,
    key: tuple[int, str, str],
    regression: Regression,
    shift: tuple[float, Sequence[float]],
    output: tuple[float, Sequence[float]],
) -> Spectrum:
    layer, site, aimed = key
    own = aimed == Site(site).write and not (
        aimed == "block_out" and table.target == "block"
    )
    return Spectrum(
        layer=layer,
        reads=Site(site).read,
        writes=Site(site).write,
        target="shift" if own else "block",
        read_width=len(regression.mean_x),
        written_width=len(regression.mean_y),
        vector=_rounded(shift[0]),
        affine=tuple(_rounded(share) for share in shift[1]),
        output_vector=_rounded(output[0]),
        output_affine=tuple(_rounded(share) for share in output[1]),
    )


def _rounded(share: float) -> float:
    return float(f"{share:.4g}")


def _left(
    regression: Regression,
    blocks: Mapping[int, Passed],
    felt: Felt,
    site: str,
    ranks: int,
) -> tuple[float, list[float]]:
    """Shares of the output's change that the vector and maps of rank 1 … leave."""
    pair = Site(site)
    kept = regression.directions[:, : min(ranks, *regression.full.shape)]
    mapped = regression.full @ kept  # [d, r]
    whole, left = 0.0, torch.zeros(1 + kept.shape[1], dtype=torch.float64)
    for batch, block in blocks.items():
        read = (block.sites[pair.read].double() - regression.mean_x) @ mapped
        for g in felt[batch]:
            moved = _summed(g["block_out"].double() * block.shift.double())
            own = g[pair.write].double()
            missed = moved - _summed(own * regression.mean_y)
            made = (read * (own @ kept)).flatten(1, -2).sum(1).cumsum(-1)
            each = torch.cat([missed[:, None], missed[:, None] - made], 1)
            left += each.square().sum(0)
            whole += float(moved.square().sum())
    shares = (left / whole).tolist() if whole else left.tolist()
    return shares[0], shares[1:]


def _summed(each: Tensor) -> Tensor:
    """Sums over everything but the batch, [batch]."""
    return each.flatten(1).sum(1)
