"""What a site can reach, against singular values and pseudoinverses in numpy."""

from typing import Any

import downstream_witness as brute
import numpy as np
import pytest
import torch
import witness
from hypothesis import given, settings
from scipy.optimize import brentq
from scipy.sparse.linalg import lsmr
from torch import Tensor
from torch.nn.functional import silu

import equiv
from equiv.model.batches import split
from equiv.model.inputs import from_inputs
from equiv.steering.jacobian.cgls import Problems, solve_each
from equiv.testing.models import transformer
from equiv.testing.strategies import seeds

IDS = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(0))
F64 = torch.float64
D = 8


def small(seed: int) -> Any:
    return transformer(
        "llama", seed=seed, hidden_size=D, head_dim=4, intermediate_size=12
    )


def reached(model: Any, update: Any, **asked: Any) -> dict[str, equiv.Reach]:
    call = {"layer": 0, "ridge": 0.0, "iterations": 200, "rank": None, "dtype": F64}
    return {r.unknown: r for r in equiv.reach(model, update, IDS, **{**call, **asked})}


def parts(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids that `reach` fits on, and those it holds out."""
    found = {False: [], True: []}
    for batch in split(from_inputs(model, IDS), 0.25, 0):
        found[batch.held_out].append(batch.arguments["input_ids"])
    fitted, held = (torch.cat(found[out]) for out in (False, True))
    assert len(fitted) == 3 and len(held) == 1
    return fitted, held


def blocks(matrix: np.ndarray) -> np.ndarray:
    """The Jacobian of every token, [tokens, e, d]; everything beside them is zero."""
    n = len(matrix) // D
    cut = matrix.reshape(n, D, n, D)
    own = cut[np.arange(n), :, np.arange(n)]
    assert np.abs(matrix).sum() == pytest.approx(np.abs(own).sum())
    return own


@pytest.mark.parametrize(
    ("site", "at"), [("mlp_in", "mlp_out"), ("attn_out", "block_out")]
)
def test_a_free_shift_per_token_is_the_pseudoinverse(site: str, at: str) -> None:
    model = small(1)
    update = equiv.Update.random(model, 0.05, seed=0)
    found = reached(model, update, site=site, at=at)["token"]
    ids, _ = parts(model)
    own = blocks(brute.dense(model, (0, site), (0, at), ids))
    y = brute.wanted(model, update, (0, at), ids).reshape(-1, D)
    delta = np.einsum("nde,ne->nd", np.linalg.pinv(own), y)
    h = brute.read(model, (0, site), ids)
    ratio = np.linalg.norm(delta, axis=1) / np.linalg.norm(h, axis=1)
    assert found.residual < 1e-6 and found.converged == 1 and found.tokens == 15
    assert found.norm_max == pytest.approx(ratio.max(), rel=1e-5)
    # torch's median of an even count is the lower of the two in the middle
    assert found.norm_median == pytest.approx(np.sort(ratio)[7], rel=1e-5)
    condition = np.median(np.linalg.cond(own))
    assert found.condition == pytest.approx(condition, rel=1e-3)
    run = brute.later(model, (0, site), (0, at), ids)
    with torch.no_grad():
        shift = run(torch.tensor(delta).reshape(3, 5, D)) - run(torch.zeros(3, 5, D))
    left = np.linalg.norm(shift.numpy().reshape(-1, D) - y) / np.linalg.norm(y)
    assert found.error == pytest.approx(left, rel=1e-4)
    assert (found.residual_held_out, found.error_held_out) == (None, None)


def test_across_attention_the_tokens_of_a_sequence_are_one_problem() -> None:
    model = small(2)
    update = equiv.Update.random(model, 0.05, seed=0)
    found = reached(model, update, site="attn_out", at=(1, "block_out"))["token"]
    ids, _ = parts(model)
    dense = brute.dense(model, (0, "attn_out"), (1, "block_out"), ids)
    y = brute.wanted(model, update, (1, "block_out"), ids)
    delta = (np.linalg.pinv(dense) @ y).reshape(-1, D)
    h = brute.read(model, (0, "attn_out"), ids)
    ratio = np.linalg.norm(delta, axis=1) / np.linalg.norm(h, axis=1)
    assert found.norm_max == pytest.approx(ratio.max(), rel=1e-3)
    own = dense.reshape(3, 40, 3, 40)[np.arange(3), :, np.arange(3)]
    assert found.condition == pytest.approx(np.median(np.linalg.cond(own)), rel=0.01)


@pytest.mark.parametrize("name", ["vector", "affine full"])
def test_shared_shifts_are_measured_on_both_parts(name: str) -> None:
    model = small(3)
    update = equiv.Update.random(model, 0.05, seed=0)
    found = reached(model, update, rank=None)[name]
    matrices, wanted = [], []
    for ids in parts(model):
        x = brute.read(model, (0, "mlp_in"), ids)
        columns = brute.columns(x, D, name.partition(" ")[0])
        matrices.append(
            brute.dense(model, (0, "mlp_in"), (0, "mlp_out"), ids) @ columns
        )
        wanted.append(brute.wanted(model, update, (0, "mlp_out"), ids))
    numbers, *_ = np.linalg.lstsq(matrices[0], wanted[0], rcond=None)
    left = [
        np.linalg.norm(m @ numbers - y) / np.linalg.norm(y)
        for m, y in zip(matrices, wanted, strict=True)
    ]
    assert found.residual == pytest.approx(left[0], abs=1e-6)
    assert found.residual_held_out == pytest.approx(left[1], rel=1e-4)
    assert found.curve == ()
    exact = np.linalg.cond(matrices[0])
    if name != "vector":  # of whitened features
        x = brute.read(model, (0, "mlp_in"), parts(model)[0])
        white = np.linalg.qr(np.hstack([np.ones((len(x), 1)), x]))[0]
        dense = brute.dense(model, (0, "mlp_in"), (0, "mlp_out"), parts(model)[0])
        exact = np.linalg.cond(dense @ np.kron(white, np.eye(D)))
    assert 1 / 3 < found.condition / exact < 3


def test_what_lies_outside_the_columns_of_a_narrow_projection_stays() -> None:
    """Unreachable is ‖(I − P) ΔW_d m‖ / ‖ΔW_d m‖, P the projector on col W_d."""
    model = small(4)
    inner = model.model.layers[0].mlp
    down = inner.down_proj.weight
    with torch.no_grad():
        u, s, v = torch.linalg.svd(down, full_matrices=False)
        down.copy_((u[:, :3] * s[:3]) @ v[:3])
        projector = u[:, :3] @ u[:, :3].T
    change = (
        0.1 * torch.randn(D, 12, generator=torch.Generator().manual_seed(0)).double()
    )
    found = reached(model, {"model.layers.0.mlp.down_proj.weight": change})["token"]
    u_in = torch.tensor(brute.read(model, (0, "mlp_in"), parts(model)[0]))
    with torch.no_grad():
        m = silu(inner.gate_proj(u_in)) * inner.up_proj(u_in)
    y = m @ change.T
    outside = float((y - y @ projector).norm() / y.norm())
    assert 0.3 < outside < 1
    assert found.residual == pytest.approx(outside, abs=1e-6)


def least_norm(j: np.ndarray, y: np.ndarray, share: float) -> float:
    """min ‖Δ‖ with ‖J Δ − y‖ ≤ share ‖y‖, by the secular equation of the SVD."""
    u, s, _ = np.linalg.svd(j)
    c = u.T @ y

    def excess(log: float) -> float:
        kept = c / (1 + s**2 * np.exp(log))  # residual at damping exp(−log)
        return float(np.sum(kept**2) - share**2 * np.sum(y**2))

    damping = float(np.exp(-float(brentq(excess, -30, 60))))  # pyright: ignore
    return float(np.linalg.norm(s * c / (s**2 + damping)))


def test_the_curve_is_a_share_from_below_and_near_the_exact_one() -> None:
    model = small(1)
    update = equiv.Update.random(model, 0.3, seed=0)
    sizes = (1e-4, 0.1, 0.3, 1.0, 3.0, 10.0)
    found = reached(model, update, sizes=sizes)["token"]
    ids, _ = parts(model)
    own = blocks(brute.dense(model, (0, "mlp_in"), (0, "mlp_out"), ids))
    y = brute.wanted(model, update, (0, "mlp_out"), ids).reshape(-1, D)
    h = np.linalg.norm(brute.read(model, (0, "mlp_in"), ids), axis=1)
    least = [least_norm(j, own_y, 0.1) for j, own_y in zip(own, y, strict=True)]
    shares = []
    for at in found.curve:
        exact = np.mean(at.size * np.array(least) <= h)
        near = np.mean(1.3 * at.size * np.array(least) <= h)
        assert near <= at.first_order <= exact
        shares.append(at.first_order)
    assert [at.size for at in found.curve] == list(sizes)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 and shares[-1] < 1
    assert found.curve[0].applied == 1  # tiny shifts are first order
    assert all(at.applied <= at.first_order for at in found.curve[1:])


@settings(max_examples=20 * witness.SWEEP)
@given(seeds())
def test_many_problems_at_once_are_scipys_lsmr_for_each(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    j = torch.randn(6, 5, 4, generator=source, dtype=F64)
    j[2, :, 3] = j[2, :, 0]  # one of deficient rank
    y = torch.randn(6, 5, generator=source, dtype=F64)
    y[4] = 0
    rows = torch.arange(6)
    found = solve_each(
        lambda x: torch.einsum("ned,nd->ne", j, x),
        lambda r: torch.einsum("ned,ne->nd", j, r),
        y,
        Problems(rows, rows, 6),
        iterations=40,
        tolerance=1e-10,
        share=0.9,
    )
    for i in range(6):
        x, *_ = lsmr(j[i].numpy(), y[i].numpy(), atol=1e-12, btol=1e-12)
        np.testing.assert_allclose(found.x[i], x, atol=1e-6)
        left = float((j[i] @ found.within[i] - y[i]).norm())
        least = float((j[i] @ found.x[i] - y[i]).norm())
        assert left <= max(0.9 * float(y[i].norm()), least) + 1e-9
        assert found.within[i].norm() <= found.x[i].norm() + 1e-9
    assert found.x[4].norm() == 0
    exact = torch.linalg.cond(j)
    for i in (0, 1, 3, 5):
        assert float(found.condition[i]) == pytest.approx(float(exact[i]), rel=1e-3)


def test_nothing_to_reach_and_wrong_calls() -> None:
    model = small(5)
    update = equiv.Update.random(model, 0.1, seed=0)
    above = equiv.Update.from_dict(
        {n: d for n, d in update.deltas.items() if ".1." in n}
    )
    with pytest.raises(equiv.InputsError, match="does not move mlp_out"):
        equiv.reach(model, above, IDS, layer=0)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layer": 5}, equiv.SiteError, "Expected a layer in 0…1"),
        ({"at": "mlp_in"}, equiv.SiteError, "to come after"),
        ({"tolerance": 2}, equiv.ArgumentError, "`tolerance`"),
        ({"sizes": ("big",)}, equiv.ArgumentError, "`sizes`"),
        ({"rank": 0}, equiv.ArgumentError, "`rank`"),
        ({"seed": -1}, equiv.ArgumentError, "`seed`"),
        ({"iterations": 0}, equiv.ArgumentError, "`iterations`"),
    ]
    for asked, error, says in wrong:
        with pytest.raises(error, match=says):
            equiv.reach(model, update, IDS, **{"layer": 0, **asked})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
