"""Every form: its size, its fit, and what it may stand for."""

import numpy as np
import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equiv
from equiv.steering.fits.fitter import RIDGES
from equiv.steering.fits.mlp_fit import as_mlp, fit_mlp
from equiv.steering.fits.moments import Moments, Regression
from equiv.steering.fits.plan import Planned
from equiv.steering.forms.mlp import ACTIVATIONS
from equiv.testing.models import transformer
from equiv.testing.strategies import seeds

IDS = torch.randint(3, 32, (16, 7), generator=torch.Generator().manual_seed(0))


def tokens(seed: int, n: int = 80, d: int = 5) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=source).double() + 1
    w, v = (torch.randn(d, d, generator=source).double() for _ in range(2))
    return x, torch.tanh(x @ w) @ v + 0.3


def left(x: Tensor, y: Tensor, steering: equiv.Steering) -> float:
    return float((y - steering(x)).square().sum())


# Public configurations: width, layers, and the total number of parameters, which the
# paper's shares are of.
PAPER = {
    "Llama-3.2-1B": (2048, 16, 1_235_814_400, "0.0424", "0.0027"),
    "Gemma-3-1B": (1152, 26, 999_885_952, "0.0479", "0.0030"),
    "Qwen3-4B": (2560, 36, 4_022_468_096, "0.0367", "0.0023"),
    "Llama-3.1-8B": (4096, 32, 8_030_261_248, "0.0261", "0.0016"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_shares(name: str) -> None:
    """2 r d L for the linear adapter of rank 8, (2 r d + r) L for LoReFT, d L."""
    d, layers, total, adapter, vector = PAPER[name]

    def share(*steers: equiv.Steering) -> str:
        return f"{100 * layers * sum(s.num_parameters for s in steers) / total:.4f}"

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    assert share(equiv.Affine(meta(8, d), meta(d, 8))) == adapter
    assert share(equiv.LowRankMLP(meta(8, d), meta(d, 8))) == adapter
    assert share(equiv.Vector(meta(d))) == vector
    reft = equiv.LoReFT(meta(8, d), meta(8, d), meta(8))
    assert reft.num_parameters == 2 * 8 * d + 8


def test_the_totals_are_those_of_the_models() -> None:
    """Counted on the meta device, for the two Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, inner, heads, tied in (
        ("Llama-3.2-1B", 8192, 32, True),
        ("Llama-3.1-8B", 14336, 32, False),
    ):
        d, layers, total, *_ = PAPER[name]
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=d,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=d // heads,
            tie_word_embeddings=tied,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.tie_weights()
        assert sum(p.numel() for p in model.parameters()) == total


@settings(max_examples=15 * witness.SWEEP)
@given(seeds(), st.integers(1, 5))
def test_linear_and_loreft_are_the_best_of_their_kind(seed: int, rank: int) -> None:
    """Against numpy's SVD of the least-squares fit, without and with a row of ones."""
    x, y = tokens(seed)
    for form, columns in (
        ("linear", x),
        ("loreft", torch.cat([x, x[:, :1] * 0 + 1], 1)),
    ):
        fitted = equiv.fit(x, y, form=form, rank=rank, ridge=0.0)
        a, b = columns.numpy(), y.numpy()
        full = np.linalg.lstsq(a, b, rcond=None)[0]
        _, _, right = np.linalg.svd(a @ full, full_matrices=False)
        best = a @ full @ right[:rank].T @ right[:rank]
        np.testing.assert_allclose(fitted(x).numpy(), best, rtol=1e-6, atol=1e-7)
        moments = Moments()
        moments.add(x, y)
        assert moments.misfit(fitted) == pytest.approx(
            left(x, y, fitted) / float(y.square().sum()), rel=1e-8, abs=1e-12
        )
    assert isinstance(fitted, equiv.LoReFT)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(fitted.rotation @ fitted.rotation.T, eye)


def test_heads_are_a_regression_per_coordinate() -> None:
    x, y = tokens(3, d=6)
    fitted = equiv.fit(x, y, form="heads", num_heads=2, ridge=0.0)
    for i in range(6):
        slope, offset = np.polyfit(x[:, i].numpy(), y[:, i].numpy(), 1)
        expected = slope * x[:, i] + offset
        torch.testing.assert_close(fitted(x)[:, i], expected)
    with pytest.raises(equiv.ArgumentError, match="4 heads"):
        equiv.fit(x, y, form="heads", num_heads=4)


@settings(max_examples=15 * witness.SWEEP)
@given(seeds(), st.integers(1, 4), st.integers(0, 4))
def test_loreft_and_affine_are_each_other(seed: int, rank: int, zeros: int) -> None:
    source = torch.Generator().manual_seed(seed)
    shapes = ((rank, 5), (5, rank))
    down, up = (torch.randn(*s, generator=source).double() for s in shapes)
    down[: min(zeros, rank)] = 0  # rank-deficient, down to nothing at all
    inside = up @ torch.randn(rank, generator=source).double()
    h = torch.randn(9, 5, generator=source).double()
    for bias, most in (
        (None, rank),
        (inside, rank),
        (torch.randn(5, generator=source), rank + 1),
    ):
        affine = equiv.Affine(down, up, bias).to("cpu", torch.float64)
        made = equiv.LoReFT.from_affine(affine)
        assert made.rank <= max(most, 1)
        torch.testing.assert_close(made(h), affine(h), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(made.affine()(h), affine(h), rtol=1e-9, atol=1e-9)
        half = made.scaled(0.5)
        torch.testing.assert_close(half(h), 0.5 * affine(h), rtol=1e-9, atol=1e-9)


@settings(max_examples=8 * witness.SWEEP)
@given(seeds(), st.sampled_from(tuple(ACTIVATIONS)), st.integers(1, 3))
def test_a_low_rank_mlp_is_never_worse_than_the_affine_map(
    seed: int, activation: str, rank: int
) -> None:
    x, y = tokens(seed)
    moments = Moments()
    moments.add(x, y)
    affine = Regression(moments, 1e-3).affine(rank)
    found = fit_mlp(x, y, affine, activation, 1e-3)
    total = float(y.square().sum())
    assert left(x, y, found.steering) <= left(x, y, affine) + 1e-8 * total
    assert found.misfit == pytest.approx(left(x, y, found.steering) / total)
    # Where the shift is affine nothing can be gained, and the map itself comes back.
    exact = fit_mlp(x, affine(x), affine, activation, 0.0)
    assert left(x, affine(x), exact.steering) <= 1e-8 * total
    same = as_mlp(affine, x, activation)
    torch.testing.assert_close(same(x), affine(x), rtol=1e-6, atol=1e-6)


def test_silu_is_half_a_linear_map_at_small_arguments() -> None:
    """Relative deviation ∝ ‖down h‖: halved when the arguments are."""
    source = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*s, generator=source).double() for s in ((2, 4), (4, 2)))
    h = torch.randn(20, 4, generator=source).double()
    gaps = []
    for size in (1e-3, 5e-4):
        half = equiv.Affine(down * size, up / 2)(h)
        mlp = equiv.LowRankMLP(down * size, up)(h)
        gaps.append(float((mlp - half).norm() / half.norm()))
    assert gaps[0] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=1e-2)
    assert not equiv.LowRankMLP.zero(4, rank=2)(h.float()).any()


def test_a_module_is_fitted_as_a_copy() -> None:
    x, y = tokens(1)
    module = nn.Linear(5, 5, dtype=torch.float64)
    before = module.weight.clone()
    fitted = equiv.fit(x, y, form=module)
    assert isinstance(fitted, equiv.Custom) and fitted.num_parameters == 30
    best = equiv.fit(x, y, rank=None, ridge=0.0)
    assert left(x, y, fitted) == pytest.approx(left(x, y, best), rel=1e-3)
    assert torch.equal(module.weight, before)
    with pytest.raises(equiv.ArgumentError, match="can be steered with, not"):
        equiv.fit(x, y, form=torch.tanh)  # type: ignore[arg-type]


def test_what_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from equiv.steering.fits import lbfgs

    whole = lbfgs.minimise
    monkeypatch.setattr(
        "equiv.steering.fits.gradient_fit.minimise",
        lambda parts, loss: whole(parts, loss, iterations=1),
    )
    x, y = tokens(1)
    with pytest.warns(equiv.NotConvergedWarning, match="did not converge"):
        equiv.fit(x, y, form=nn.Linear(5, 5))


def test_the_ridge_is_the_one_that_leaves_least_elsewhere() -> None:
    x, y = tokens(2, n=24)
    y = (
        y
        + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    choosing, fitting = drawn[:6], drawn[6:]

    def elsewhere(ridge: float) -> float:
        made = equiv.fit(x[fitting], y[fitting], ridge=ridge)
        return left(x[choosing], y[choosing], made)

    best = min(RIDGES, key=elsewhere)
    expected = equiv.fit(x, y, ridge=best)
    chosen = equiv.fit(x, y, ridge=None)
    torch.testing.assert_close(chosen(x), expected(x))


def test_a_plan_is_fitted_steer_by_steer() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    plan = [
        Planned(1, "block_out", "affine", 2),
        Planned(0, "attn_out", "vector", None),
        Planned(1, "attn_heads", "heads", None),
    ]
    fitted = equiv.fit_sequential(model, update, IDS, plan=plan, dtype=torch.float64)
    assert list(fitted) == [(0, "attn_out"), (1, "attn_heads"), (1, "block_out")]
    one = fitted[1, "attn_heads"]
    assert isinstance(one, equiv.Heads) and one.num_heads == 2
    # The last steer sees what the earlier ones leave: of the same plan without it.
    first = {key: fitted[key] for key in list(fitted)[:2]}
    call = {"input_ids": IDS}
    with witness.own_arithmetic(), torch.no_grad(), equiv.steer(model, first):
        before = witness.activations(model, witness.parameters(model), call)
    tuned = witness.tuned_activations(model, update, call)
    x = before[1, "block_out"]
    told = fitted.about["fits"]
    assert isinstance(told, dict)
    own = equiv.fit(
        x,
        tuned[1, "block_out"] - x,
        rank=2,
        ridge=told["1/block_out"]["ridge"],
    )
    last = fitted[1, "block_out"]
    torch.testing.assert_close(last(x), own(x), rtol=1e-5, atol=1e-6)
    twice = [*plan, Planned(1, "resid_mid->block_out", "vector", None)]
    with pytest.raises(equiv.ArgumentError, match="one steer for each site"):
        equiv.fit_sequential(model, update, IDS, plan=twice)


@pytest.mark.parametrize("scope", ["local", "propagated"])
def test_simultaneous_fits_make_the_shift_of_the_unsteered_stream(scope: str) -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    fitted = equiv.fit_sequential(
        model,
        update,
        IDS,
        form="vector",
        order="simultaneous",
        scope=scope,
        dtype=torch.float64,
    )
    shifts = equiv.shifts(model, update, IDS, dtype=torch.float64)
    for layer in (0, 1):
        s = shifts[layer, "block_out"]
        shift = s.local_exact if scope == "local" else s.exact
        vector = fitted[layer, "block_out"]
        assert isinstance(vector, equiv.Vector)
        torch.testing.assert_close(vector.vector, shift.flatten(0, 1).mean(0))


def test_every_form_is_fitted_to_a_model() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.1, seed=2)
    for form in ("vector", "linear", "affine", "loreft", "mlp"):
        fitted = equiv.fit_steering(model, update, IDS, form=form, rank=2)
        found = equiv.evaluate(model, update, IDS, fitted)
        assert len(fitted) == 2 and found.recovered and found.recovered > 0, form
    with pytest.raises(equiv.ArgumentError, match="Expected `at`"):
        equiv.fit_steering(model, update, IDS, at="logits")


def test_a_set_knows_its_positions() -> None:
    steer = {(0, "block_out"): equiv.Vector(torch.ones(2))}
    words = "last 3 + generated"
    assert equiv.SteeringSet(steer, positions=words).positions == words
    with pytest.raises(equiv.ArgumentError, match="Expected `positions` in"):
        equiv.SteeringSet(steer, positions="middle")
