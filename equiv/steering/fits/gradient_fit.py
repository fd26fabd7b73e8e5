"""A user's own form, fitted by gradient: what has no closed-form fit."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.steering.fits.lbfgs import minimise
from equiv.steering.forms.custom import Custom


@dataclass(frozen=True)
class GradientFit:
    """A fitted module, and how the fit went.

    Attributes:
        steering: A fitted copy of the module, in float64.
        misfit: What it leaves of Σ‖y‖² on the tokens fitted.
        converged: Whether the descent came to an end by itself.
        reason: Why it stopped.
    """

    steering: Custom
    misfit: float
    converged: bool
    reason: str


def fit_module(x: Tensor, y: Tensor, form: object) -> GradientFit:
    """Fit a module's parameters to a shift, from where they are; it is left alone.

    Args:
        x: What it reads, [tokens, d].
        y: The shift it should make, [tokens, e].
        form: A module, or a `Custom` of one.

    Raises:
        ArgumentError: If it has no parameters, or makes shifts of another shape.
    """
    module = form.function if isinstance(form, Custom) else form
    if not isinstance(module, nn.Module) or not list(module.parameters()):
        raise ArgumentError(
            "Expected a form with parameters to fit (a `torch.nn.Module`), got "
            f"{type(module).__name__}: a function as it is can be steered with, not "
            "fitted."
        )
    x, y = x.double(), y.double()
    own = copy.deepcopy(module).to(x.device, x.dtype).eval()
    total = float(y.square().sum()) or 1.0
    parameters = [part for part in own.parameters() if part.requires_grad]
    if (made := own(x)).shape != y.shape:
        raise ArgumentError(
            f"Expected {type(module).__name__} to return a shift of shape "
            f"{tuple(y.shape)}, got {tuple(made.shape)}."
        )
    found = minimise(parameters, lambda: (y - own(x)).square().sum() / total)
    for part in own.parameters():
        part.requires_grad_(False)
    return GradientFit(Custom(own), found.loss, found.converged, found.reason)
