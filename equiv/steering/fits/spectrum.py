"""What a vector, and affine maps of every rank, leave of a shift: all ranks at once.

Symbols as in `fits.py`; x̄, ȳ, B and the leading directions v_1, v_2, … come from the
tokens that were fitted on. The fit of rank r is

    ŷ_r = ȳ + Σ_{j≤r} v_j v_jᵀ Bᵀ (x − x̄)

On any tokens, with x′ = x − x̄, y′ = y − ȳ and sums over those tokens, the directions
being orthonormal,

    Σ‖y − ŷ_r‖² = Σ‖y′‖² − Σ_{j≤r} g_j,    g_j = v_jᵀ (2 Σ y′x′ᵀ B − Bᵀ Σ x′x′ᵀ B) v_j

so that every rank costs one sum more, and no map is ever formed.
"""

import torch

from equiv.steering.fits.moments import Moments, Regression


def misfits(
    regression: Regression, moments: Moments, ranks: int
) -> tuple[float, tuple[float, ...]] | None:
    """Shares of Σ‖y‖² that the vector leaves, and the maps of rank 1 … `ranks`.

    Args:
        regression: What was fitted.
        moments: Those of the tokens to judge it on.
        ranks: The largest rank; fewer where the widths are smaller.

    Returns:
        The two, or `None` where y is zero.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> moments = Moments()
        >>> moments.add(x, x + 1)  # Σ‖y‖² = 18, of which the vector takes 8
        >>> vector, affine = misfits(Regression(moments, 0.0), moments, 2)
        >>> round(18 * vector), [round(18 * share) for share in affine]
        (10, [2, 0])
    """
    if moments.x is None or not moments.yy:
        return None
    assert moments.y is not None and moments.xx is not None and moments.xy is not None
    n, mean_x, mean_y = moments.n, regression.mean_x, regression.mean_y
    left = moments.yy - 2 * float(mean_y @ moments.y) + n * float(mean_y @ mean_y)
    crossed = torch.outer(mean_x, moments.x)
    xx = moments.xx - crossed - crossed.T + n * torch.outer(mean_x, mean_x)
    xy = (
        moments.xy
        - torch.outer(mean_x, moments.y)
        - torch.outer(moments.x, mean_y)
        + n * torch.outer(mean_x, mean_y)
    )
    kept = regression.directions[:, : min(ranks, moments.width, len(mean_y))]
    mapped = regression.full @ kept  # B v_j, [d, r]
    gains = 2 * ((xy @ kept) * mapped).sum(0) - ((xx @ mapped) * mapped).sum(0)
    shares = ((left - gains.cumsum(0)) / moments.yy).clamp_min(0).tolist()
    return max(left, 0.0) / moments.yy, tuple(shares)
