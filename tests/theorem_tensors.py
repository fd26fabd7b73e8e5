"""What the tests of the theorems share: float64 tensors and the formulas on them.

Vectors are columns of matrices (d, tokens), as in `proofs/theories`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import gelu, silu
from witness import SWEEP

Function = Callable[[Tensor], Tensor]
Activation = tuple[Function, Function, float]

TWO_PI = 2 * torch.pi

seeds = st.integers(0, 2**31 - 1)
dims = st.integers(1, 6)
scales = st.floats(-1, 1)
cases = settings(max_examples=40 * SWEEP)

# Entries are standard normal and at most a few of them are multiplied, so values stay
# below 1e4; 1e-9 leaves a factor of 1e3 over float64 rounding.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# For identities that go through a pseudo-inverse, SVD or QR of a random matrix.
SOLVED: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """New tensors are float64 in the module that imports this, and only there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(seed: int, axes: str, **size: int) -> list[Tensor]:
    """Standard normal tensors; "nd d" asks for one of shape (n, d) and one (d,)."""
    generator = torch.Generator().manual_seed(seed)
    size["1"] = 1
    shapes = [[size[axis] for axis in word] for word in axes.split()]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


KINDS = ("random", "rank one", "ill-conditioned", "zero")
kinds = st.sampled_from(KINDS)


def spoilt(kind: str, weights: Tensor) -> Tensor:
    """The weights with other singular values: some that a trained model may come to."""
    U, s, Vh = torch.linalg.svd(weights, full_matrices=False)
    values = {
        "random": s,
        "rank one": s * (torch.arange(len(s)) == 0),
        "ill-conditioned": s[0] * torch.logspace(0, -6, len(s)),
        "zero": torch.zeros(len(s)),
    }
    return (U * values[kind]) @ Vh


def silu1(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def gelu1(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / 2**0.5)) / 2 + x * torch.exp(-(x**2) / 2) / TWO_PI**0.5


def tanh1(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x) ** 2


# phi, phi', K with |phi(a + e) - phi(a) - phi'(a) e| <= K e^2: K = sup|phi''| / 2.
ACTIVATIONS: list[Activation] = [
    (silu, silu1, 1 / 4),
    (gelu, gelu1, 1 / TWO_PI**0.5),
    (torch.tanh, tanh1, 2 / 27**0.5),
]
activations = st.sampled_from(ACTIVATIONS)


def derivative(f: Callable[..., Any], at: tuple, along: tuple) -> Any:
    """The derivative of f at `at` in the direction `along`, by forward mode."""
    return jvp(f, at, along)[1]


def norm2(x: Tensor) -> Tensor:
    return (x * x).sum()


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, tol=1e-8))


def orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def off_span(v: Tensor, A: Tensor) -> Tensor:
    """The part of v outside col(A)."""
    U, s, _ = torch.linalg.svd(A, full_matrices=False)
    U = U[:, s > 1e-12 * s.max()] if s.numel() else U
    return v - U @ (U.T @ v)


def gate(phi: Function, ag: Tensor, au: Tensor) -> Tensor:
    return phi(ag) * au


def glu(phi: Function, Wg: Tensor, Wu: Tensor, Wd: Tensor, u: Tensor) -> Tensor:
    return Wd @ gate(phi, Wg @ u, Wu @ u)


def head(Wo: Tensor, Wv: Tensor, X: Tensor, a: Tensor) -> Tensor:
    return Wo @ (Wv @ X @ a)
