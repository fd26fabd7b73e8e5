"""The theorems about KL and about remainders with constants, on tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theorem_tensors import EXACT, cases, dims, draw, norm2, seeds
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.testing import assert_close


class SineNetwork:
    """Blocks f_l(w + t dw, h) = A_l sin(h + t b_l), with every constant explicit.

    Norms are maximum norms.  The remainder of sin is at most half the square, so
    C_l = |A_l| max(1, |b_l|^2).
    """

    def __init__(self, seed: int, d: int, L: int) -> None:
        self.A, self.b, self.h0, self.e0 = draw(seed, "Ldd Ld d d", L=L, d=d)
        self.A = 0.5 * self.A
        self.states = [self.h0]
        for A in self.A:
            self.states.append(A @ torch.sin(self.states[-1]))
        self.J = [
            A @ torch.diag(torch.cos(h))
            for A, h in zip(self.A, self.states, strict=False)
        ]
        self.local = [J @ b for J, b in zip(self.J, self.b, strict=True)]

    def tuned(self, t: float) -> Tensor:
        h = self.h0 + t * self.e0
        for A, b in zip(self.A, self.b, strict=True):
            h = A @ torch.sin(h + t * b)
        return h

    def steered(self, t: float) -> Tensor:
        h = self.h0 + t * self.e0
        for A, e in zip(self.A, self.local, strict=True):
            h = A @ torch.sin(h) + t * e
        return h

    def first_order(self, t: float) -> Tensor:
        delta = self.e0
        for J, e in zip(self.J, self.local, strict=True):
            delta = J @ delta + e
        return self.states[-1] + t * delta

    def rem_size(self, of_tuned: bool) -> float:
        """A_L, from A_(n+1) = L_n A_n + C_n (1 + (S_n + A_n)^2)."""
        S, A = self.e0.abs().max(), torch.zeros(())
        for matrix, J, e, b in zip(self.A, self.J, self.local, self.b, strict=True):
            size = matrix.abs().sum(1).max()
            C = size * max(1, b.abs().max() ** 2) if of_tuned else size / 2
            gain = J.abs().sum(1).max()
            S, A = gain * S + e.abs().max(), gain * A + C * (1 + (S + A) ** 2)
        return float(A)


@pytest.mark.theorem(
    "equivalence.remainder", "equivalence.gap", "equivalence.steered-is-quadratic"
)
@cases
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.floats(-1, 1))
def test_network_remainder(seed: int, d: int, L: int, t: float) -> None:
    net = SineNetwork(seed, d, L)
    A_tuned, A_steered = net.rem_size(True), net.rem_size(False)
    assert (net.tuned(t) - net.first_order(t)).abs().max() <= A_tuned * t**2 + 1e-10
    assert (net.steered(t) - net.first_order(t)).abs().max() <= A_steered * t**2 + 1e-10
    assert (net.tuned(t) - net.steered(t)).abs().max() <= (
        A_tuned + A_steered
    ) * t**2 + 1e-10


def kl(z: Tensor, y: Tensor) -> Tensor:
    p, q = torch.softmax(z, 0), torch.softmax(y, 0)
    return (p * (p / q).log()).sum()


@pytest.mark.theorem("kl.identity", "kl.nonnegative", "kl.range", "kl.max", "kl.norm")
@cases
@given(seeds, dims, st.floats(0.01, 5))
def test_kl_bounds(seed: int, n: int, size: float) -> None:
    z, delta = draw(seed, "n n", n=n)
    delta = size * delta
    p = torch.softmax(z, 0)
    divergence = kl(z, z + delta)
    assert_close(divergence, (p * delta.exp()).sum().log() - (p * delta).sum(), **EXACT)
    assert divergence >= -1e-12
    assert divergence <= (delta.max() - delta.min()) ** 2 / 8 + 1e-12
    assert divergence <= delta.abs().max() ** 2 / 2 + 1e-12
    assert divergence <= norm2(delta) / 4 + 1e-12


@pytest.mark.theorem("kl.range")
def test_kl_bound_is_nearly_attained() -> None:
    # at p = (1/2, 1/2) the constant 1/8 is reached as the change goes to 0
    delta = torch.tensor([1e-3, -1e-3])
    assert_close(
        kl(torch.zeros(2), delta), torch.tensor((2e-3) ** 2 / 8), rtol=1e-5, atol=0
    )


@pytest.mark.theorem("kl.second-order", "kl.fisher", "kl.scaled")
@cases
@given(seeds, dims, st.floats(0.001, 1), st.floats(0, 1))
def test_kl_is_half_a_variance(seed: int, n: int, c: float, s: float) -> None:
    z, delta = draw(seed, "n n", n=n)
    p = torch.softmax(z, 0)
    delta = delta - (p * delta).sum()
    delta = c * delta / delta.abs().max().clamp(min=1e-9)  # now |delta_i - mean| <= c
    V = delta @ (torch.diag(p) - torch.outer(p, p)) @ delta
    assert_close(V, (p * (delta - (p * delta).sum()) ** 2).sum(), **EXACT)
    divergence = kl(z, z + delta + 3.0)  # a constant changes nothing
    assert (1 - c) * V / 2 - 1e-12 <= divergence <= (1 + c) * V / 2 + 1e-12
    scaled = kl(z, z + s * delta)
    assert (1 - s * c) * s**2 * V / 2 - 1e-12 <= scaled
    assert scaled <= (1 + s * c) * s**2 * V / 2 + 1e-12


class Waves:
    """Logits z_i(t) = a_i sin(f_i t + c_i).

    So |z_i'| <= |a_i f_i| and |z_i''| <= |a_i| f_i^2.
    """

    def __init__(self, seed: int, n: int) -> None:
        self.a, self.f, self.c = draw(seed, "n n n", n=n)

    def __call__(self, t: float) -> Tensor:
        return self.a * torch.sin(self.f * t + self.c)

    def tangent(self, t: float) -> Tensor:
        """The first-order logits z(0) + t z'(0); their second derivative is 0."""
        return self(0) + t * self.a * self.f * torch.cos(self.c)


@pytest.mark.theorem("kl.gap", "kl.order-two", "kl.order-four")
@cases
@given(seeds, dims, st.floats(0, 1))
def test_kl_order(seed: int, n: int, t: float) -> None:
    z = Waves(seed, n)
    tuned, steered = z(t), z.tangent(t)
    assert kl(tuned, steered) <= (tuned - steered).abs().max() ** 2 / 2 + 1e-12
    M1, M2 = (z.a * z.f).abs().max(), (z.a * z.f**2).abs().max()
    assert kl(tuned, z(0)) <= (M1 * t) ** 2 / 2 + 1e-12
    assert kl(tuned, steered) <= ((M2 + 0) / 2 * t**2) ** 2 / 2 + 1e-12


@pytest.mark.theorem("kl.order-two", "kl.order-four")
def test_kl_orders_are_attained() -> None:
    # halving t divides KL by 4, respectively by 16
    z = Waves(0, 5)
    t = 2.0**-6
    assert 3.8 <= kl(z(t), z(0)) / kl(z(t / 2), z(0)) <= 4.2
    assert 15 <= kl(z(t), z.tangent(t)) / kl(z(t / 2), z.tangent(t / 2)) <= 17


@pytest.mark.theorem("kl.equivalence")
@cases
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.floats(-1, 1))
def test_kl_first_order_equivalence(seed: int, d: int, L: int, t: float) -> None:
    net = SineNetwork(seed, d, L)
    (readout,) = draw(seed + 1, "vd", v=5, d=d)
    K = readout.abs().sum(1).max()
    gap = (net.rem_size(True) + net.rem_size(False)) * t**2
    assert (
        kl(readout @ net.tuned(t), readout @ net.steered(t))
        <= (K * gap) ** 2 / 2 + 1e-12
    )
