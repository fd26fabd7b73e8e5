"""`equiv.fit`: the steering of a form that best matches a shift at one site."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiv.arguments import (
    as_choice,
    as_integer,
    as_rank,
    as_ridge,
    as_seed,
    as_tensor,
)
from equiv.errors import ArgumentError, NotConvergedWarning
from equiv.steering.fits.fitter import Asked, Fitter, as_form
from equiv.steering.fits.moments import RIDGE
from equiv.steering.fits.sinks import fitted_tokens
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.form import Steering
from equiv.steering.forms.mlp import ACTIVATIONS

# Of the sequences, or of the tokens where there are none, for choosing the ridge.
CHOOSING = 0.25


def fit(
    base: Tensor,
    exact: Tensor,
    *,
    form: str | nn.Module | Custom = "affine",
    rank: int | None = 8,
    mask: Tensor | Sequence[Any] | None = None,
    ridge: float | None = RIDGE,
    activation: str = "silu",
    num_heads: int | None = None,
    first_position: bool | None = None,
    seed: int = 0,
) -> Steering:
    """The steering of a form that best matches a shift.

    In closed form where there is one; a low-rank MLP and a module by a deterministic
    descent, the MLP from the affine fit of its rank, than which it is never worse on
    these tokens.

    Args:
        base: Activations that the steer reads, [batch, seq, d] or [tokens, d].
        exact: The shift to match at the same tokens, [batch, seq, e] or [tokens, e].
        form: "vector", "linear", "affine", "loreft", "mlp" or "heads"; or a module
            h → shift, of which a copy is fitted.
        rank: Rank of the map; `None` for full rank.
        mask: Tokens that count, [batch, seq] or [tokens]; 1 or true counts.
        ridge: Relative ridge λ added to the covariance, λ tr(C)/d; `None` to choose the
            one of `equiv.steering.fits.fitter.RIDGES` that leaves least on a quarter of
            the sequences, before all are fitted.
        activation: Of a low-rank MLP: "silu", "gelu", "relu", "tanh" or "identity".
        num_heads: Of heads.
        first_position: Whether the first token of each sequence is fitted; `None`:
            unless it is a sink (see `equiv.steering.fits.sinks`).
        seed: Draws the quarter that chooses the ridge.

    Returns:
        The fitted steering, in float64.

    Raises:
        ArgumentError: If the shapes do not fit, an argument is outside its set, or no
            token counts.

    Warns:
        NotConvergedWarning: If a descent did not come to an end; the result is then
            the best it has seen.

    Example:
        >>> h = torch.randn(50, 4, dtype=torch.float64,
        ...                 generator=torch.Generator().manual_seed(0))
        >>> shift = 2 * h + 1
        >>> steering = fit(h, shift, rank=4, ridge=0.0)
        >>> torch.allclose(steering(h), shift)
        True
    """
    asked = Asked(
        as_form(form),
        as_rank(rank),
        None if ridge is None else as_ridge(ridge),
        as_choice("activation", activation, tuple(ACTIVATIONS)),
        num_heads if form != "heads" else as_integer("num_heads", num_heads, 1),
    )
    _check_pair(base, exact)
    mask = _as_mask(mask, base)
    _check_finite(base, exact, mask)
    keep = fitted_tokens(mask, base, first_position=first_position)
    fitter = Fitter(asked)
    apart = _apart(keep, as_seed(seed)) if ridge is None else torch.zeros_like(keep)
    for choosing in (False, True):
        own = keep & (apart == choosing)
        if bool(own.any()):
            fitter.add(base[own].detach(), exact[own].detach(), choosing=choosing)
    found = fitter.fit()
    if not found.converged:
        warnings.warn(
            f"The fit did not converge: {found.reason}. It is the best that was seen.",
            NotConvergedWarning,
            stacklevel=2,
        )
    return found.steering


def _apart(keep: Tensor, seed: int) -> Tensor:
    """The tokens that choose the ridge: of whole sequences, where there are some."""
    rows = len(keep)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(rows, generator=generator)[: round(CHOOSING * rows)]
    apart = torch.zeros_like(keep)
    apart[drawn.to(keep.device)] = True
    return apart


def _check_pair(base: object, exact: object) -> None:
    for name, value in (("base", base), ("exact", exact)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise ArgumentError(
                f"Expected `{name}` to be a floating tensor, got {got}: convert it by "
                "`torch.as_tensor(..., dtype=torch.float64)`."
            )
    assert isinstance(base, Tensor) and isinstance(exact, Tensor)
    if base.shape[:-1] != exact.shape[:-1] or base.ndim < 2:
        raise ArgumentError(
            "Expected `base` and `exact` with the same leading axes, [batch, seq, d] "
            f"or [tokens, d], got {tuple(base.shape)} and {tuple(exact.shape)}."
        )


def _check_finite(base: Tensor, exact: Tensor, mask: Tensor) -> None:
    for name, value in (("base", base), ("exact", exact)):
        if wrong := int((~torch.isfinite(value[mask])).sum()):
            raise ArgumentError(
                f"Expected finite numbers in `{name}`, got {wrong} NaN or infinite "
                "entries. Leave such tokens out with `mask`."
            )


def _as_mask(mask: object, base: Tensor) -> Tensor:
    """The tokens that count, bool; every token for `None`."""
    lead = base.shape[:-1]
    if mask is None:
        made = torch.ones(lead, dtype=torch.bool, device=base.device)
    else:
        made = as_tensor("mask", mask).to(base.device, torch.bool)
    if made.shape != lead:
        raise ArgumentError(
            f"Expected a mask of shape {tuple(lead)}, got {tuple(made.shape)}."
        )
    if not bool(made.any()):
        raise ArgumentError("No token is left to fit: every token is masked.")
    return made
