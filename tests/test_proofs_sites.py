"""The theorems about sites: what they reach, see and replace."""

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
    kinds,
    norm2,
    off_span,
    orthonormal,
    rank,
    seeds,
    silu1,
    spoilt,
)
from theorem_tensors import float64 as float64
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close


@pytest.mark.theorem(
    "mlp-in.reachable", "mlp-in.in-down", "mlp-in.batch", "mlp-in.exact-in-down"
)
@cases
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    kinds,
)
def test_mlp_in_reach(seed: int, d: int, n: int, extra: int, T: int, kind: str) -> None:
    o = n + extra
    Wg, Wu, Wd, v, u, p = draw(seed, "nd nd on d1 dT o1", n=n, d=d, o=o, T=T)
    Wd = spoilt(kind, Wd)
    jacobians = [
        Wd @ (torch.diag(silu1(Wg @ x) * (Wu @ x)) @ Wg + torch.diag(silu(Wg @ x)) @ Wu)
        for x in u.T
    ]
    A, stacked = jacobians[0], torch.cat(jacobians)
    assert_close(off_span(A @ v, Wd), torch.zeros(o, 1), **SOLVED)
    assert_close(off_span(stacked @ v, stacked), torch.zeros(o * T, 1), **SOLVED)
    # a target outside col(A) is missed by the best steer
    solution = torch.linalg.lstsq(A, p, driver="gelsd").solution
    assert_close((p - A @ solution).norm(), off_span(p, A).norm(), **SOLVED)
    exact = glu(silu, Wg, Wu, Wd, u + v) - glu(silu, Wg, Wu, Wd, u)
    assert_close(off_span(exact, Wd), torch.zeros(o, T), **SOLVED)


@pytest.mark.theorem("mlp-in.all-reachable")
@cases
@given(seeds, dims, dims, dims)
def test_all_reachable(seed: int, d: int, n: int, o: int) -> None:
    # random factors have full rank: rank A = min(d, n, o), so all is reached when no
    # side is smaller than o
    Wd, J, p = draw(seed, "on nd o1", o=o, n=n, d=d)
    A = Wd @ J
    missed = norm2(p - A @ torch.linalg.pinv(A) @ p)
    assert (missed < 1e-12) == (rank(A) == o)


@pytest.mark.theorem("mlp-in.orthogonal")
@cases
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), kinds)
def test_orthogonal_part_stays(
    seed: int, d: int, n: int, extra: int, kind: str
) -> None:
    o = n + extra
    Wd, J, x, w, v = draw(seed, "on nd n o d", o=o, n=n, d=d)
    Wd = spoilt(kind, Wd)
    p, A, w = Wd @ x, Wd @ J, off_span(w, Wd)
    assert_close(norm2(p + w - A @ v), norm2(p - A @ v) + norm2(w), **SOLVED)


@pytest.mark.theorem(
    "separation.dead", "separation.blind", "separation.constant", "separation.target"
)
@cases
@given(seeds, st.integers(2, 5), dims)
def test_block_out_separation(seed: int, d: int, n: int) -> None:
    Wg, Wu, Wd, B, u1, u2 = draw(seed, "nd nd dn dd d d", n=n, d=d)

    def steer(y: Tensor) -> Tensor:
        return torch.tanh(B @ y) + B.sum(0)

    # blind: move the hidden activation inside ker(W_d) and the steer does not notice
    m = gate(silu, Wg @ u1, Wu @ u1)
    in_kernel = (torch.eye(n) - torch.linalg.pinv(Wd) @ Wd) @ torch.ones(n)
    assert_close(steer(Wd @ m), steer(Wd @ (m + in_kernel)), **SOLVED)
    Wd = torch.zeros(d, n)
    y1, y2 = glu(silu, Wg, Wu, Wd, u1), glu(silu, Wg, Wu, Wd, u2)
    assert_close(steer(y1), steer(y2), rtol=0, atol=0)
    assert_close(B @ silu(B.T @ y1), torch.zeros(d), rtol=0, atol=0)  # no bias: dead
    assert_close(u1 + y1 + B @ (u1 + y1), u1 + B @ u1, **EXACT)
    assert not torch.allclose(B @ (u1 + y1), B @ (u2 + y2))


@pytest.mark.claim("18, norm of Q")
@pytest.mark.theorem(
    "replication.linear", "replication.affine", "replication.skip-projector"
)
@cases
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_block_out_replication(seed: int, p: int, q: int, r: int) -> None:
    d = p + q + 1
    S, M, A1, A2, x, y, b = draw(seed, "dp dq dr rd p q d", d=d, p=p, q=q, r=r)
    S, M, A = orthonormal(S), orthonormal(M), A1 @ A2
    Q = torch.cat([torch.zeros(d, p), M], 1) @ torch.linalg.pinv(torch.cat([S, M], 1))
    P = torch.cat([S, torch.zeros(d, q)], 1) @ torch.linalg.pinv(torch.cat([S, M], 1))
    x, y, B = S @ x, M @ y, A @ Q
    assert_close(A @ P @ (x + y), A @ x, **SOLVED)  # the other projector
    sine = (1 - torch.linalg.matrix_norm(S.T @ M, 2) ** 2).sqrt()
    assert_close(torch.linalg.matrix_norm(Q, 2), 1 / sine, **SOLVED)
    assert rank(B) <= rank(A)
    assert_close(B @ (x + y), A @ y, **SOLVED)
    assert_close(x + y + (B @ (x + y) + b), x + (y + (A @ y + b)), **SOLVED)


@pytest.mark.theorem("replication.impossible")
@cases
@given(seeds, dims)
def test_no_replication_if_dependent(seed: int, d: int) -> None:
    # v as skip part and v as MLP part give one block output, and ask for two steers
    A, v = draw(seed, "dd d", d=d)
    zero = torch.zeros(d)
    for x, y, wanted in [(zero, v, A @ v), (v, zero, zero)]:
        assert_close(x + y, v, rtol=0, atol=0)
        assert_close(A @ y, wanted, rtol=0, atol=0)
    assert not torch.allclose(A @ v, zero)


@pytest.mark.theorem("coverage.gap", "coverage.free")
@cases
@given(seeds, dims)
def test_coverage_gap(seed: int, d: int) -> None:
    x, y, x1, y1, other = draw(seed, "d d d d d", d=d)
    match_mlp = y1 - y
    assert_close((x1 + y1) - (x + (y + match_mlp)), x1 - x, **EXACT)
    free = (x1 + y1) - (x + y)
    assert_close(x + (y + free), x1 + y1, **EXACT)
    assert not torch.allclose(x + (y + other), x1 + y1)


def draw_joint(seed: int, r: int, k: int, n: int) -> list[Tensor]:
    """Wd, A, B, Down, Up, s, m."""
    d = r + k + 1
    return draw(seed, "dn rn dr kd dk d n", d=d, n=n, r=r, k=k)


@pytest.mark.theorem(
    "joint.no-interference", "joint.shifts-add", "joint.project", "joint.project-fixes"
)
@cases
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_no_interference(seed: int, r: int, k: int, n: int) -> None:
    Wd, A, B, Down, Up, s, m = draw_joint(seed, r, k, n)
    V = orthonormal(B)
    away = torch.eye(len(B)) - V @ V.T
    Down = Down @ away
    assert_close(Down @ B, torch.zeros(k, r), **SOLVED)
    assert_close(Down @ away, Down, **EXACT)

    def adapter(h: Tensor) -> Tensor:
        return Up @ silu(Down @ h)

    base, lora = s + Wd @ m, s + (Wd + B @ A) @ m
    assert_close(adapter(lora), adapter(base), **SOLVED)
    assert_close(lora + adapter(lora) - base, B @ A @ m + adapter(base), **SOLVED)


@pytest.mark.theorem("joint.necessary")
@cases
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_no_interference_necessary(seed: int, r: int, k: int, n: int) -> None:
    # tanh is injective and a random Up has full column rank, so Down B A other than 0
    # must show
    Wd, A, B, Down, Up, _, _ = draw_joint(seed, r, k, n)
    Down = 0.1 * Down  # so that tanh is not saturated

    def adapter(h: Tensor) -> Tensor:
        return Up @ torch.tanh(Down @ h)

    unit = torch.eye(n)
    seen = (adapter((Wd + B @ A) @ unit) - adapter(Wd @ unit)).norm(dim=0) > 1e-9
    assert torch.equal(seen, (Down @ B @ A).norm(dim=0) > 1e-9)


@pytest.mark.theorem("joint.pythagoras")
@cases
@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_shifts_pythagoras(seed: int, r: int, k: int) -> None:
    d = r + k + 1
    B, Up, e, c = draw(seed, "dr dk r k", d=d, r=r, k=k)
    V = orthonormal(B)
    Up = Up - V @ (V.T @ Up)
    assert_close(norm2(B @ e + Up @ c), norm2(B @ e) + norm2(Up @ c), **SOLVED)
