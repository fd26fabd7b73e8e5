"""The specification of steering by row, against loops over rows and float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv import Affine, ArgumentError, LoReFT, LowRankMLP, Steering, Vector
from equiv.steering.applying.rows import steered, steered_rows
from equiv.steering.applying.tokens import numbered
from equiv.testing.models import transformer

HALF = (torch.bfloat16, torch.float16)


def forms(d: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Steering]:
    """One of each form, the ranks different."""
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    rotation = torch.linalg.qr(random(d, 2).double())[0].T.to(dtype)
    return [
        Vector(random(d)),
        Affine(random(3, d), random(d, 3), random(d)),
        LoReFT(rotation, random(2, d), random(2)),
        LowRankMLP(random(4, d), random(d, 4), random(4), random(d), "tanh"),
    ]


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6)),
    per_token=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([*HALF, torch.float32, torch.float64]),
)
def test_every_row_is_its_own_steer_alone(
    shape: tuple[int, int, int], per_token: bool, seed: int, dtype: torch.dtype
) -> None:
    """Row by row, each with the steer it was given; −1 keeps even −0, NaN and ∞."""
    source = torch.Generator().manual_seed(seed)
    h = torch.randn(shape, generator=source).to(dtype)
    special = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    h[..., 0] = special[torch.randint(3, shape[:2], generator=source)]
    x = torch.randn(shape, generator=source).to(dtype)
    bank = dict(enumerate({"x": form} for form in forms(shape[-1], seed % 1000)))
    del bank[1]  # this one adds nothing here
    rows = shape[: 2 if per_token else 1]
    index = torch.randint(-1, 4, rows, generator=source)
    found = steered_rows(h, {"x": x}, bank, index)
    for b in range(shape[0]):
        for t in range(shape[1]):
            number = int(index[b, t] if per_token else index[b])
            expected = h[b, t]
            if number in bank:
                expected = steered(h, {"x": x}, bank[number])[b, t]
            assert bits(found[b, t]) == bits(expected)


def bits(x: Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(width).tolist()


@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(2, 9))
def test_neighbours_do_not_matter(seed: int, batch: int) -> None:
    """Whatever the others get, a row's bits are those of its own steer."""
    source = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, 3, 8, generator=source)
    bank = dict(enumerate({"h": form} for form in forms(8, seed % 1000)))
    first, second = torch.randint(-1, 4, (2, batch), generator=source)
    second[0] = first[0]
    one, other = (steered_rows(h, {"h": h}, bank, i) for i in (first, second))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[first == second], other[first == second])


def bound(h: Tensor, form: Affine, dtype: torch.dtype) -> Tensor:
    """How far h + up (down h) + bias may be from exact: γₙ in float32, one rounding.

    |fl(Σₙ) − Σₙ| ≤ γₙ Σ|·|, n = d + r + 2 for both products, the bias and the sum.
    """
    assert form.bias is not None
    (r, d), eps = form.down.shape, 2.0**-24
    gamma = (d + r + 2) * eps / (1 - (d + r + 2) * eps)
    x, down, up = h.double(), form.down.double(), form.up.double()
    sizes = x.abs() @ down.abs().T @ up.abs().T + form.bias.double().abs() + x.abs()
    exact = x + x @ down.T @ up.T + form.bias.double()
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2
    return rounding + (1 + info.eps / 2) * gamma * sizes


@pytest.mark.parametrize("dtype", HALF)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.01, 3))
def test_half_precision_rounds_once(dtype: torch.dtype, seed: int, size: float) -> None:
    h, form = drawn(dtype, seed, size)
    found = steered(h, {"h": h}, {"h": form})
    assert found.dtype == dtype
    assert bool((off(found, h, form) <= bound(h, form, dtype)).all())


@pytest.mark.parametrize("dtype", HALF)
def test_the_bound_tells_one_rounding_from_two(dtype: torch.dtype) -> None:
    """What others do: the shift in half precision, or rounded to it before the sum."""
    h, form = drawn(dtype, 0, 1.0)
    half = form.to("cpu", dtype)
    for wrong in (h + form(h.float()).to(dtype), h + half(h)):
        assert bool((off(wrong, h, form) > bound(h, form, dtype)).any())


def drawn(dtype: torch.dtype, seed: int, size: float) -> tuple[Tensor, Affine]:
    source = torch.Generator().manual_seed(seed)
    h = torch.randn(16, 32, generator=source).to(dtype)
    down, up = (torch.randn(s, generator=source) for s in ((4, 32), (32, 4)))
    return h, Affine(down / 32**0.5, size * up / 2, torch.randn(32, generator=source))


def off(found: Tensor, h: Tensor, form: Affine) -> Tensor:
    exact = h.double() + form.to("cpu", torch.float64)(h.double())
    return (found.double() - exact).abs()


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_a_half_precision_model_rounds_once(dtype: torch.dtype) -> None:
    """The same bound at the site of a live model, alone and beside a second steer."""
    model = transformer("llama", dtype=dtype)
    ids = torch.randint(3, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    block = model.model.layers[0]
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(input_ids=ids)
    handle.remove()
    source = torch.Generator().manual_seed(1)
    down, up = (torch.randn(s, generator=source) for s in ((4, 16), (16, 4)))
    whole = Affine(down, up, torch.randn(16, generator=source))
    # The same map in two steers, which read the same here: one sum, one rounding.
    first = Affine(down[:2], up[:, :2], whole.bias)
    pair = {
        (0, "block_out"): first,
        (0, "mlp_out->block_out"): Recall(Affine(down[2:], up[:, 2:]), seen[0]),
    }
    for steering in ({(0, "block_out"): whole}, pair):
        with equiv.steer(model, steering):
            handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(input_ids=ids)
            handle.remove()
        assert bool(
            (off(seen[-1], seen[0], whole) <= bound(seen[0], whole, dtype)).all()
        )


class Recall:
    """A steer that reads something else than it is given."""

    def __init__(self, form: Steering, other: Tensor) -> None:
        self.form, self.other = form, other

    def __call__(self, x: Tensor) -> Tensor:
        return self.form(self.other.to(x.dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_does_not_reach_the_shift(dtype: torch.dtype) -> None:
    layer = torch.nn.Sequential(torch.nn.Identity())
    h, form = drawn(dtype, 3, 1.0)
    expected = steered(h, {"h": h}, {"h": form})
    with torch.autocast("cpu", dtype=dtype), equiv.steer(layer, {(0, "0"): form}):
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(layer(h), expected)
        assert not torch.equal(steered(h, {"h": h}, {"h": form}), expected)


@given(data=st.data())
def test_numbers_are_those_of_rows_and_masks(data: st.DataObject) -> None:
    batch, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 3))
    single = count == 1 and data.draw(st.booleans())
    rows = [0] * batch if single else data.draw(rows_of(batch, count))
    mask = st.lists(st.booleans(), min_size=batch * seq, max_size=batch * seq)
    masks: list[Tensor | bool] = [
        torch.tensor(m).reshape(batch, seq) if isinstance(m, list) else m
        for m in data.draw(
            st.lists(st.booleans() | mask, min_size=count, max_size=count)
        )
    ]
    used = [n for n in range(count) if masks[n] is not False]
    found = numbered(None if single else torch.tensor(rows), masks, used)
    found = found.reshape(*found.shape, *[1] * (2 - found.ndim)).expand(batch, seq)
    for b in range(batch):
        for t in range(seq):
            number, chosen = rows[b], False
            if number >= 0:
                own = masks[number]
                chosen = bool(own[b, t]) if isinstance(own, Tensor) else own
            # What is not used is not in the bank: any such number is none.
            assert (int(found[b, t]) in used) == chosen
            assert not chosen or int(found[b, t]) == number


def rows_of(batch: int, count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-1, count - 1), min_size=batch, max_size=batch)


@pytest.mark.parametrize(
    "wrong",
    [lambda h: h[0], lambda h: None, lambda h: h[..., :1]],
    ids=["row", "nothing", "narrow"],
)
def test_a_shift_of_another_shape_is_refused(wrong: Callable) -> None:
    h = torch.zeros(2, 3, 4)
    with pytest.raises(ArgumentError, match=r"shaped as the activations, \(2, 3, 4\)"):
        steered_rows(h, {"h": h}, {0: {"h": wrong}}, torch.zeros(2))
