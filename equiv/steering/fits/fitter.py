"""Tokens of one site in, one fitted steer out: whatever the form.

Forms that are affine in what they read are fitted from moments, so their memory does
not grow with the tokens; a low-rank MLP and a user's own form keep the tokens of the
one layer that is fitted.

The ridge, where it is not given, is the one of `RIDGES` that leaves least on tokens set
apart for choosing (sequences of their own, never the caller's held-out ones); then all
tokens are fitted with it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from equiv.arguments import as_choice
from equiv.errors import ArgumentError
from equiv.steering.fits.gradient_fit import fit_module
from equiv.steering.fits.mlp_fit import fit_mlp
from equiv.steering.fits.moments import RIDGE, Moments, Regression
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.form import Steering

# By name; besides, any module is a form.
FITTED = ("vector", "linear", "affine", "loreft", "mlp", "heads")
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

Form = str | nn.Module | Custom


@dataclass(frozen=True)
class Asked:
    """The form of a steer, and what its fit is told.

    Attributes:
        form: One of `FITTED`, or a module.
        rank: Rank of the map; `None` for full rank, or where the form has none.
        ridge: Relative ridge; `None` to choose it.
        activation: Of a low-rank MLP.
        num_heads: Of heads.
    """

    form: Form
    rank: int | None = None
    ridge: float | None = RIDGE
    activation: str = "silu"
    num_heads: int | None = None

    @property
    def keeps_tokens(self) -> bool:
        """Whether moments do not suffice."""
        return not isinstance(self.form, str) or self.form == "mlp"


@dataclass(frozen=True)
class Fitted:
    """A fitted steer, and how the fit went.

    Attributes:
        steering: The steer, in float64.
        ridge: The relative ridge used; `None` where the form has none.
        converged: Whether an iterative fit came to an end; true for closed forms.
        reason: Why it did not.
    """

    steering: Steering
    ridge: float | None
    converged: bool = True
    reason: str = ""


def as_form(value: object) -> Form:
    """A form by name, or a module.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(value, (nn.Module, Custom)):
        return value
    if callable(value):
        raise ArgumentError(
            f"Expected a form with parameters to fit, a name or a module, got "
            f"{type(value).__name__}: a function as it is can be steered with, not "
            "fitted."
        )
    return as_choice("form", value, FITTED)


@dataclass
class Fitter:
    """Collects tokens and fits."""

    asked: Asked
    fitting: Moments = field(default_factory=Moments)
    choosing: Moments = field(default_factory=Moments)
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, *, choosing: bool = False) -> None:
        """Add tokens: x [tokens, d] and y [tokens, e]; `choosing`: for the ridge."""
        (self.choosing if choosing else self.fitting).add(x, y)
        if self.asked.keeps_tokens:
            self.tokens.append((x.detach(), y.detach()))

    def fit(self) -> Fitted:
        """The steer, fitted on everything added."""
        asked = self.asked
        if not isinstance(asked.form, str):
            found = fit_module(*self._rows(), asked.form)
            return Fitted(found.steering, None, found.converged, found.reason)
        ridge = self.ridge()
        regression = Regression(self.fitting.plus(self.choosing), ridge)
        if asked.form != "mlp":
            made = regression.form(asked.form, asked.rank, asked.num_heads)
            return Fitted(made, None if asked.form == "vector" else ridge)
        start = regression.affine(asked.rank)
        found = fit_mlp(*self._rows(), start, asked.activation, ridge)
        reason = "" if found.converged else found.reason
        return Fitted(found.steering, ridge, found.converged, reason)

    def ridge(self) -> float:
        """The ridge that was given, or the one that leaves least on other tokens."""
        asked = self.asked
        if asked.ridge is not None:
            return asked.ridge
        if not self.choosing.n or not self.fitting.n or asked.form == "vector":
            return RIDGE
        form = "affine" if asked.form == "mlp" else str(asked.form)

        def left(ridge: float) -> float:
            regression = Regression(self.fitting, ridge)
            made = regression.form(form, asked.rank, asked.num_heads)
            misfit = self.choosing.misfit(made)
            return 0.0 if misfit is None else misfit

        return min(RIDGES, key=left)

    def _rows(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*self.tokens, strict=True))
        return x, y
