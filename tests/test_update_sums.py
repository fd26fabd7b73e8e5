"""Sums of updates: what `+`, `−` and a factor give, entry by entry, and in words."""

from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
import torch
import witness
from hypothesis import given, settings
from torch import Tensor

import equiv
from equiv.testing.models import transformer
from equiv.update.entries import Deferred, Entry
from equiv.update.low_rank import Delta, LowRank
from equiv.update.sources import resolve

SHAPES = {"a.weight": (4, 3), "b.weight": (3, 3), "b.bias": (3,)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def updates(draw: st.DrawFn) -> equiv.Update:
    """Some of three parameters, each dense in any dtype, in factors, or deferred."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    deltas: dict[str, Delta] = {}
    for name in names:
        shape = SHAPES[name]
        if len(shape) == 2 and draw(st.booleans()):
            rank = draw(st.integers(1, 4))
            left = torch.randn(shape[0], rank, generator=generator)
            deltas[name] = LowRank(
                left, torch.randn(rank, shape[1], generator=generator)
            )
        else:
            made = torch.randn(shape, generator=generator)
            deltas[name] = made.to(draw(st.sampled_from(DTYPES)))
    update = equiv.Update.from_dict(deltas, source=draw(st.sampled_from("xyz")))
    return deferred(update) if draw(st.booleans()) else update


def deferred(update: equiv.Update) -> equiv.Update:
    def later(delta: Delta) -> Entry:
        return Entry(lambda: delta, tuple(delta.shape))

    entries = {name: later(delta) for name, delta in update.deltas.items()}
    return equiv.Update(Deferred(entries), {}, update.source)


def sum_of(terms: list[tuple[float, equiv.Update]]) -> dict[str, Tensor]:
    """Dense in float64, by the definition."""
    found: dict[str, Tensor] = {}
    for factor, update in terms:
        for name, value in witness.dense(update).items():
            found[name] = found.get(name, torch.zeros_like(value)) + factor * value
    return found


def same(update: equiv.Update, expected: Mapping[str, Tensor]) -> None:
    found = witness.dense(update)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Products of at most 4 terms near 1, added in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-13)
    norm = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
    # ‖L₁R₁ − L₂R₂‖ from factors loses half the digits where the two cancel.
    assert update.norm() == pytest.approx(norm, rel=1e-12, abs=1e-6)


@settings(max_examples=60 * witness.SWEEP)
@given(updates(), updates(), st.floats(-3, 3), st.floats(-3, 3))
def test_sums_are_entry_by_entry(
    a: equiv.Update, b: equiv.Update, s: float, t: float
) -> None:
    same(a + b, sum_of([(1, a), (1, b)]))
    same(a - b, sum_of([(1, a), (-1, b)]))
    same(-a, sum_of([(-1, a)]))
    same(s * a + b * t, sum_of([(s, a), (t, b)]))
    same(a - (b + a), sum_of([(1, a), (-1, b), (-1, a)]))


@settings(max_examples=30 * witness.SWEEP)
@given(updates(), updates())
def test_factors_stay_factors(a: equiv.Update, b: equiv.Update) -> None:
    total = a - 0.5 * b
    for name, delta in total.deltas.items():
        parts = [u.deltas[name] for u in (a, b) if name in u.deltas]
        low = [part for part in parts if isinstance(part, LowRank)]
        assert isinstance(delta, LowRank) == (len(low) == len(parts))
        if isinstance(delta, LowRank):
            assert delta.left.shape[1] == sum(part.left.shape[1] for part in low)
    lazy = any(isinstance(u.deltas, Deferred) for u in (a, b))
    assert isinstance(total.deltas, Deferred) == lazy


def test_a_half_precision_update_is_scaled_in_float64() -> None:
    update = equiv.Update.from_dict({"w": torch.full((2,), 1.0, dtype=torch.bfloat16)})
    assert float(witness.dense(0.3 * update)["w"][0]) == 0.3


def test_sources_are_said_in_words() -> None:
    a, b, c = (
        equiv.Update.from_dict({"w": torch.ones(2)}, source=name) for name in "abc"
    )
    assert (a + 0.5 * b).source == "a + 0.5 × b"
    assert (a - (b + c)).source == "a − (b + c)"
    assert (2 * (a - b)).source == "2 × (a − b)"
    assert (-a).source == "−a"
    assert (-(a + b)).source == "−(a + b)"
    assert (a + b).restricted(names="w").source == "part of (a + b)"


def test_updates_of_different_models_do_not_add() -> None:
    a = equiv.Update.from_dict({"w": torch.ones(2, 3)})
    b = equiv.Update.from_dict({"w": torch.ones(3, 4)})
    for first, second in ((a, b), (a, deferred(b))):
        with pytest.raises(equiv.UpdateMismatchError, match=r"\(2, 3\).*\(3, 4\)"):
            (first + second).norm()
    with pytest.raises(TypeError):
        _ = a + 1  # pyright: ignore
    with pytest.raises(equiv.ArgumentError, match="finite number"):
        _ = a * "x"  # pyright: ignore


def test_factors_from_a_folder_find_their_direction() -> None:
    """A folder holds them as for a `Linear`; GPT-2's weights are the other way."""
    left, right = torch.randn(6, 2), torch.randn(2, 4)
    stored = equiv.Update.from_dict({"w": LowRank(left, right, as_linear=True)})
    linear = equiv.Update.from_dict({"w": torch.randn(6, 4)})
    conv = equiv.Update.from_dict({"w": torch.randn(4, 6)})
    product = left.double() @ right.double()
    for other, expected in ((linear, product), (conv, product.T)):
        for total in (stored + other, other + stored):
            found = witness.dense(total)["w"] - witness.dense(other)["w"]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    square = equiv.Update.from_dict({"w": LowRank(left, left.T, as_linear=True)})
    with pytest.raises(equiv.UpdateError, match="which side of this square weight"):
        _ = square + equiv.Update.from_dict({"w": torch.ones(6, 6)})
    assert isinstance((square + square).deltas["w"], LowRank)


def test_a_sum_is_measured_like_any_update() -> None:
    base = transformer("gpt2", seed=0)
    a = equiv.Update.random(base, 0.01, seed=1)
    out, inside = 16, 24
    name = "transformer.h.0.mlp.c_proj.weight"  # [24, 16], from 24 to 16
    factors = LowRank(torch.randn(out, 2), torch.randn(2, inside), as_linear=True)
    total = 0.5 * a + equiv.Update.from_dict({name: factors})
    lazy = 0.5 * deferred(a) + equiv.Update.from_dict({name: factors})
    part = a.restricted(names="*ln_1*")
    mixed = deferred(part) + equiv.Update.from_dict({name: factors})
    for update, expected in (
        (total, sum_of([(0.5, a)])),
        (lazy, sum_of([(0.5, a)])),
        (mixed, sum_of([(1, part)])),
    ):
        found = witness.dense(resolve(base, update))
        expected[name] = expected.get(name, 0) + factors.dense().T
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)
