"""Steering for a later site against dense Jacobians, numpy and closed forms."""

import json
from typing import Any

import downstream_witness as brute
import numpy as np
import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

import equiv
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.steering.jacobian.later import as_later
from equiv.steering.jacobian.passage import Passage, part_of, way
from equiv.testing.models import FAMILIES, transformer
from equiv.testing.strategies import Case, mlp_cases

IDS = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(0))
F64 = torch.float64
PAIRS = [
    ("mlp_in", "mlp_out", (0, "mlp_out")),
    ("attn_out", "block_out", (0, "block_out")),
    ("block_out", "logits", "logits"),
    ("attn_heads", (1, "mlp_hidden"), (1, "mlp_hidden")),
]


def small(seed: int, dtype: torch.dtype = F64) -> Any:
    """A Llama of width 8: dense Jacobians of it are small."""
    return transformer(
        "llama", seed=seed, dtype=dtype, hidden_size=8, head_dim=4, intermediate_size=12
    )


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64)


def fit(model: Any, update: Any, ids: Any = IDS, **asked: Any) -> equiv.SteeringSet:
    """One layer's steering to first order without ridge, solved to the end."""
    call = {"layers": [0], "ridge": 0.0, "rank": None, "iterations": 500, "rounds": 1}
    return equiv.fit_downstream(model, update, ids, dtype=F64, **{**call, **asked})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("site", "at", "key"), PAIRS)
def test_products_are_those_of_the_dense_jacobian(family, site, at, key) -> None:  # type: ignore[no-untyped-def]
    """Forward and reverse mode, through attention, norms and head."""
    if family == "bert" and site in ("attn_out", "attn_heads"):
        at, key = "block_out", (0, "block_out")
    model, ids = transformer(family, seed=1), IDS[:2, :3]
    dense = brute.dense(model, (0, site), key, ids)
    where = as_later(at)
    sites = (site, *where.captured)
    batches = from_inputs(model, ids)
    with measured(model), staged(model, batches, F64, sites=sites) as cut:
        embed = cut.stages[0]
        hidden, _ = cut.run(embed, cut.tensors(embed), None, 0)
        road = way(cut, 0, site, where)
        passage = Passage(road, (part_of(road, 0, hidden),))
        v, w = draw(1, *passage.size), draw(2, *passage.parts[0].base.shape)
        pushed, pulled = passage.push(v), passage.pull(w)
        really = passage.moved(v)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(pushed.flatten(), dense @ v.flatten().numpy(), **close)
    np.testing.assert_allclose(pulled.flatten(), w.flatten().numpy() @ dense, **close)
    run = brute.later(model, (0, site), key, ids)
    with torch.no_grad():
        zero = v.reshape(run.shape)  # type: ignore[attr-defined]
        expected = run(zero) - run(zero * 0)
    np.testing.assert_allclose(really.flatten(), expected.flatten(), **close)


def test_the_jacobian_of_the_glu_is_the_formula() -> None:
    """A(u) = W_d [diag(φ'(a_g) ⊙ a_u) W_g + diag(φ(a_g)) W_u]."""
    model = small(1)
    block = model.model.layers[0].mlp
    gate, up, down = (
        getattr(block, name).weight.detach()
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    dense = brute.dense(model, (0, "mlp_in"), (0, "mlp_out"), IDS[:1, :3])
    for i, u in enumerate(brute.read(model, (0, "mlp_in"), IDS[:1, :3])):
        ag, au = gate @ torch.tensor(u), up @ torch.tensor(u)
        slope = torch.sigmoid(ag) * (1 + ag * (1 - torch.sigmoid(ag)))
        j = torch.diag(slope * au) @ gate + torch.diag(silu(ag)) @ up
        own = dense[8 * i : 8 * (i + 1), 8 * i : 8 * (i + 1)]
        np.testing.assert_allclose(own, down @ j, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("site", "at", "key"), PAIRS[:3])
@pytest.mark.parametrize("form", ["vector", "linear", "affine"])
def test_shared_fits_are_numpys_least_squares(site, at, key, form) -> None:  # type: ignore[no-untyped-def]
    model = small(2)
    update = equiv.Update.random(model, 0.05, seed=0)
    fitted = fit(model, update, site=site, at=at, form=form)
    dense = brute.dense(model, (0, site), key, IDS)
    y = brute.wanted(model, update, key, IDS)
    x = brute.read(model, (0, site), IDS)
    matrix = dense @ brute.columns(x, x.shape[1], form)
    numbers, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    left = np.linalg.norm(matrix @ numbers - y) / np.linalg.norm(y)
    said = fitted.about["layers"]["0"]  # type: ignore[index]
    assert said["residual"] == pytest.approx(left, abs=1e-6)
    assert 0.01 < left < 1
    if said["strength"]:
        steer = fitted.scaled(1 / said["strength"])[0, site]
        delta = steer(torch.tensor(x)).numpy().flatten()
        tiny = 1e-4 * float(np.linalg.norm(y))
        np.testing.assert_allclose(dense @ delta, matrix @ numbers, 0, tiny)


@pytest.mark.parametrize("form", ["vector", "affine", "affine r2"])
def test_the_error_is_what_the_live_model_does(form: str) -> None:
    model = transformer("gpt2", seed=3, n_embd=8, n_inner=12)
    update = equiv.Update.random(model, 0.05, seed=0)
    name, _, rank = form.partition(" r")
    fitted = fit(
        model, update, form=name, rank=int(rank) if rank else None, ridge=1e-3,
        site="attn_out", at=(1, "block_out"), layers=None,
    )  # fmt: skip
    call = {"input_ids": IDS}
    tuned = witness.tuned_activations(model, update, call)[1, "block_out"]
    streams = [witness.tuned_activations(model, update, call, t=0.0)]
    for layer in (0, 1):
        with torch.no_grad(), witness.own_arithmetic(), equiv.steer(
            model, {k: v for k, v in fitted.items() if k[0] <= layer}
        ):  # fmt: skip
            streams.append(witness.activations(model, {}, call))
    for layer in (0, 1):
        missing = tuned - streams[layer][1, "block_out"]
        left = tuned - streams[layer + 1][1, "block_out"]
        said = fitted.about["layers"][str(layer)]  # type: ignore[index]
        assert said["error"] == pytest.approx(float(left.norm() / missing.norm()))
        assert said["error"] <= 1


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_where_the_jacobian_is_the_identity_it_is_the_regression(
    rank: int | None, ridge: float
) -> None:
    """What is added at mlp_out reaches block_out unchanged in a Llama."""
    model = small(4)
    update = equiv.Update.random(model, 0.1, seed=0)
    asked = {"rank": rank, "ridge": ridge, "layers": None}
    fitted = fit(model, update, site="mlp_out", at="block_out", **asked)
    plain = equiv.fit_sequential(
        model, update, IDS, site="mlp_out", target="block", dtype=F64,
        **{**asked, "ridge": ridge},
    )  # fmt: skip
    assert set(fitted) == set(plain) == {(0, "mlp_out"), (1, "mlp_out")}
    x = draw(0, 5, 8)
    for key in plain:
        assert fitted.about["layers"][str(key[0])]["strength"] == 1  # type: ignore[index]
        torch.testing.assert_close(fitted[key](x), plain[key](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [2, None])
def test_a_map_of_the_mlps_input_is_found_and_exact(rank: int | None) -> None:
    """ΔW_g = W_g M and ΔW_u = W_u M are the linear steer M u, to all orders."""
    model = small(5)
    drawn = draw(1, 8, 8) if rank is None else draw(1, 8, 2) @ draw(2, 2, 8)
    m = 0.03 * drawn
    inner, prefix = model.model.layers[1].mlp, "model.layers.1.mlp."
    update = {
        f"{prefix}{name}.weight": getattr(inner, name).weight.detach() @ m
        for name in ("gate_proj", "up_proj")
    }
    asked = {"at": "mlp_out", "form": "linear", "rank": rank, "layers": [1]}
    fitted = fit(model, update, **asked, rounds=8, iterations=200)
    steer, said = fitted[1, "mlp_in"], fitted.about["layers"]["1"]  # type: ignore[index]
    # To first order alone the map is wrong in second order of M; Newton's rounds,
    # which square the error each, end at the rounding that LSMR was asked for.
    assert said["residual"] > 0.01
    assert said["error"] < 1e-7
    assert isinstance(steer, equiv.Affine)
    torch.testing.assert_close(steer.up @ steer.down, m, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "tokens"), [("vector", 1), ("affine", 9)])
def test_as_many_tokens_as_unknowns_are_fitted_exactly(form: str, tokens: int) -> None:
    """A vector for one token, an affine map of width 8 for 9, and no more."""
    model = small(6)
    update = equiv.Update.random(model, 0.05, seed=0)
    left = []
    for count in (tokens, tokens + 3):
        ids = torch.arange(3, 3 + count)[None]
        found = fit(model, update, ids, at="mlp_out", form=form, first_position=True)
        left.append(found.about["layers"]["0"]["residual"])  # type: ignore[index]
    assert left[0] < 1e-7
    assert left[1] > 1e-2


@settings(max_examples=10 * witness.SWEEP)
@given(mlp_cases(relative_norms=(0.1, 0.5)), st.sampled_from(["vector", "affine"]))
@torch.no_grad()
def test_it_is_never_worse_than_nothing_on_what_it_fits(case: Case, form: str) -> None:
    names = [n for n, m in case.model.named_modules() if n]
    if len(names) < 2:
        return
    fitted = equiv.fit_downstream(
        case.model, case.update, case.inputs, site=names[0], at="output", form=form,
        rank=1, rounds=2, iterations=30, dtype=F64,
    )  # fmt: skip
    tuned = torch.func.functional_call(
        case.model, witness.moved(case.model, case.update, 1.0), case.inputs
    )
    with equiv.steer(case.model, fitted):
        steered = case.model(case.inputs)
    base = case.model(case.inputs)
    left = float((tuned - steered).norm() / (tuned - base).norm())
    assert left <= 1 + 1e-12
    said = fitted.about["layers"]["0"]  # type: ignore[index]
    assert said["error"] == pytest.approx(left, abs=1e-9)
    assert bool(fitted) == (said["strength"] > 0)


def test_padding_changes_nothing() -> None:
    model = small(7)
    update = equiv.Update.random(model, 0.05, seed=0)
    short = [IDS[0], IDS[1, :3], IDS[2, :4]]
    padded = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, ids in enumerate(short):
        padded[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    asked = {"site": "attn_out", "at": (1, "mlp_out"), "form": "vector"}
    found = fit(model, update, {"input_ids": padded, "attention_mask": mask}, **asked)
    alone = fit(model, update, [ids[None] for ids in short], **asked)
    for name in ("residual", "error"):
        one, other = (f.about["layers"]["0"][name] for f in (found, alone))  # type: ignore[index]
        assert one == pytest.approx(other, rel=1e-6)


def test_nothing_is_left_behind_and_the_rest_is_said() -> None:
    model = small(8, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=0)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.train()
    found = equiv.fit_downstream(
        model, update, IDS, site="attn_out", at="logits", rank=None, iterations=5
    )
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(found) <= {(0, "attn_out"), (1, "attn_out")}
    assert (found.about["target"], found.about["at"]) == ("downstream", "logits")
    assert set(found.about["layers"]) == {"0", "1"}  # type: ignore[arg-type]
    json.dumps(found.about)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"site": "mlp_out", "at": "mlp_in"}, equiv.SiteError, "to come after mlp_out"),
        ({"at": "mlp_in"}, equiv.SiteError, "to come after mlp_in"),
        ({"at": (0, "mlp_out"), "layers": [1]}, equiv.SiteError, "of layer 1"),
        ({"at": (7, "mlp_out")}, equiv.SiteError, "Expected a layer in 0…1"),
        ({"at": "nowhere"}, equiv.SiteError, "Expected a site in"),
        ({"at": 3}, equiv.SiteError, "Expected a pair"),
        ({"site": "nowhere"}, equiv.SiteError, "Expected a site in"),
        ({"form": "mlp"}, equiv.ArgumentError, "vector, linear, affine"),
        ({"rank": 0}, equiv.ArgumentError, "`rank`"),
        ({"ridge": -1}, equiv.ArgumentError, "`ridge`"),
        ({"rounds": 0}, equiv.ArgumentError, "`rounds`"),
        ({"iterations": 0}, equiv.ArgumentError, "`iterations`"),
        ({"dtype": torch.float16}, equiv.ArgumentError, "`dtype`"),
        ({"layers": [2]}, equiv.SiteError, "`layers`"),
    ],
)
def test_wrong_calls_say_so(asked, error, says) -> None:  # type: ignore[no-untyped-def]
    model = small(8)
    update = equiv.Update.random(model, 0.05, seed=0)
    with pytest.raises(error, match=says):
        equiv.fit_downstream(model, update, IDS, **asked)


def test_a_model_without_logits_is_told() -> None:
    model = small(8).model
    update = equiv.Update.random(model, 0.05, seed=0)
    with pytest.raises(equiv.SiteError, match="no logits: pass at='output'"):
        equiv.fit_downstream(model, update, IDS, at="logits")
    found = equiv.fit_downstream(model, update, IDS, at="output", form="vector")
    assert set(found.about["layers"]) == {"0", "1"}  # type: ignore[arg-type]
