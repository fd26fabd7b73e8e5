"""How a shift is spread: over directions, over the skip and the MLP.

Symbols: δ the shift at a site, one row per token; λ_1 ≥ λ_2 ≥ … the eigenvalues of its
covariance.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from equiv.shift.activations import Shift

# Share of the variance that `directions` counts up to.
MOST = 0.9


def participation(delta: Tensor) -> float:
    """(Σ λ)² / Σ λ²: how many directions the shift varies in, as a number from 1 to d.

    Args:
        delta: [tokens, d].

    Example:
        >>> round(participation(torch.eye(3)), 6)  # about their mean: two, alike
        2.0
    """
    values = variances(delta)
    return float(values.sum() ** 2 / values.square().sum())


def directions(delta: Tensor, share: float = MOST) -> int:
    """The fewest directions that hold this share of the variance.

    Example:
        >>> directions(torch.eye(3)), directions(torch.diag(torch.tensor([9.0, 1, 0])))
        (2, 1)
    """
    held = variances(delta).cumsum(0)
    return int((held < share * held[-1]).sum()) + 1


def variances(delta: Tensor) -> Tensor:
    """The eigenvalues of the covariance, from the largest down, [d]."""
    centred = delta.double() - delta.double().mean(0)
    return torch.linalg.svdvals(centred).square() / len(delta)


def coverage(
    shifts: Mapping[tuple[int, str], Shift], layer: int, *, local: bool
) -> dict[str, float]:
    """The four ratios that texts call coverage, of norms over all tokens.

    Args:
        shifts: Of one update, with sites attn_out, resid_mid, mlp_out and block_out.
        layer: Index of the block.
        local: Whether the block's input is held at the base.
    """

    def shift(site: str) -> float:
        found = shifts[layer, site]
        moved = found.local_exact if local else found.exact
        return float(moved[found.mask].norm())

    def activation(site: str) -> float:
        found = shifts[layer, site]
        return float(found.base[found.mask].norm())

    mlp, skip = shift("mlp_out"), shift("resid_mid")
    written = activation("mlp_out")
    return {
        "δMLP over δblock": mlp / shift("block_out"),
        "δskip share": skip / (mlp + skip),
        "MLP share": written / (written + activation("attn_out")),
        "MLP over block": written / activation("block_out"),
    }
