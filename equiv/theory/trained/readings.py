"""What steers that read one site leave of the block's shift, on held-out sequences.

Every steer here is added at block_out, where what `mlp_out` adds arrives unchanged too;
only what it reads differs. Fits are in closed form on the first sequences, a low-rank
MLP by a descent from the affine fit; what is left, Σ‖δ − δ̂‖²/Σ‖δ‖², is counted on the
others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from equiv.shift.activations import Shift
from equiv.steering.fits.fitting import fit

READS = ("attn_out", "mlp_in", "mlp_out", "resid_mid", "block_out")
# Of the sequences, for fitting.
FITTED = 0.75

Shifts = Mapping[tuple[int, str], Shift]


def misfit(
    shifts: Shifts, layer: int, site: str, rank: int | None, form: str = "affine"
) -> float:
    """What the best steer of a form and rank leaves.

    Args:
        shifts: Of one update; the block's own shift is the target.
        layer: Index of the block.
        site: What the steer reads.
        rank: Of the steer; `None` for full rank.
        form: As for `equiv.fit`.
    """
    (x, delta), (x_held, delta_held) = _parts(shifts, layer, site)
    steering = fit(x, delta, form=form, rank=rank)
    return _left(delta_held - steering(x_held), delta_held)


def truncated(shifts: Shifts, layer: int, rank: int) -> float:
    """What the oracle leaves when it may write in r directions and a fixed vector.

    The directions are the leading ones of the shift's covariance on the sequences that
    fits see; along them it knows each held-out token's shift, which no steer does.
    """
    (_, delta), (_, held) = _parts(shifts, layer, "block_out")
    centre = delta.mean(0)
    kept = torch.linalg.svd(delta - centre, full_matrices=False).Vh[:rank]
    rest = held - centre
    return _left(rest - rest @ kept.T @ kept, held)


def _left(rest: Tensor, delta: Tensor) -> float:
    return float(rest.square().sum() / delta.square().sum())


def _parts(
    shifts: Shifts, layer: int, site: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(read, block's shift) at the tokens of sequences fitted, and of the others."""
    read, target = shifts[layer, site], shifts[layer, "block_out"]
    first = round(FITTED * len(read.mask))
    fitted, held = read.mask.clone(), read.mask.clone()
    fitted[first:], held[:first] = False, False
    return (
        (read.base[fitted], target.exact[fitted]),
        (read.base[held], target.exact[held]),
    )
