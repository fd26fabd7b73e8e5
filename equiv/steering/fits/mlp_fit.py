"""The low-rank MLP that best matches a shift: a descent that starts at the affine fit.

Symbols: z = down (x − x̄) [tokens, r], the hidden values of the affine fit of the same
rank, each of them scaled to unit variance; s a scale.

Started from φ(s z), with the best `up` and `bias` for it, for a few s, all parameters
are moved together to lower

    Σ ‖y − ŷ‖² / Σ ‖y‖²  +  ridge · (mean variance of x) · n ‖M‖² / Σ ‖y‖²

where M = up diag(mean φ′) down is the map's mean slope: the ridge of the affine fit.

The result is never worse than the affine fit on the tokens fitted. Every activation
holds any affine map: SiLU, GELU and ReLU are the identity far to the right (`bias`
takes the constant back), and tanh is at small arguments. Where the descent has gained
nothing that map is returned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.steering.fits.lbfgs import minimise
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.mlp import ACTIVATIONS, LowRankMLP

_SCALES = (0.5, 1.5)
# Where φ(shift + z) = shift + z to rounding in float64, for |z| ≤ 1; for tanh the scale
# at which tanh(z) = z up to z²/3, 10⁻¹⁰.
_IDENTITY_FROM = {"silu": 40.0, "gelu": 10.0, "relu": 2.0, "identity": 0.0}
_SMALL = 1e-5


@dataclass(frozen=True)
class MLPFit:
    """A fitted low-rank MLP, and how the fit went.

    Attributes:
        steering: The map, in float64.
        misfit: What it leaves of Σ‖y‖² on the tokens fitted.
        misfit_affine: What the affine fit of the same rank leaves there.
        converged: Whether the descent came to an end by itself.
        reason: Why not, or what it ended in.
    """

    steering: LowRankMLP
    misfit: float
    misfit_affine: float
    converged: bool
    reason: str


def fit_mlp(
    x: Tensor, y: Tensor, affine: Affine, activation: str, ridge: float
) -> MLPFit:
    """Fit a low-rank MLP.

    Args:
        x: What it reads, [tokens, d].
        y: The shift it should make, [tokens, e].
        affine: The affine fit to start from; its rank is the MLP's.
        activation: One of `ACTIVATIONS`.
        ridge: Relative ridge, as for the affine fit.

    Memory: a few copies of x and y, and [tokens, r].
    """
    x, y = x.double(), y.double()
    total = float(y.square().sum())
    exact = as_mlp(affine, x, activation)
    ground = _misfit(affine(x), y, total)
    best = MLPFit(exact, _misfit(exact(x), y, total), ground, True, "the affine map")
    if not total:
        return best
    failed = ""
    for scale in _SCALES:
        start = _start(x, y, affine, activation, scale)
        moved, converged, reason = _descend(x, y, start, ridge, total)
        failed = failed if converged else reason
        misfit = _misfit(moved(x), y, total)
        if misfit < best.misfit:
            best = MLPFit(moved, misfit, ground, converged, reason)
    if best.steering is exact and failed:
        return MLPFit(exact, best.misfit, ground, False, failed)
    return best


def as_mlp(affine: Affine, x: Tensor, activation: str) -> LowRankMLP:
    """An affine map as a low-rank MLP, the same on tokens x to rounding.

    Example:
        >>> x = torch.randn(9, 3, dtype=torch.float64)
        >>> affine = Affine(torch.ones(1, 3), torch.ones(3, 1), torch.ones(3))
        >>> same = [as_mlp(affine, x, name)(x) - affine(x) for name in ACTIVATIONS]
        >>> max(float(gap.abs().max()) for gap in same) < 1e-8
        True
    """
    down, up, bias = _parts(affine)
    middle = down @ x.double().mean(0)  # [r]
    reach = (x.double() @ down.T - middle).abs().amax(0).clamp_min(1e-300)
    offset = _IDENTITY_FROM.get(activation, 0.0)
    unit = 1 / reach if activation in _IDENTITY_FROM else _SMALL / reach
    down, up = down * unit[:, None], up / unit
    return LowRankMLP(
        down,
        up,
        offset - middle * unit,
        bias + up @ (middle * unit - offset),
        activation,
    )


def _parts(affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    up = affine.up.double()
    bias = up.new_zeros(len(up)) if affine.bias is None else affine.bias.double()
    return affine.down.double(), up, bias


def _start(
    x: Tensor, y: Tensor, affine: Affine, activation: str, scale: float
) -> LowRankMLP:
    """The hidden values of the affine fit at a scale, with the best way out of them."""
    z = x @ affine.down.double().T
    size = z.std(0, correction=0)
    unit = scale / size.where(size > 0, torch.ones_like(size))
    down = affine.down.double() * unit[:, None]
    inner = -(z.mean(0) * unit)
    hidden = ACTIVATIONS[activation](x @ down.T + inner)
    features = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
    # gelsd: hidden values may depend on each other (a ReLU that is never on).
    solved = torch.linalg.lstsq(features, y, driver="gelsd").solution
    return LowRankMLP(down, solved[:-1].T, inner, solved[-1], activation)


def _descend(
    x: Tensor, y: Tensor, start: LowRankMLP, ridge: float, total: float
) -> tuple[LowRankMLP, bool, str]:
    assert start.inner is not None and start.bias is not None
    parts = [
        part.clone().requires_grad_()
        for part in (start.down, start.up, start.inner, start.bias)
    ]
    down, up, inner, bias = parts
    phi, weight = ACTIVATIONS[start.activation], 0.0
    if ridge:
        weight = ridge * float(x.var(0, correction=0).mean()) * len(x) / total

    def loss() -> Tensor:
        before = x @ down.T + inner
        hidden = phi(before)
        left = (y - hidden @ up.T - bias).square().sum() / total
        if not weight:
            return left
        (slope,) = torch.autograd.grad(hidden.sum(), before, create_graph=True)
        mean = slope.mean(0)
        # ‖up diag(m) down‖² by the small Gram matrices.
        grams = (up.T @ up) * (down @ down.T)
        return left + weight * (mean @ grams @ mean)

    found = minimise(parts, loss)
    ended = [part.detach() for part in parts]
    made = LowRankMLP(ended[0], ended[1], ended[2], ended[3], start.activation)
    return made, found.converged, found.reason


def _misfit(fitted: Tensor, y: Tensor, total: float) -> float:
    return float((y - fitted).square().sum()) / total if total else 0.0
