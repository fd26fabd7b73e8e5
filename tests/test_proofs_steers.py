"""The theorems about steers that are updates, evaluated on tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theorem_tensors import (
    EXACT,
    SOLVED,
    cases,
    dims,
    draw,
    gate,
    glu,
    head,
    kinds,
    norm2,
    off_span,
    orthonormal,
    rank,
    seeds,
    spoilt,
)
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close


@pytest.mark.theorem("mlp-in.affine", "mlp-in.linear-glu")
@cases
@given(seeds, dims, dims, dims)
def test_mlp_in_steer(seed: int, d: int, n: int, T: int) -> None:
    Wg, Wu, Wd, M, bg, bu, v, u = draw(seed, "nd nd dn dd n1 n1 d1 dT", n=n, d=d, T=T)

    def mlp(Wg: Tensor, bg: Tensor, Wu: Tensor, bu: Tensor, u: Tensor) -> Tensor:
        return Wd @ gate(silu, Wg @ u + bg, Wu @ u + bu)

    grow = torch.eye(d) + M
    steered = mlp(Wg, bg, Wu, bu, u + (M @ u + v))
    updated = mlp(Wg @ grow, bg + Wg @ v, Wu @ grow, bu + Wu @ v, u)
    assert_close(steered, updated, **EXACT)
    assert_close(
        glu(silu, Wg, Wu, Wd, u + M @ u),
        glu(silu, Wg + Wg @ M, Wu + Wu @ M, Wd, u),
        **EXACT,
    )


@pytest.mark.theorem("mlp-in.match")
@cases
@given(seeds, dims, dims)
def test_mlp_in_matches_update(seed: int, d: int, n: int) -> None:
    Wg, Wu, Wd, v, u, noise_g, noise_u = draw(seed, "nd nd dn d d nd nd", n=n, d=d)
    # an update with dW u = W v: W v u^T / |u|^2 plus anything that kills u
    kills_u = torch.eye(d) - torch.outer(u, u) / norm2(u)
    dWg = torch.outer(Wg @ v, u) / norm2(u) + noise_g @ kills_u
    dWu = torch.outer(Wu @ v, u) / norm2(u) + noise_u @ kills_u
    assert_close(
        glu(silu, Wg, Wu, Wd, u + v), glu(silu, Wg + dWg, Wu + dWu, Wd, u), **SOLVED
    )


@pytest.mark.theorem(
    "reft.update", "reft.rank", "reft.span", "reft.replaces", "reft.keeps"
)
@cases
@given(seeds, st.integers(1, 5), dims, kinds)
def test_reft(seed: int, r: int, n: int, kind: str) -> None:
    d = r + 2
    R, W, b, Wd, bd, m = draw(seed, "dr rd r dn d n", d=d, r=r, n=n)
    R, Wd = orthonormal(R).T, spoilt(kind, Wd)
    y = Wd @ m + bd
    shift = R.T @ (W @ y + b - R @ y)
    update, bias = R.T @ (W - R) @ Wd, R.T @ b + R.T @ (W - R) @ bd
    assert_close(y + shift, (Wd + update) @ m + (bd + bias), **EXACT)
    assert rank(update) <= r
    assert_close(off_span(shift, R.T), torch.zeros(d), **EXACT)
    assert_close(R @ (y + shift), W @ y + b, **EXACT)
    rest = torch.eye(d) - R.T @ R
    assert_close(rest @ (y + shift), rest @ y, **EXACT)


@pytest.mark.theorem("reft.reach")
@cases
@given(seeds, st.integers(2, 5), st.integers(1, 5), st.integers(1, 3))
def test_steer_reaches_update(seed: int, d: int, n: int, r: int) -> None:
    Wd, K = draw(seed, "dn dd", d=d, n=n)
    U, s, Vh = torch.linalg.svd(K)
    dWd = (U[:, :r] * s[:r]) @ Vh[:r] @ Wd  # rank <= r, rows in the row space of W_d
    S = dWd @ torch.linalg.pinv(Wd)
    assert rank(S) <= r
    assert_close(S @ Wd, dWd, **SOLVED)
    # and back: the update of any steer has rank <= r and rows in the row space of W_d
    assert_close(off_span(dWd.T, Wd.T), torch.zeros(n, d), **SOLVED)


@pytest.mark.theorem(
    "fixed-vector.bias", "fixed-vector.attention", "fixed-vector.value-bias"
)
@cases
@given(seeds, dims, dims, dims)
def test_fixed_vector(seed: int, d: int, n: int, T: int) -> None:
    x, W, b, m, v = draw(seed, "d dn d n d", d=d, n=n)
    at_mlp_out = x + ((W @ m + b) + v)
    as_bias = x + (W @ m + (b + v))
    at_block_out = (x + (W @ m + b)) + v
    assert_close(at_mlp_out, as_bias, **EXACT)
    assert_close(as_bias, at_block_out, **EXACT)
    Wo, Wv, X, bias, scores = draw(seed + 1, "dn nd dT n T", d=d, n=n, T=T)
    a = torch.softmax(scores, 0)
    assert_close(
        Wo @ ((Wv @ X + bias[:, None]) @ a), head(Wo, Wv, X, a) + Wo @ bias, **EXACT
    )


@pytest.mark.theorem("fixed-vector.post-norm", "fixed-vector.scale-blind")
@cases
@given(seeds, st.integers(2, 6))
def test_post_norm_breaks(seed: int, d: int) -> None:
    # a vector before an RMS norm is not that vector after it; before a translation
    # it is
    x, y, v, shift = draw(seed, "d d d d", d=d)

    def rms_norm(z: Tensor) -> Tensor:
        return z / z.pow(2).mean().sqrt()

    def translation(z: Tensor) -> Tensor:
        return z + shift

    assert_close(rms_norm(y + y), rms_norm(y), **EXACT)
    assert not torch.allclose(x + rms_norm(y + v), x + rms_norm(y) + v, rtol=1e-3)
    assert not torch.allclose(rms_norm(y), rms_norm(1e-9 * v) + y, rtol=1e-3)
    assert_close(x + translation(y + v), x + translation(y) + v, **EXACT)
    assert_close(translation(y), translation(torch.zeros(d)) + y, **EXACT)


@pytest.mark.theorem("token.rank-one", "token.rank")
@cases
@given(seeds, dims, dims)
def test_token_rank_one(seed: int, d: int, n: int) -> None:
    W, u, D = draw(seed, "nd d d", n=n, d=d)
    update = torch.outer(W @ D, u) / norm2(u)
    assert_close(W @ (u + D), (W + update) @ u, **EXACT)
    assert rank(update) <= 1


@pytest.mark.theorem("null.up-down", "null.value-output")
@cases
@given(seeds, dims, dims, dims)
def test_null_updates(seed: int, d: int, n: int, T: int) -> None:
    Wg, Wu, Wd, u, c = draw(seed, "nd nd dn d n", n=n, d=d)
    c = c.exp()
    assert_close(
        glu(silu, Wg, c[:, None] * Wu, Wd / c, u), glu(silu, Wg, Wu, Wd, u), **EXACT
    )
    Wo, Wv, N, X, a = draw(seed + 1, "dn nd nn dT T", d=d, n=n, T=T)
    N = N + 5 * torch.eye(n)
    assert_close(
        head(Wo @ torch.linalg.inv(N), N @ Wv, X, a), head(Wo, Wv, X, a), **SOLVED
    )


@pytest.mark.theorem("null.softmax", "null.first-position")
@cases
@given(seeds, dims, dims, dims)
def test_first_position_ignores_scores(seed: int, d: int, k: int, T: int) -> None:
    X, Wv, Wo, *queries_keys = draw(seed, "dT kd dk kd kd kd kd", d=d, k=k, T=T)

    def attended(Wq: Tensor, Wk: Tensor) -> Tensor:
        scores = (Wq @ X).T @ (Wk @ X) / (d * k)  # so that the softmax is not saturated
        later = torch.ones(T, T).triu(1).bool()
        pattern = torch.softmax(scores.masked_fill(later, -torch.inf), 1)
        return Wo @ (Wv @ X) @ pattern.T

    base, tuned = attended(*queries_keys[:2]), attended(*queries_keys[2:])
    assert_close(tuned[:, 0], base[:, 0], **EXACT)
    assert_close(base[:, 0], Wo @ Wv @ X[:, 0], **EXACT)
    assert T == 1 or not torch.allclose(tuned[:, 1], base[:, 1], rtol=0, atol=1e-12)
