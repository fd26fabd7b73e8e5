"""One map for many tokens: claims 15 and 16, against numpy and brute force."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import witness
from breaking import Broken, break_one, each
from torch import Tensor

import equiv
from equiv.testing.models import transformer
from equiv.theory import Judged, Verdict
from equiv.theory.norms import as_norm
from equiv.theory.scales import at_scales
from equiv.theory.setting import setting
from equiv.theory.shared_maps import affine_rank, best_map, misfit, misfit_through

IDS = torch.randint(3, 32, (16, 8), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def judged(number: int, model: Any, update: Any, inputs: object = IDS) -> Judged:
    return equiv.theory.run([number], model, update, inputs)[number]


def random(model: Any, size: float = 0.05) -> equiv.Update:
    return equiv.Update.random(model, size, seed=0)


def bias_of(model: Any, layer: int) -> dict[str, Tensor]:
    """An update that is a fixed vector at the MLP's output."""
    name = f"transformer.h.{layer}.mlp.c_proj.bias"
    return {name: torch.linspace(-1, 1, 16, dtype=torch.float64)}


def test_the_best_maps_are_those_of_numpy_and_of_alternating_fits() -> None:
    x, y = normal(40, 6), normal(40, 5, seed=1) + 1
    known = np.hstack([x.numpy(), np.ones((40, 1))])
    _, squares, *_ = np.linalg.lstsq(known, y.numpy(), rcond=None)
    total = float(y.square().sum())
    assert misfit(best_map(x, y, None), x, y) == pytest.approx(squares.sum() / total)
    centred = y - y.mean(0)
    assert misfit(best_map(x, y, 0), x, y) == pytest.approx(
        float(centred.square().sum()) / total
    )
    left = np.random.default_rng(0).normal(size=(6, 2))
    xc, yc = (x - x.mean(0)).numpy(), centred.numpy()
    for _ in range(2000):  # x L R, one factor after the other
        right = np.linalg.lstsq(xc @ left, yc, rcond=None)[0]
        left = np.linalg.lstsq(xc, yc @ np.linalg.pinv(right), rcond=None)[0]
    brute = np.square(xc @ left @ right - yc).sum() / total
    assert misfit(best_map(x, y, 2), x, y) == pytest.approx(brute, rel=1e-6)


def test_through_a_jacobian_it_is_one_big_regression() -> None:
    slopes, reads, y = normal(5, 3, 4), normal(5, 2, seed=1), normal(5, 3, seed=2)
    columns = [
        np.kron(a.numpy(), r.numpy()[None]) for a, r in zip(slopes, reads, strict=True)
    ]
    stacked, target = np.vstack(columns), y.numpy().ravel()
    found = np.linalg.lstsq(stacked, target, rcond=None)[0]
    expected = np.square(stacked @ found - target).sum() / np.square(target).sum()
    assert misfit_through(slopes, reads, y) == pytest.approx(expected)


def test_affine_independence_counts_from_the_first_row() -> None:
    x = normal(12, 5)
    assert affine_rank(x) == 6
    x[3] = 0.3 * x[0] + 0.7 * x[1]
    assert affine_rank(x) == 3
    assert affine_rank(torch.nn.functional.layer_norm(normal(12, 5), (5,))) == 5


def test_scales_are_those_of_plain_runs() -> None:
    model = transformer("llama")
    update = random(model)
    made = setting("", model, update, IDS, None, as_norm("euclidean"), 0)
    at = {
        t: witness.tuned_activations(model, update, {"input_ids": IDS}, t=t)
        for t in (0.0, 0.25, 1e-3)
    }
    layers = list(at_scales(made, made.inputs, (0.25,), (0.0,)))
    assert [scaled.layer for scaled in layers] == [0, 1, 2]
    for scaled in layers[:2]:
        for site in ("mlp_in", "block_out"):
            key = (scaled.layer, site)
            base, moved, near = (at[t][key].flatten(0, 1) for t in (0.0, 0.25, 1e-3))
            torch.testing.assert_close(scaled.base[site], base)
            torch.testing.assert_close(scaled.shift[0.25][site], moved - base)
            torch.testing.assert_close(
                scaled.slope[0.0][site], (near - base) / 1e-3, rtol=0.1, atol=0.01
            )
    assert not layers[0].held_out.any()


@pytest.mark.claim(15)
def test_up_to_so_many_tokens_and_no_more() -> None:
    model = transformer("llama")
    found = judged(15, model, random(model))
    assert found.verdict is Verdict.HOLDS, found.says
    evidence = found.to_dict()["evidence"]
    for name, tokens in evidence["tokens"].items():
        limit = {"vector": 1, "rank 8": 9, "affine": 17}[name.rpartition(", ")[2]]
        assert tokens[:2] == [limit, limit + 1]
        exact, beyond, *_ = evidence["share left"][name]
        assert exact < 1e-9 and beyond > 1e-4, name


@pytest.mark.claim(15)
def test_layer_norm_takes_one_token_away() -> None:
    model = transformer("gpt2")
    found = judged(15, model, random(model))
    assert found.verdict is Verdict.HOLDS, found.says
    tokens = found.to_dict()["evidence"]["tokens"]
    assert tokens["layer 0, mlp_in->mlp_out, affine"][0] == 16
    assert tokens["layer 0, block_out, affine"][0] == 17


@pytest.mark.claim(15)
def test_folds_and_too_few_tokens_are_said() -> None:
    model = transformer("gpt2")
    last = judged(15, model, bias_of(model, 1))
    assert last.verdict is Verdict.NOT_APPLICABLE and "fold" in last.says
    first = judged(15, model, bias_of(model, 0))
    assert first.verdict is Verdict.CONDITIONAL
    assert "exact on all tokens" in first.to_dict()["conditions"]
    few = judged(15, model, random(model), IDS[:1])
    assert few.verdict is Verdict.CONDITIONAL
    short = few.to_dict()["conditions"]["too few distinct tokens to tell"]
    assert {name.rpartition(", ")[2] for name in short} == {"rank 8", "affine"}
    one = judged(15, model, random(model), IDS[:1, :1])
    assert one.verdict is Verdict.INCONCLUSIVE


@pytest.mark.claim(16)
def test_misfits_settle_at_that_of_first_order() -> None:
    model = transformer("llama")
    found = judged(16, model, random(model))
    assert found.verdict is Verdict.HOLDS, found.says
    cases = found.to_dict()["evidence"]["held-out misfit, and fitted"]
    assert len(cases) == 2 * 3 * 2
    for own in cases.values():
        assert own["t = 0.0001"] == pytest.approx(own["first order"], rel=1e-2)


@pytest.mark.claim(16)
def test_an_update_that_is_a_steer_has_no_misfit() -> None:
    model = transformer("gpt2")
    found = judged(16, model, bias_of(model, 1))
    assert found.verdict is Verdict.FAILS, found.says
    few = judged(16, model, random(model), IDS[:2])
    assert few.verdict is Verdict.INCONCLUSIVE


def worse(original: Callable[..., Any]) -> Callable[..., Any]:
    def found(*args: Any) -> Any:
        own = original(*args)
        return type(own)(own.matrix, own.bias * 1.001)

    return found


BROKEN: list[Broken] = [
    (15, "best_map", worse),
    (15, "affine_rank", lambda f: lambda x: f(x) + 1),
    (15, "misfit", lambda f: lambda found, x, y: f(found, x, y) / len(x) ** 2),
    (15, "glu_slopes", lambda f: lambda w, u: (f(w, u)[0], 0 * f(w, u)[1])),
    (16, "readers", lambda f: lambda w, turn: f(w, turn).only("gate")),
    (16, "writer", lambda f: lambda w, turn: f(w, turn).plus(w.only("gate"))),
    (16, "SCALES", lambda _: (1.0, 0.5)),
    (16, "glu_slopes", lambda f: lambda w, u: (f(w, u)[0], 0 * f(w, u)[1])),
]


@pytest.mark.claim(15, 16)
@each(BROKEN)
def test_it_fails_when_broken(case: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    number = break_one(monkeypatch, case)
    model = transformer("llama")
    found = judged(number, model, random(model, 0.3))
    assert found.verdict is Verdict.FAILS, found.says
