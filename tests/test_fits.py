"""Closed-form fits against numpy's reduced-rank regression, and closed forms."""

import numpy as np
import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st

import equiv
from equiv.steering.fits.moments import Moments, Regression
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.vector import Vector
from equiv.testing.models import mlp, transformer
from equiv.testing.strategies import seeds


def data(seed: int, n: int = 60, d: int = 5, e: int | None = None) -> tuple:
    source = np.random.default_rng(seed)
    mixing = source.normal(size=(d, d))
    x = source.normal(size=(n, d)) @ mixing + source.normal(size=d)
    y = np.tanh(x) @ source.normal(size=(d, e or d)) + source.normal(size=e or d)
    return x, y


@settings(max_examples=50 * witness.SWEEP)
@given(seeds(), st.integers(1, 5), st.sampled_from([0.0, 1e-3, 0.5]))
def test_affine_fit_is_reduced_rank_regression(
    seed: int, rank: int, ridge: float
) -> None:
    x, y = data(seed)
    weight, bias = witness.reduced_rank_regression(x, y, rank, ridge)
    fitted = equiv.fit(torch.tensor(x), torch.tensor(y), rank=rank, ridge=ridge)
    np.testing.assert_allclose(
        fitted(torch.tensor(x)).numpy(), x @ weight + bias, rtol=1e-6, atol=1e-7
    )


@settings(max_examples=20 * witness.SWEEP)
@given(seeds(), st.integers(1, 4))
def test_no_other_map_of_that_rank_fits_better(seed: int, rank: int) -> None:
    x, y = data(seed)
    tx, ty = torch.tensor(x), torch.tensor(y)
    best = equiv.fit(tx, ty, rank=rank, ridge=0.0)
    assert isinstance(best, Affine)
    assert best.rank == rank

    def misfit(steering: Affine) -> float:
        return float((ty - steering(tx)).square().sum())

    generator = torch.Generator().manual_seed(seed)
    for part in ("down", "up", "bias"):
        for size in (1e-3, 1e-1):
            noise = size * torch.randn(
                getattr(best, part).shape, generator=generator, dtype=torch.float64
            )
            moved = {p: getattr(best, p) for p in ("down", "up", "bias")}
            moved[part] = moved[part] + noise
            assert misfit(Affine(**moved)) >= misfit(best)


@settings(max_examples=20 * witness.SWEEP)
@given(seeds())
def test_the_vector_is_the_mean_shift(seed: int) -> None:
    x, y = data(seed)
    fitted = equiv.fit(torch.tensor(x), torch.tensor(y), form="vector")
    assert isinstance(fitted, Vector)
    np.testing.assert_allclose(fitted.vector.numpy(), y.mean(0), atol=1e-12)


@settings(max_examples=20 * witness.SWEEP)
@given(seeds(), st.sampled_from(["vector", "affine"]), st.sampled_from([1, 3, None]))
def test_misfit_from_moments_is_the_misfit(
    seed: int, form: str, rank: int | None
) -> None:
    x, y = data(seed, n=120)
    (xf, xh), (yf, yh) = np.split(x, 2), np.split(y, 2)
    fitting, held = Moments(), Moments()
    for chunk in np.array_split(np.arange(60), 4):  # in pieces, as batches come
        fitting.add(torch.tensor(xf[chunk]), torch.tensor(yf[chunk]))
        held.add(torch.tensor(xh[chunk]), torch.tensor(yh[chunk]))
    steering = Regression(fitting).form(form, rank)
    left = yh - steering(torch.tensor(xh)).numpy()
    expected = (left**2).sum() / (yh**2).sum()
    assert held.misfit(steering) == pytest.approx(expected, rel=1e-8)


def test_masked_tokens_and_sinks_are_left_out() -> None:
    x, y = data(0, n=24)
    h, shift = torch.tensor(x).view(4, 6, 5), torch.tensor(y).view(4, 6, 5)
    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    mask[1, 0] = 0  # padded on the left: its first token is the second
    poisoned = h.clone(), shift.clone()
    for tensor in poisoned:
        tensor[:, 4:] = 1e6
        tensor[:, 0] = -1e6
        tensor[1, 1] = 1e6
    clean = equiv.fit(h, shift, rank=2, mask=mask, first_position=False)
    assert torch.equal(clean(h), equiv.fit(*poisoned, rank=2, mask=mask)(h))
    kept = torch.cat([h[0, 1:4], h[1, 2:4], h[2, 1:4], h[3, 1:4]])
    aims = torch.cat([shift[0, 1:4], shift[1, 2:4], shift[2, 1:4], shift[3, 1:4]])
    torch.testing.assert_close(equiv.fit(kept, aims, rank=2)(h), clean(h))
    # Ordinary first tokens are no sinks: they are fitted like any other.
    with_first = equiv.fit(h, shift, rank=2, mask=mask, first_position=True)
    assert torch.equal(equiv.fit(h, shift, rank=2, mask=mask)(h), with_first(h))
    assert not torch.allclose(with_first(h), clean(h))


@pytest.mark.parametrize("by_default", [True, False])
def test_sinks_are_left_out_by_default(by_default: bool) -> None:
    """First activations fifty times larger would rule the fit with their shifts."""
    x, y = data(0, n=60)
    h, shift = torch.tensor(x).view(10, 6, 5), torch.tensor(y).view(10, 6, 5)
    sunk, moved = h.clone(), shift.clone()
    sunk[:, 0] *= 50
    moved[:, 0] = 100
    rest = slice(1, None)
    clean = equiv.fit(h[:, rest].reshape(-1, 5), shift[:, rest].reshape(-1, 5), rank=2)
    first_position = None if by_default else True
    fitted = equiv.fit(sunk, moved, rank=2, first_position=first_position)
    assert torch.allclose(fitted(h), clean(h)) == by_default


def test_constant_and_degenerate_activations() -> None:
    h = torch.ones(30, 4, dtype=torch.float64)
    shift = torch.full((30, 4), 2.0, dtype=torch.float64)
    for rank in (1, 4, None):
        steering = equiv.fit(h, shift, rank=rank)
        torch.testing.assert_close(steering(h), shift)
    low = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).double()
    h = low @ torch.ones(1, 4, dtype=torch.float64)  # variance in one direction only
    torch.testing.assert_close(equiv.fit(h, 3 * h, ridge=0.0)(h), 3 * h)


def test_steering_keeps_shape_dtype_and_scale() -> None:
    x, y = data(1)
    for form in ("vector", "affine"):
        steering = equiv.fit(torch.tensor(x), torch.tensor(y), form=form, rank=2)
        h = torch.randn(2, 3, 5, dtype=torch.float32)
        assert steering(h).shape == h.shape
        assert steering(h).dtype == h.dtype
        torch.testing.assert_close(steering.scaled(0.5)(h), 0.5 * steering(h))
        assert not steering.scaled(0.0)(h).any()


def test_parameter_counts() -> None:
    x, y = data(1, d=5)
    h, shift = torch.tensor(x), torch.tensor(y)
    assert equiv.fit(h, shift, form="vector").num_parameters == 5
    assert equiv.fit(h, shift, rank=2).num_parameters == 2 * 2 * 5 + 5
    assert equiv.fit(h, shift, rank=None).num_parameters == 5 * 5 + 5


IDS = torch.randint(3, 32, (24, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def steered_shift(model, steering, layer, site):  # type: ignore[no-untyped-def]
    """The steered activation minus the base's, by plain hooks."""
    call = {"input_ids": IDS}
    base = witness.activations(model, witness.parameters(model), call)
    with equiv.steer(model, steering):
        after = witness.activations(model, witness.parameters(model), call)
    return after[layer, site] - base[layer, site]


def test_sequential_fits_see_the_steered_stream() -> None:
    """Layer by layer by hand: shift, steer below, fit what is missing."""
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    found = equiv.fit_sequential(
        model, update, IDS, rank=4, dtype=torch.float64, ridge=1e-3
    )
    assert sorted(found) == [(0, "block_out"), (1, "block_out")]
    shifts = equiv.shifts(model, update, IDS, dtype=torch.float64)
    by_hand: dict = {}
    for layer in range(2):
        s = shifts[layer, "block_out"]
        below = steered_shift(model, by_hand, layer, "block_out") if by_hand else 0
        by_hand[layer, "block_out"] = equiv.fit(
            s.base + below, s.exact - below, rank=4, ridge=1e-3
        )
        h = s.base + below
        # 1e-5: by hand the families' norms round to float32.
        torch.testing.assert_close(
            found[layer, "block_out"](h),
            by_hand[layer, "block_out"](h),
            atol=1e-4,
            rtol=1e-4,
        )


def test_sequential_steering_brings_the_model_nearer() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[0, 1])
    steering = equiv.fit_sequential(model, update, IDS, rank=8)
    exact = equiv.shifts(model, update, IDS)[1, "block_out"].exact.double()
    left = exact - steered_shift(model, steering, 1, "block_out")
    assert float(left.norm()) < float(exact.norm())


def test_layers_below_the_update_get_no_steering() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[1])
    assert list(equiv.fit_sequential(model, update, IDS)) == [(1, "block_out")]
    both = equiv.Update.random(model, 0.1, seed=2)
    chosen = equiv.fit_sequential(model, both, IDS, layers=[1], site="mlp_in")
    assert list(chosen) == [(1, "mlp_in")]


def test_fit_sequential_on_a_plain_module() -> None:
    model = mlp((4, 8, 3), dtype=torch.float32)
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    update = equiv.Update.random(model, 0.1, seed=0)
    found = equiv.fit_sequential(model, update, x, site="0", rank=None, ridge=0.0)
    s = equiv.shifts(model, update, x, sites=("0",))[0, "0"]
    # The first layer is affine in x, and x can be read off its output: exact.
    torch.testing.assert_close(found[0, "0"](s.base), s.exact, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_stream_tells_sinks_and_not_the_site() -> None:
    """A first token at which the MLP writes much, and the norm after it takes away."""
    ids = IDS.clone()
    ids[:, 0] = 1
    model = transformer("bert", seed=1)
    dense = model.bert.encoder.layer[0].output.dense
    inside: list[torch.Tensor] = []
    handle = dense.register_forward_pre_hook(lambda _m, args: inside.append(args[0]))
    model(ids)
    handle.remove()
    first, rest = inside[0][:, 0].mean(0), inside[0][:, 1:].flatten(0, 1)
    # The direction that tells the first token from the others.
    apart = torch.linalg.lstsq(torch.cov(rest.T), first - rest.mean(0)).solution
    apart /= apart @ (first - rest.mean(0))
    strong = 100 * torch.ones(16).double()
    dense.weight += torch.outer(strong, apart)
    dense.bias -= strong * (apart @ rest.mean(0))
    update = equiv.Update.random(model, 0.05, seed=2)
    shifts = equiv.shifts(model, update, ids, dtype=torch.float64)
    for site, large in (("mlp_out", True), ("block_out", False)):
        norms = torch.linalg.vector_norm(shifts[0, site].base, dim=-1)
        assert bool(norms[:, 0].mean() > 10 * norms[:, 1:].mean()) == large
    h = shifts[0, "mlp_out"].base
    found = [
        equiv.fit_sequential(
            model, update, ids, site="mlp_out", rank=2, first_position=first_position
        )[0, "mlp_out"](h)
        for first_position in (None, True, False)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
