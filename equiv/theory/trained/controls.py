"""Random updates to hold a trained one against: of its norms, of its singular values.

What fine-tuning does is told from what any update of that size does by drawing one.
Both controls touch what the update touches, each parameter by as much in norm.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from equiv.update.low_rank import LowRank
from equiv.update.update import Update

Drawn = Callable[[Tensor, torch.Generator], Tensor]


def equal_norm(update: Update, seed: int) -> Update:
    """Normal entries, of the norm of each of the update's entries.

    Example:
        >>> update = Update.from_dict({"weight": torch.tensor([[3.0, 4.0]])})
        >>> round(equal_norm(update, 0).norm(), 6)
        5.0
    """
    return _drawn(update, seed, _of_norm)


def same_spectrum(update: Update, seed: int) -> Update:
    """The singular values of each matrix, between random directions.

    Entries that are no matrices get normal entries of their norm.
    """
    return _drawn(update, seed, _of_spectrum)


NORM = "equal norm"
CONTROLS: dict[str, Callable[[Update, int], Update]] = {
    NORM: equal_norm,
    "same spectrum": same_spectrum,
}


def _drawn(update: Update, seed: int, draw: Drawn) -> Update:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, delta in update.deltas.items():
        dense = delta.dense() if isinstance(delta, LowRank) else delta.double()
        deltas[name] = draw(dense, generator)
    return Update.from_dict(deltas, source=f"control of {update.source}, seed {seed}")


def _of_norm(delta: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
    return drawn * (delta.norm() / drawn.norm())


def _of_spectrum(delta: Tensor, generator: torch.Generator) -> Tensor:
    if delta.ndim != 2:
        return _of_norm(delta, generator)
    size = min(delta.shape)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(draw(delta.shape[0], size)).Q
    right = torch.linalg.qr(draw(delta.shape[1], size)).Q
    return left @ torch.diag(torch.linalg.svdvals(delta)) @ right.T
