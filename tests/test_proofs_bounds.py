"""Bounds and invariances of the theory that are tested here and not proved in Coq."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theorem_tensors import EXACT, cases, dims, draw, glu, seeds
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.func import jacfwd
from torch.nn.functional import silu
from torch.testing import assert_close

SLOPE = 1.09984  # sup |silu'|, which test_symbolic_activations.py finds


def spectral(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def normed(u: Tensor) -> Tensor:
    """As a norm without gain leaves it: of length sqrt(n)."""
    return u / u.pow(2).mean().sqrt()


@pytest.mark.claim("28, widths")
@cases
@given(seeds, dims, dims, dims, st.floats(1e-3, 10))
def test_glu_stretches_at_most(seed: int, d: int, f: int, o: int, size: float) -> None:
    Wg, Wu, Wd, u, v = draw(seed, "fd fd of d d", f=f, d=d, o=o)
    u, v = normed(u), normed(u + size * v)
    gap = (glu(silu, Wg, Wu, Wd, u) - glu(silu, Wg, Wu, Wd, v)).norm()
    weights = spectral(Wd) * spectral(Wg) * spectral(Wu)
    assert gap <= (1 + SLOPE) * d**0.5 * weights * (u - v).norm() + 1e-12


@pytest.mark.claim("28, widths")
@cases
@given(seeds, dims, dims, dims, st.floats(1e-3, 10))
def test_glu_update_moves_at_most(
    seed: int, d: int, f: int, o: int, size: float
) -> None:
    Wg, Wu, Wd, dWg, dWu, dWd, u = draw(seed, "fd fd of fd fd of d", f=f, d=d, o=o)
    dWg, dWu, dWd, u = size * dWg, size * dWu, size * dWd, normed(u)
    tuned = glu(silu, Wg + dWg, Wu + dWu, Wd + dWd, u)
    gap = (tuned - glu(silu, Wg, Wu, Wd, u)).norm()
    gate, up = spectral(Wg + dWg), spectral(Wu + dWu)
    from_gate = SLOPE * spectral(dWg) * up + spectral(Wg) * spectral(dWu)
    assert gap <= d * (spectral(dWd) * gate * up + spectral(Wd) * from_gate) + 1e-12


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.pow(2).mean() + eps).sqrt()


@pytest.mark.claim("28, widths")
@cases
@given(seeds, dims, st.floats(1e-2, 100), st.floats(0, 1))
def test_norm_gains_at_most(seed: int, d: int, size: float, eps: float) -> None:
    x, gain = draw(seed, "d d", d=d)
    x = size * x
    rho = (x.pow(2).mean() + eps).sqrt()
    jacobian = jacfwd(lambda x: rms_norm(x, gain, eps))(x)
    assert spectral(jacobian) <= gain.abs().max() / rho * (1 + 1e-9)


@pytest.mark.claim("20, norms")
@cases
@given(seeds, dims, dims, st.floats(1e-3, 1e3))
def test_norm_hides_the_scale(seed: int, d: int, f: int, scale: float) -> None:
    Wg, Wu, Wd, x, gain = draw(seed, "fd fd df d d", f=f, d=d)
    y, y_scaled = (
        glu(silu, Wg, Wu, Wd, rms_norm(c * x, gain, 0.0)) for c in (1.0, scale)
    )
    assert_close(y_scaled, y, **EXACT)
    assert not torch.allclose(scale * x + y_scaled, x + y) or abs(scale - 1) < 1e-3
