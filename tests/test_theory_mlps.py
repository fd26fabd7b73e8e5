"""What mlp_in can bring about: claims 13, 14, 46, against autograd, numpy and SciPy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from breaking import Broken, break_one, each, module_of, off
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.functional import silu

import equiv
from equiv.testing.models import transformer
from equiv.theory import Judged, Verdict
from equiv.theory.mlps import MLP, distinct, find_mlps
from equiv.theory.norms import as_norm
from equiv.theory.setting import Setting, setting

IDS = torch.randint(3, 32, (3, 7), generator=torch.Generator().manual_seed(1))
MLP_ONLY = ("gate_proj", "up_proj", "down_proj")


def made(model: Any, size: float = 0.1, inputs: object = IDS) -> Setting:
    update = equiv.Update.random(model, size, seed=0)
    return setting("", model, update, inputs, None, as_norm("euclidean"), 0)


def judged(number: int, model: Any, size: float = 0.1, inputs: object = IDS) -> Judged:
    update = equiv.Update.random(model, size, seed=0)
    return equiv.theory.run([number], model, update, inputs)[number]


def evidence(found: Judged) -> dict[str, Any]:
    return found.to_dict()["evidence"]


def by_hand(w: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A Llama's MLP, from its weights."""
    m = silu(u @ w["gate_proj.weight"].T) * (u @ w["up_proj.weight"].T)
    return m, m @ w["down_proj.weight"].T


def first(model: Any, size: float = 0.1) -> tuple[MLP, dict[str, Tensor], Any]:
    """The first layer's MLP, its weights, and the model."""
    mlp = find_mlps(made(model, size), 5)[0]
    return mlp, dict(model.model.layers[0].mlp.state_dict()), model


def test_mlps_are_the_models() -> None:
    mlp, w, model = first(transformer("llama"))
    u = mlp.u
    for got, expected in zip(mlp.run(u), by_hand(w, u), strict=True):
        torch.testing.assert_close(got, expected)
    update: Any = equiv.Update.random(model, 0.1, seed=0).deltas
    prefix = "model.layers.0.mlp."
    moved = {n: t + 0.3 * update[prefix + n] for n, t in w.items()}
    torch.testing.assert_close(mlp.run(u, 0.3)[1], by_hand(moved, u)[1])
    torch.testing.assert_close(mlp.down_change, update[prefix + "down_proj.weight"])
    inner, whole = mlp.slopes(u)
    for i, token in enumerate(u):
        for got, which in ((inner[i], 0), (whole[i], 1)):
            expected = jacobian(lambda x, n=which: by_hand(w, x)[n], token)
            torch.testing.assert_close(got, expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_stored_the_other_way_round_and_not_found_at_all() -> None:
    model = transformer("gpt2")
    mlp = find_mlps(made(model), 4)[0]
    own = model.transformer.h[0].mlp.c_proj
    assert mlp.crossed and torch.equal(mlp.down, own.weight.T)
    torch.testing.assert_close(
        mlp.run(mlp.u)[1], mlp.run(mlp.u)[0] @ own.weight + own.bias
    )
    narrow = mlp.cut(2)
    assert torch.linalg.matrix_rank(narrow.down) == 2
    assert torch.linalg.matrix_rank(narrow.slopes(mlp.u)[1]).max() == 2
    for family in ("mixtral", "mamba"):
        assert find_mlps(made(transformer(family)), 4) == []
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    assert find_mlps(made(plain, inputs=torch.randn(4, 3).double()), 4) == []


def test_distinct_rows_are_drawn_once() -> None:
    rows = torch.tensor([[1.0], [2.0], [1.0], [3.0], [2.0]])
    chosen = distinct(rows, 10, 0)
    assert sorted(rows[chosen].flatten().tolist()) == [1, 2, 3]
    assert len(distinct(rows, 2, 0)) == 2


@pytest.mark.claim(13)
@pytest.mark.parametrize(
    ("inner", "verdict"), [(12, Verdict.HOLDS), (40, Verdict.CONDITIONAL)]
)
def test_columns_are_vacuous_only_at_full_rank(inner: int, verdict: Verdict) -> None:
    model = transformer("llama", intermediate_size=inner)
    found = judged(13, model)
    assert found.verdict is verdict, found.says
    ranks = {
        np.linalg.matrix_rank(b.mlp.down_proj.weight.detach().numpy())
        for b in model.model.layers
    }
    assert set(evidence(found)["rank W_d"].values()) == ranks == {min(inner, 16)}
    assert ("everything at full row rank 16" in found.says) == (inner > 16)


@pytest.mark.claim(14)
def test_ranks_and_prices_are_those_of_brute_force() -> None:
    model = transformer("llama", intermediate_size=40)
    found = judged(14, model, inputs=IDS[:1])
    assert found.verdict is Verdict.CONDITIONAL, found.says
    (mlp, _) = find_mlps(made(model, inputs=IDS[:1]), 32)
    w = dict(model.model.layers[0].mlp.state_dict())
    tuned = {n: t + mlp.changes[n] for n, t in w.items()}
    ratios, errors, conditions = [], [], []
    for u in mlp.u:
        a = jacobian(lambda x: by_hand(w, x)[1], u)
        assert isinstance(a, Tensor)
        assert np.linalg.matrix_rank(a.numpy()) == 16
        y = by_hand(tuned, u)[1] - by_hand(w, u)[1]
        delta = torch.from_numpy(np.linalg.solve(a.numpy(), y.numpy()))
        moved = by_hand(w, u + delta)[1] - by_hand(w, u)[1]
        ratios.append(float(delta.norm() / u.norm()))
        errors.append(float((moved - y).norm() / y.norm()))
        conditions.append(np.linalg.cond(a.numpy()))
    assert len(mlp.u) == 7  # an odd number: one median
    for name, expected in (
        ("‖Δ‖/‖u‖", ratios),
        ("error when applied", errors),
        ("cond A", conditions),
    ):
        got = evidence(found)[name]["layer 0"]
        assert got == pytest.approx(np.median(expected), rel=1e-6)
        each = evidence(found)["each token"]["layer 0"][name]
        assert each == pytest.approx(expected, rel=1e-2)  # three digits
    assert evidence(found)["toys, d = 24: median rank A"]["ReLU, f = d"] < 16


@pytest.mark.claim(14)
def test_relu_takes_rank_away() -> None:
    model = transformer("llama", intermediate_size=16, hidden_act="relu")
    found = judged(14, model)
    assert found.verdict is Verdict.CONDITIONAL, found.says
    low, high = evidence(found)["rank A"]["layer 0"]
    assert low < high < 16
    gate = model.model.layers[0].mlp.gate_proj.weight
    u = find_mlps(made(model), 32)[0].u
    on = (u @ gate.T > 0).sum(-1)
    assert [low, high] == [int(on.min()), int(on.max())]


@pytest.mark.claim(14)
def test_what_the_source_says_is_judged_by_what_it_costs() -> None:
    """A tiny update of a random model is reached by the Δ of first order."""
    model = transformer("llama", intermediate_size=40)
    tiny = judged(14, model, size=1e-6).as_written
    assert tiny is not None and tiny["verdict"] is Verdict.FAILS
    large = judged(14, model, size=1.0).as_written
    assert large is not None and large["verdict"] is Verdict.CONDITIONAL
    numbers = tiny["counterexample"]
    e = 1 / (1 + np.exp(-1.0))  # φ(1) of SiLU; φ′(1) = e + e(1 − e)
    slope = 2 * e + e * (1 - e)
    assert numbers["A"] == pytest.approx(slope)
    assert numbers["Δ = ΔW_d m / A"] == pytest.approx(e / 8 / slope)


@pytest.mark.claim(46)
def test_what_is_reached_is_reached_and_scipy_reaches_little_more() -> None:
    mlp, w, _ = first(transformer("llama", intermediate_size=40), size=0.1)
    claim, t = module_of(46), 0.3
    search = claim.Search(mlp, t * mlp.target, torch.zeros_like(mlp.u))
    delta = search.run()
    assert bool((delta.norm(dim=1) <= (1 + 1e-9) * mlp.u.norm(dim=1)).all())
    also = []
    for u, own, y in zip(mlp.u, delta, t * mlp.target, strict=True):

        def left(x: np.ndarray, u: Tensor = u, y: Tensor = y) -> np.ndarray:
            moved = by_hand(w, u + torch.from_numpy(x))[1] - by_hand(w, u)[1]
            return (moved - y).numpy()

        near = np.linalg.norm(left(own.numpy())) <= 0.1 * float(y.norm())
        best = least_squares(left, np.zeros(16), method="lm").x
        short = np.linalg.norm(best) <= float(u.norm())
        right = np.linalg.norm(left(best)) <= 0.1 * float(y.norm())
        also.append((near, short and right))
    reached = [bool(n) for n, _ in also]
    assert search.reached.tolist() == reached and any(reached)
    assert sum(reached) >= sum(bool(s) for _, s in also)


@pytest.mark.claim(46)
@pytest.mark.parametrize(
    ("inner", "size", "verdict", "says"),
    [
        (40, 0.1, Verdict.CONDITIONAL, "at least"),
        (40, 1e-6, Verdict.FAILS, "at full size too"),
        (6, 0.3, Verdict.FAILS, "not even small"),
    ],
)
def test_verdicts_on_the_curve(
    inner: int, size: float, verdict: Verdict, says: str
) -> None:
    found = judged(46, transformer("llama", intermediate_size=inner), size)
    assert found.verdict is verdict and says in found.says.lower(), found.says


visibly_off = partial(off, by=1e-3)


def less(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: max(1, original(*args) - 1)


def one_column(original: Callable[..., Any]) -> Callable[..., Any]:
    """An A of rank one."""

    def slopes(*args: Any) -> tuple[Tensor, Tensor]:
        inner, whole = original(*args)
        return inner, whole[..., :1].expand_as(whole)

    return slopes


BROKEN: list[Broken] = [
    (13, "project", visibly_off),
    (13, "glu_slopes", visibly_off),
    (13, "narrow_glu", lambda _: lambda draw: draw.glu(16, 40)),
    (14, "column_rank", less),
    (14, "project", visibly_off),
    (14, "unreachable", visibly_off),
    (14, "glu_slopes", one_column),
    (46, "step", lambda f: lambda *args: -f(*args)),
    (46, "step", lambda f: lambda *args: 0 * f(*args)),
]


@pytest.mark.claim(13, 14, 46)
@each(BROKEN)
def test_it_fails_when_broken(case: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    number = break_one(monkeypatch, case)
    found = judged(number, transformer("llama", intermediate_size=40))
    assert found.verdict is Verdict.FAILS, found.says


@pytest.mark.claim(13, 14, 46)
@pytest.mark.parametrize("number", [13, 14, 46])
@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_where_there_is_no_such_mlp(number: int, family: str) -> None:
    assert judged(number, transformer(family)).verdict is Verdict.NOT_APPLICABLE
