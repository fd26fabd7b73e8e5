"""Deterministic minimisation over tensors: SciPy's L-BFGS, gradients by autograd."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 500
# Stop when an iteration lowers the loss, which is a share of 1, by less than this.
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Outcome:
    """How a minimisation ended.

    Attributes:
        loss: What it ended at; the tensors are left there.
        converged: Whether no step was worth while any more.
        reason: Why it stopped, in SciPy's words.
    """

    loss: float
    converged: bool
    reason: str


def minimise(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    iterations: int = ITERATIONS,
) -> Outcome:
    """Lower a loss over tensors, in place.

    Args:
        parameters: Float tensors that require gradients.
        loss: A scalar of them.
        iterations: At most so many.

    Example:
        >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> minimise([x], lambda: (x - 3).square().sum()).converged
        True
        >>> x.round(decimals=4).tolist()
        [3.0, 3.0]
    """
    from scipy.optimize import minimize

    def set_to(values: np.ndarray) -> None:
        flat = torch.from_numpy(values.copy())
        with torch.no_grad():
            for part, own in zip(parameters, flat.split(sizes), strict=True):
                part.copy_(own.reshape(part.shape))

    def value(values: np.ndarray) -> tuple[float, np.ndarray]:
        set_to(values)
        with torch.enable_grad():
            found = loss()
            grads = torch.autograd.grad(found, list(parameters), allow_unused=True)
        flat = [
            (torch.zeros_like(p) if g is None else g).detach().double().flatten()
            for p, g in zip(parameters, grads, strict=True)
        ]
        return float(found.detach()), torch.cat(flat).cpu().numpy()

    sizes = [part.numel() for part in parameters]
    start = torch.cat([part.detach().double().flatten() for part in parameters])
    result = minimize(
        value,
        start.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "ftol": TOLERANCE, "maxfun": 2 * iterations},
    )
    set_to(result.x)
    return Outcome(float(result.fun), bool(result.success), str(result.message))
