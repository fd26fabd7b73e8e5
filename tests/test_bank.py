"""Banks of many steers: what `rows` specifies, from one launch per form and site."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import gamma, smallest, unit
from steered import llama, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import equiv
from equiv import Affine, Custom, Heads, LoReFT, LowRankMLP, Steering, Vector
from equiv.steering.applying.bank import StackedBank
from equiv.steering.applying.placed import Placed
from equiv.steering.applying.rows import steered_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def drawn(number: int, d: int, dtype: torch.dtype, size: float = 0.3) -> Steering:
    """One of every form in turn, of different ranks, with and without each bias.

    Of 48, each form, activation and choice of biases occurs twice or more.
    """
    source, turn = torch.Generator().manual_seed(number), number // 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    r = 1 + turn % 5
    down, up = normal(r, d) / d**0.5, size * normal(d, r) / r**0.5
    rotation = torch.linalg.qr(normal(d, min(r, d)).double())[0].T.to(dtype)
    kinds = (
        lambda: Vector(size * normal(d)),
        lambda: Affine(down, up, normal(d) if turn % 2 else None),
        lambda: LoReFT(rotation, normal(len(rotation), d), normal(len(rotation))),
        lambda: LowRankMLP(
            down,
            up,
            normal(r) if turn % 2 else None,
            normal(d) if turn // 2 % 2 else None,
            ("silu", "tanh")[turn // 4 % 2],
        ),
        lambda: Heads(scale=normal(1, d)),
        lambda: Custom(nn.Tanh()),
    )
    return kinds[number % len(kinds)]()


def placed(forms: dict[int, Steering], read: str = "x") -> dict[int, dict[str, Placed]]:
    return {n: {read: Placed(form, (0, read))} for n, form in forms.items()}


def tolerance(
    h: Tensor, x: Tensor, forms: dict[int, Steering], index: Tensor, expected: Tensor
) -> Tensor:
    """What two ways of summing one formula may differ by, each off by its own bound.

    Of a form that is no map of low rank, both ways are the same computation.
    """
    u = unit(torch.promote_types(h.dtype, torch.float32))
    found = torch.zeros_like(h, dtype=torch.float64)
    for row, number in enumerate(index.tolist()):
        form = forms.get(number)
        if form is None:
            continue
        x_abs, base = x[row].double().abs(), h[row].double().abs()
        size, d = _size(form, x_abs), x.shape[-1]
        # γ(d) of the first product through the second, γ(r) of the second; φ and the
        # folded bias cost some more units.
        off = (2 * gamma(d + 8, u) + 16 * u) * (size + base)
        y = expected[row].double().abs()
        found[row] = 2 * off + 2 * unit(h.dtype) * (y + off)
    return found + 2 * smallest(h.dtype)


def _size(form: Steering, x: Tensor) -> Tensor:
    """No sum on the way to the shift is larger, by component."""
    if isinstance(form, LoReFT):
        down = form.weight.double().abs() + form.rotation.double().abs()
        return (down @ x + form.bias.double().abs()) @ form.rotation.double().abs()
    if isinstance(form, Affine | LowRankMLP):
        z = form.down.double().abs() @ x
        if isinstance(form, LowRankMLP) and form.inner is not None:
            z = z + form.inner.double().abs()
        bias = 0 if form.bias is None else form.bias.double().abs()
        return 1.13 * form.up.double().abs() @ z + bias
    return form.to("cpu", torch.float64)(x).abs() + x


@given(
    numbers=st.lists(st.integers(0, 47), min_size=2, max_size=30, unique=True),
    d=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    per_token=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_a_stacked_bank_is_the_specified_one(
    numbers: list[int],
    d: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    per_token: bool,
    seed: int,
) -> None:
    """Numbers that are missing in the bank, or −1, keep their bits."""
    source = torch.Generator().manual_seed(seed)
    h, x = torch.randn(2, 6, 3, d, generator=source).to(dtype)
    forms = {number: drawn(number, d, stored) for number in numbers}
    index = torch.randint(len(numbers) + 2, (6, 3)[: 1 + per_token], generator=source)
    index = torch.tensor([-1, 61, *numbers])[index]
    bank = StackedBank(placed(forms), 62)
    used = [*numbers, 61]
    found = bank.steered(h, {"x": x}, used, index)
    expected = steered_rows(h, {"x": x}, placed(forms), index)
    full = index if per_token else index[:, None].expand(6, 3)
    flat = [t.flatten(0, 1) for t in (h, x, expected)]
    bound = tolerance(flat[0], flat[1], forms, full.flatten(), flat[2])
    off = (found.double() - expected.double()).abs().flatten(0, 1)
    assert bool((off <= bound).all())
    none = ~torch.isin(full, torch.tensor(numbers))
    assert torch.equal(found[none], h[none])
    # A row alone: the same bits as among the others.
    for row in range(6):
        own = torch.where(torch.arange(6) == row, index.movedim(0, -1), -1).movedim(
            -1, 0
        )
        alone = bank.steered(h, {"x": x}, used, own)
        assert torch.equal(alone[row], found[row])


class Launches(TorchDispatchMode):
    """Counts the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "equiv":
            self.calls[func._schema.name.removeprefix("equiv::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Counter[str]]:
    with Launches() as mode:
        yield mode.calls


@torch.no_grad()
def test_hundreds_of_steers_are_one_launch_per_site() -> None:
    """Affine maps of ranks 1 to 5 and LoReFT are one form; vectors another."""
    model = llama()
    forms = [n for n in range(600) if n % 6 in (1, 2)]
    bank = [
        {
            (0, "block_out"): drawn(n, 16, torch.float32),
            (1, "mlp_out"): Vector(random(16, seed=n)),
        }
        for n in forms
    ]
    ids = torch.randint(3, 30, (12, 5), generator=torch.Generator().manual_seed(0))
    index = [*range(0, 200, 20), -1, -1]
    plain = model(input_ids=ids).logits
    with equiv.steer(model, bank, index=index), launches() as calls:
        found = model(input_ids=ids).logits
    affine = [n for n in forms if n % 6 == 1]
    assert len(affine) == 100 and len(bank) == 200
    # LoReFT's W − R is not exact in the dtype of its tensors, so it has its own group.
    assert calls == {"low_rank": 2, "vector_shift": 1}
    assert torch.equal(found[-2:], plain[-2:])
    for row, number in enumerate(index[:-2]):
        with equiv.steer(model, bank[number]):
            alone = model(input_ids=ids).logits[row]
        # Some tens of roundings through one block and the head.
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[row], plain[row], rtol=1e-2)


@pytest.mark.parametrize("stored", [torch.float32, None], ids=["float32", "its own"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_site_is_within_the_bound(
    dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    """At the first steered site of a live model both ways start from the same bits."""
    model = llama(dtype)
    forms = {n: drawn(n, 16, stored or dtype) for n in range(48)}
    bank = [{(0, "block_out"): form} for form in forms.values()]
    ids = torch.randint(3, 30, (48, 4), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def run() -> Tensor:
        handle = model.model.layers[0].register_forward_hook(
            lambda _m, _a, out: seen.append(out)
        )
        model(input_ids=ids)
        handle.remove()
        return seen[-1]

    h = run()
    for positions in ("all", "last 2"):
        with equiv.steer(model, bank, index=range(48), positions=positions):
            found = run()
        for n, member in enumerate(bank):
            with equiv.steer(model, member, positions=positions):
                alone = run()[n]
            bound = tolerance(h[n], h[n], forms, torch.full((4,), n), alone)
            assert bool(((found[n].double() - alone.double()).abs() <= bound).all()), n
        if positions == "last 2":
            assert torch.equal(found[:, :2], h[:, :2])


@torch.no_grad()
def test_autocast_does_not_reach_a_bank() -> None:
    layer, h = nn.Sequential(nn.Identity()), random(8, 16)
    bank = [{(0, "0"): drawn(n, 16, torch.float32)} for n in (1, 7, 13, 19)]
    with equiv.steer(layer, bank, index=[0, 1, 2, 3] * 2):
        expected = layer(h)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(h), expected)


def test_derivatives_pass_through_a_bank() -> None:
    """Reverse and forward mode, against the steers one by one."""
    layer, h = nn.Sequential(nn.Identity()), random(6, 16).double()
    bank = [{(0, "0"): drawn(n, 16, torch.float64)} for n in (1, 3, 7, 9, 13, 0)]
    direction = random(6, 16, seed=1).double()

    def whole(h: Tensor) -> Tensor:
        with equiv.steer(layer, bank, index=range(6)):
            return layer(h)

    def single(h: Tensor) -> Tensor:
        return torch.stack([h[n] + m[0, "0"](h[n]) for n, m in enumerate(bank)])

    for function in (torch.func.jvp, torch.func.vjp):
        if function is torch.func.jvp:
            found, expected = (
                torch.func.jvp(f, (h,), (direction,))[1] for f in (whole, single)
            )
        else:
            found, expected = (
                torch.func.vjp(f, h)[1](direction)[0] for f in (whole, single)
            )
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_bank_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = llama()
    bank = [
        {(0, "block_out"): drawn(n, 16, torch.float32)} for n in (1, 3, 7, 9, 13, 19)
    ]
    ids = torch.randint(3, 30, (6, 5), generator=torch.Generator().manual_seed(0))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with equiv.steer(model, bank, index=range(6)):
        expected = model(input_ids=ids, use_cache=False).logits
        found = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_what_is_trained_is_not_stacked() -> None:
    """Its values may change from one forward to the next."""
    layer, h = nn.Sequential(nn.Identity()), random(2, 16)
    v = random(16, seed=1).requires_grad_()
    bank = [{(0, "0"): Vector(v)}, {(0, "0"): Vector(random(16, seed=2))}]
    with equiv.steer(layer, bank, index=[0, 1]):
        layer(h)[0].sum().backward()
        assert v.grad is not None and torch.equal(v.grad, torch.ones(16))
        with torch.no_grad():
            v += 1
            assert torch.equal(layer(h)[0], h[0] + v)
