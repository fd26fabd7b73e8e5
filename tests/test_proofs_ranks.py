"""The theorems about ranks and least squares, evaluated on tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theorem_tensors import (
    EXACT,
    SOLVED,
    cases,
    derivative,
    dims,
    draw,
    glu,
    norm2,
    rank,
    seeds,
)
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close


@pytest.mark.theorem("lora.output-rank", "lora.value-rank")
@cases
@given(
    seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 4)
)
def test_lora_shift_rank(seed: int, r: int, heads: int, k: int, n: int) -> None:
    d, T = 12, 15
    B, A, M = draw(seed, "dr rn nT", d=d, r=r, n=n, T=T)
    assert rank(B @ A @ M) <= r
    Wo, Bh, A, X, scores = draw(seed, "hdk hkr rd dT hTT", h=heads, d=d, k=k, r=r, T=T)
    pattern = torch.softmax(scores, 1)
    shift = torch.stack(
        [Wo[h] @ (Bh[h] @ A) @ X @ pattern[h] for h in range(heads)]
    ).sum(0)
    assert rank(shift) <= min(d, heads * min(r, k))
    assert rank(shift) == heads * min(
        r, k
    )  # attained by random matrices when d is large enough


@pytest.mark.theorem("lora.collinear")
@cases
@given(seeds, dims, dims, dims)
def test_value_shift_collinear(seed: int, d: int, k: int, T: int) -> None:
    Wo, B, A, X, scores = draw(seed, "dk k1 1d dT TT", d=d, k=k, T=T)
    pattern = torch.softmax(scores, 0)
    shift = Wo @ (B @ A) @ X @ pattern
    assert_close(shift, (Wo @ B) * (A @ X @ pattern), **EXACT)


@pytest.mark.claim("25, W_g")
@cases
@given(seeds, st.integers(2, 6), st.integers(2, 6))
def test_rank_one_on_the_gate_is_not_bounded(seed: int, d: int, T: int) -> None:
    # the same rank-1 update of W_g moves the tokens in as many directions as there are
    Wg, Wu, Wd, B, A, X = draw(seed, "nd nd dn n1 1d dT", n=8, d=d, T=T)

    def outputs(Wg: Tensor) -> Tensor:
        return glu(silu, Wg, Wu, Wd, X)

    assert rank(derivative(outputs, (Wg,), (B @ A,))) == min(d, T)


@pytest.mark.theorem(
    "least-squares.exists", "least-squares.split", "least-squares.unique"
)
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 12))
def test_least_squares(seed: int, d: int, o: int, T: int) -> None:
    X, Y, S, noise = draw(seed, "dT oT od od", d=d, T=T, o=o)
    X[-1] = X[0]  # singular on purpose
    S0 = Y @ torch.linalg.pinv(X)
    assert_close((Y - S0 @ X) @ X.T, torch.zeros(o, d), **SOLVED)
    assert_close(norm2(Y - S @ X), norm2(Y - S0 @ X) + norm2(S0 @ X - S @ X), **SOLVED)
    S1 = S0 + noise @ (torch.eye(d) - X @ torch.linalg.pinv(X))  # another solution
    assert_close((Y - S1 @ X) @ X.T, torch.zeros(o, d), **SOLVED)
    assert_close(S0 @ X, S1 @ X, **SOLVED)


@pytest.mark.theorem("eckart-young.lower", "eckart-young.attained")
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(0, 5))
def test_eckart_young(seed: int, m: int, n: int, r: int) -> None:
    X, B1, B2 = draw(seed, "mn mr rn", m=m, n=n, r=r)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    tail = norm2(s[r:])
    truncated = (U[:, :r] * s[:r]) @ Vh[:r]
    assert_close(norm2(X - truncated), tail, **SOLVED)
    for B in (B1 @ B2, U[:, :r] @ U[:, :r].T @ X @ (torch.eye(n) + 0.01)):
        assert rank(B) <= r
        assert norm2(X - B) >= tail - 1e-9


@pytest.mark.theorem("best-steer.low-rank")
@cases
@given(
    seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.integers(0, 5)
)
def test_best_low_rank_steer(seed: int, d: int, o: int, T: int, r: int) -> None:
    X, Y, P1, P2, P3 = draw(seed, "dT oT or rd dd", d=d, T=T, o=o, r=r)
    S0 = Y @ torch.linalg.pinv(X)
    U, s, _ = torch.linalg.svd(S0 @ X, full_matrices=False)
    best = U[:, :r] @ U[:, :r].T @ S0

    def misfit(S: Tensor) -> Tensor:
        return norm2(Y - S @ X)

    assert rank(best) <= r
    assert_close(misfit(best), misfit(S0) + norm2(s[r:]), **SOLVED)
    for S in (P1 @ P2, best + 0.1 * best @ P3):
        assert misfit(best) <= misfit(S) + 1e-8


@pytest.mark.theorem("replication.residual", "replication.best")
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_residual_covariance(seed: int, d: int, T: int, affine: bool) -> None:
    X, Y, A, S = draw(seed, "dT dT dd de", d=d, T=T, e=d + 1)
    H = torch.cat([X + Y, torch.ones(1, T)]) if affine else X + Y
    S = S[:, : H.shape[0]]
    B, C = Y @ torch.linalg.pinv(H), X @ torch.linalg.pinv(H)
    cov_y, cov_x = (Y - B @ H) @ (Y - B @ H).T, (X - C @ H) @ (X - C @ H).T
    assert_close(cov_x, cov_y, **SOLVED)
    best = norm2(A @ Y - A @ B @ H)
    assert_close(best, torch.trace(A @ cov_y @ A.T), **SOLVED)
    for other in (S, A @ B + 0.01 * S):
        assert best <= norm2(A @ Y - other @ H) + 1e-8
    assert rank(A @ B) <= rank(A)


@pytest.mark.theorem("least-squares.scale")
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 12), st.floats(1e-3, 10))
def test_misfit_scales(seed: int, d: int, T: int, t: float) -> None:
    X, Y = draw(seed, "dT dT", d=d, T=T)
    misfit = norm2(Y - Y @ torch.linalg.pinv(X) @ X)
    of_scaled = norm2(t * Y - (t * Y) @ torch.linalg.pinv(X) @ X)
    assert_close(of_scaled, t**2 * misfit, **SOLVED)


@pytest.mark.theorem("least-squares.interpolates")
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 8))
def test_independent_tokens_fit(seed: int, d: int, o: int, T: int) -> None:
    # d random tokens are independent; one more is fitted only with a bias, which is a
    # row of ones; beyond d + 1 the misfit of a random target is not 0
    X, Y = draw(seed, "dT oT", d=d, T=T, o=o)
    for read in (X, torch.cat([X, torch.ones(1, T)])):
        misfit = norm2(Y - Y @ torch.linalg.pinv(read) @ read)
        assert (misfit < 1e-12) == (len(read) >= T)


@pytest.mark.theorem("least-squares.shares")
@cases
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_shares_are_determined(seed: int, N: int, L: int) -> None:
    S, shares = draw(seed, "NL L", N=N, L=L)
    found = torch.linalg.pinv(S) @ (S @ shares)
    # random shifts are independent as far as there is room for them
    assert torch.allclose(found, shares, **SOLVED) == (L <= N)


@pytest.mark.theorem("least-squares.fixed-vector")
@cases
@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_best_fixed_vector(seed: int, o: int, T: int) -> None:
    Y, v = draw(seed, "oT o", T=T, o=o)
    mean = Y.mean(1)
    least = norm2(Y) - T * norm2(mean)
    assert_close(norm2(Y - mean[:, None]), least, **SOLVED)
    assert_close(norm2(Y - v[:, None]), least + T * norm2(mean - v), **SOLVED)
