"""Batched shifts, reference and interpreted kernel, against loops over rows in float64.

The tolerance is the a-priori bound of `kernel_bounds`; what gets no steer keeps its
bits.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import Case, bound, exact, vector_bound
from torch import Tensor

from equiv import ArgumentError, kernels
from equiv.kernels import reference
from equiv.kernels.activations import ACTIVATIONS

pytest.importorskip("triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IMPLEMENTATIONS = ("reference", "fused")
# The interpreter takes some 10 ms per program.
few = settings(max_examples=20)
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Any widths and ranks; half of the rows special; weights also wider than h."""
    rows, d = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    n, r = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 16, 17, 40]))
    dtype = draw(st.sampled_from(dtypes))
    weights = draw(st.sampled_from([dtype, torch.float32]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def random(*shape: int, size: float) -> Tensor:
        return size * torch.randn(shape, generator=source)

    size = draw(st.sampled_from([0.05, 1.0]))
    return Case(
        h=random(rows, d, size=1).to(dtype),
        down=random(n, r, d, size=d**-0.5).to(weights),
        up=random(n, r, d, size=size * r**-0.5).to(weights),
        bias=random(n, r, size=0.5).to(weights) if draw(st.booleans()) else None,
        index=torch.randint(-1, n, (rows,), generator=source),
        scale=1 + random(rows, size=0.3) if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
    )


def shifted(case: Case, impl: str) -> Tensor:
    return kernels.low_rank_shift(
        case.h,
        case.down,
        case.up,
        case.bias,
        case.index,
        case.scale,
        activation=case.activation,
        impl=impl,
    )


def bits(x: Tensor) -> Tensor:
    """As integers: −0 is not 0, and a NaN is itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@each_implementation
@few
@given(case=cases())
def test_low_rank_is_within_the_bound(impl: str, case: Case) -> None:
    found = shifted(case, impl)
    halves = impl == "fused" and case.down.dtype != torch.float32
    off = (found.double() - exact(case)).abs()
    assert bool((off <= bound(case, halves=halves)).all())


@given(case=cases((torch.float64,)))
@settings(max_examples=30)
def test_low_rank_in_float64(case: Case) -> None:
    """The loop itself is as far off again."""
    off = (shifted(case, "reference") - exact(case)).abs()
    assert bool((off <= 2 * bound(case)).all())


@each_implementation
@few
@given(case=cases(), data=st.data())
def test_vectors_are_within_the_bound(
    impl: str, case: Case, data: st.DataObject
) -> None:
    bank = case.up[:, 0]
    found = kernels.vector_shift(case.h, bank, case.index, case.scale, impl=impl)
    live = case.index >= 0
    v = torch.where(live[:, None], bank[case.index.clamp_min(0)].double(), 0)
    scale = 1.0 if case.scale is None else case.scale[:, None]
    off = (
        found.double() - (case.h.double() + torch.as_tensor(scale).double() * v)
    ).abs()
    assert bool((off <= vector_bound(case.h, v, scale)).all())
    assert same_bits(found[~live], case.h[~live])


@each_implementation
@few
@given(case=cases())
def test_candidates_are_single_shifts(impl: str, case: Case) -> None:
    """Bit for bit: each of many on one activation is the shift by that vector alone."""
    bank = case.up[:, 0]
    scale = None if case.scale is None else torch.linspace(-1, 2, len(bank))
    found = kernels.candidate_shifts(case.h, bank, scale, impl=impl)
    for k, v in enumerate(bank):
        strength = None if scale is None else scale[k]
        one = kernels.vector_shift(case.h, v[None], None, strength, impl=impl)
        assert same_bits(found[k], one)


@each_implementation
@few
@given(case=cases(), data=st.data())
def test_rows_do_not_see_each_other(impl: str, case: Case, data: st.DataObject) -> None:
    """Any selection of rows, in any order, gives those rows of the whole: bit for bit.

    Also beside a row that is all NaN, and the same in a second run.
    """
    rows = data.draw(st.permutations(range(len(case.h))))
    few = torch.tensor(rows[: data.draw(st.integers(1, len(rows)))])
    part = Case(
        case.h[few],
        case.down,
        case.up,
        case.bias,
        case.index[few],
        None if case.scale is None else case.scale[few],
        case.activation,
    )
    whole = shifted(case, impl)
    assert same_bits(shifted(part, impl), whole[few])
    assert same_bits(shifted(case, impl), whole)
    lost = case.h.clone()
    lost[rows[0]] = torch.nan
    beside = shifted(_with_h(case, lost), impl)
    others = torch.arange(len(lost)) != rows[0]
    assert same_bits(beside[others], whole[others])


def _with_h(case: Case, h: Tensor) -> Case:
    return Case(**{**vars(case), "h": h})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
@each_implementation
@few
@given(case=cases(), bad=st.sampled_from([torch.nan, torch.inf]))
def test_what_is_not_selected_does_not_leak(impl: str, case: Case, bad: float) -> None:
    """One steer is all NaN, or ∞: only its own rows notice, in place as well."""
    down, up = case.down.clone(), case.up.clone()
    down[0], up[0] = bad, bad
    bias = None if case.bias is None else case.bias.clone()
    if bias is not None:
        bias[0] = bad
    spoiled = Case(**{**vars(case), "down": down, "up": up, "bias": bias})
    clean, found = shifted(case, impl), shifted(spoiled, impl)
    others = case.index != 0
    assert same_bits(found[others], clean[others])
    untouched = case.index < 0
    assert same_bits(found[untouched], case.h[untouched])
    vectors = kernels.vector_shift(case.h, up[:, 0], case.index, case.scale, impl=impl)
    assert bool(torch.isfinite(vectors[others]).all())


@each_implementation
@few
@given(case=cases())
def test_in_place_is_the_same(impl: str, case: Case) -> None:
    """Bit for bit, and −0, NaN and ∞ of untouched rows survive."""
    special = torch.tensor([-0.0, torch.nan, torch.inf], dtype=case.h.dtype)
    h = case.h.clone()
    h[:, 0] = torch.where(case.index < 0, special[torch.arange(len(h)) % 3], h[:, 0])
    case = _with_h(case, h)
    arguments = (case.down, case.up, case.bias, case.index, case.scale)
    there = h.clone()
    found = kernels.low_rank_shift_(
        there, *arguments, activation=case.activation, impl=impl
    )
    assert found is there and same_bits(there, shifted(case, impl))
    bank, there = case.up[:, 0], h.clone()
    kernels.vector_shift_(there, bank, case.index, case.scale, impl=impl)
    out = kernels.vector_shift(h, bank, case.index, case.scale, impl=impl)
    assert same_bits(there, out)
    untouched = case.index < 0
    assert same_bits(out[untouched], h[untouched])


@each_implementation
@few
@given(case=cases())
def test_everything_is_written(impl: str, case: Case) -> None:
    """Over outputs full of NaN: the result, z, and the linear map of the gradient."""
    launcher = reference
    if impl == "fused":
        from equiv.kernels.triton import launching as launcher
    rows, r = len(case.h), case.down.shape[1]
    out, z = torch.full_like(case.h, torch.nan), torch.full((rows, r), torch.nan)
    bank = (case.down, case.up, case.bias)
    launcher.low_rank(
        case.h, case.h, *bank, case.scale, case.index, case.activation, out, z
    )
    assert not out.isnan().any() and not z.isnan().any()
    assert not z[case.index < 0].any()
    out.fill_(torch.nan)
    launcher.low_rank(
        case.h, None, *bank, case.scale, case.index, case.activation, out, gate=z
    )
    assert not out.isnan().any() and not out[case.index < 0].any()


@each_implementation
@pytest.mark.parametrize("d", [64, 897, 16384])
@pytest.mark.parametrize("r", [1, 64])
def test_wide_activations_and_large_ranks(impl: str, d: int, r: int) -> None:
    source = torch.Generator().manual_seed(d + r)
    # The interpreter takes a second for float32's small tiles at the largest width.
    dtypes = (torch.bfloat16,) if d > 10**4 else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        down, up = torch.randn(2, 2, r, d, generator=source)
        case = Case(
            torch.randn(5, d, generator=source).to(dtype),
            (down / d**0.5).to(dtype),
            (up / r**0.5).to(dtype),
            None,
            torch.tensor([0, 1, -1, 1, 0]),
            None,
            "silu",
        )
        off = (shifted(case, impl).double() - exact(case)).abs()
        halves = impl == "fused" and dtype == torch.bfloat16
        assert bool((off <= bound(case, halves=halves)).all())
        vectors = kernels.vector_shift(case.h, case.up[:, 0], case.index, impl=impl)
        v = torch.where(case.index[:, None] < 0, 0, case.up[case.index, 0].double())
        off = (vectors.double() - (case.h.double() + v)).abs()
        assert bool((off <= vector_bound(case.h, v, 1.0)).all())


@each_implementation
def test_index_and_scale_broadcast(impl: str) -> None:
    """Per sequence, per token, per column, for all: as if written out."""
    source = torch.Generator().manual_seed(0)
    h = torch.randn(3, 20, 2, 24, generator=source)
    down, up = torch.randn(2, 4, 5, 24, generator=source)
    scale = torch.randn(1, 20, 1, generator=source)
    for shape in ((3, 1, 1), (3, 20, 2), (20, 1), (2,), (3, 20, 1), ()):
        index = torch.randint(-1, 4, shape, generator=source)
        full, strength = index.expand(3, 20, 2), scale.expand(3, 20, 2)
        functions: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [
            (kernels.low_rank_shift, (down, up, None)),
            (kernels.vector_shift, (up[:, 0],)),
        ]
        for function, bank in functions:
            found = function(h, *bank, index, scale, impl=impl)
            whole = function(h, *bank, full.contiguous(), strength, impl=impl)
            assert same_bits(found, whole)


@each_implementation
def test_loreft_is_a_low_rank_shift(impl: str) -> None:
    """H + Rᵀ (W h + b − R h) in float64, with W − R formed before rounding."""
    source = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(96, 8, generator=source).double())[0].T
    weight = torch.randn(8, 96, generator=source).double() / 96**0.5
    b = torch.randn(8, generator=source).double()
    h = torch.randn(12, 96, generator=source)
    direct = h.double() + (h.double() @ (weight - rotation).T + b) @ rotation
    case = Case(
        h,
        (weight - rotation)[None].float(),
        rotation[None].float(),
        b[None].float(),
        torch.zeros(12, dtype=torch.long),
        None,
        "identity",
    )
    off = (shifted(case, impl).double() - direct).abs()
    # Beside the bound, each weight was rounded once: one more term of each sum.
    assert bool((off <= 2 * bound(case)).all())


@each_implementation
def test_mixed_ranks_in_one_bank(impl: str) -> None:
    """Filled up with zeros, a steer of rank 2 is exactly that steer."""
    source = torch.Generator().manual_seed(0)
    downs, ups = (
        [torch.randn(r, 40, generator=source) for r in (2, 7, 16)] for _ in range(2)
    )
    biases = [torch.randn(r, generator=source) for r in (2, 7, 16)]
    bank = tuple(kernels.stack_ranks(parts) for parts in (downs, ups, biases))
    h = torch.randn(9, 40, generator=source)
    for k in range(3):
        down, up, bias = (parts[k][None] for parts in (downs, ups, biases))
        for activation in ACTIVATIONS:
            found = kernels.low_rank_shift(
                h,
                bank[0],
                bank[1],
                bank[2],
                torch.tensor(k),
                activation=activation,
                impl=impl,
            )
            alone = Case(h, down, up, bias, torch.zeros(9).long(), None, activation)
            off = (found.double() - exact(alone)).abs()
            assert bool((off <= bound(alone)).all())


@each_implementation
def test_a_steer_may_read_another_activation(impl: str) -> None:
    """One of another width, against float64; the rest as where both are one."""
    source = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        h, x = (torch.randn(20, d, generator=source).to(dtype) for d in (24, 50))
        down, up = (
            torch.randn(3, 4, d, generator=source).to(dtype) / d**0.5 for d in (50, 24)
        )
        index = torch.arange(20) % 4 - 1
        found = kernels.low_rank_shift(
            h, down, up, None, index, read=x, activation="tanh", impl=impl
        )
        z = torch.einsum("td,trd->tr", x.double(), down[index].double())
        shift = torch.einsum("tr,tre->te", torch.tanh(z), up[index].double())
        exact_ = h.double() + torch.where(index[:, None] < 0, 0, shift)
        # Half a unit of the result, and some tens of float32's.
        u = torch.finfo(dtype).eps / 2 + 100 * torch.finfo(torch.float32).eps
        size = h.double().abs() + shift.abs() + 1
        assert bool(((found.double() - exact_).abs() <= u * size).all())
        assert same_bits(found[index < 0], h[index < 0])
    with pytest.raises(ArgumentError, match="`read` like `h` but for its last axis"):
        kernels.low_rank_shift(h, down, up, None, index, read=x[:3], impl=impl)


@each_implementation
def test_autocast_stays_out(impl: str) -> None:
    """Forward and backward, in the reference's products and the composite's."""
    source = torch.Generator().manual_seed(0)
    h, (down, up) = (
        torch.randn(9, 32, generator=source),
        torch.randn(2, 1, 4, 32, generator=source),
    )
    h.requires_grad_()

    def both() -> tuple[Tensor, ...]:
        out = kernels.low_rank_shift(h, down, up, impl=impl)
        one = torch.ones_like(h.detach())
        tangent = torch.func.jvp(
            lambda h: kernels.low_rank_shift(h, down, up, impl=impl),
            (h.detach(),),
            (one,),
        )[1]
        return out, tangent, torch.autograd.grad(out.sum(), h)[0]

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both()
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_empty_batches_stay_empty() -> None:
    h, bank = torch.zeros(0, 3, 8), torch.ones(1, 8)
    assert kernels.vector_shift(h, bank).shape == h.shape
    assert kernels.low_rank_shift(h, bank[None], bank[None]).shape == h.shape
    assert kernels.candidate_shifts(h, bank).shape == (1, 0, 3, 8)


def test_the_choice_can_be_read_back() -> None:
    assert kernels.implementation(torch.zeros(1, 2)) == "reference"
    assert kernels.implementation(torch.zeros(1, 2), "fused") == "fused"
    with pytest.raises(ArgumentError, match="impl='reference' takes any"):
        kernels.implementation(torch.zeros(1, 2).double(), "fused")
    with pytest.raises(ArgumentError, match=r"`impl` in reference, fused, got 'fast'"):
        kernels.implementation(torch.zeros(1, 2), "fast")


H, BANK, WEIGHTS = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(4, 2, 8)
INDEX = torch.zeros(2, 1).long()
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: kernels.vector_shift(H, BANK), "`index` with a bank of 4 steers"),
    (
        lambda: kernels.vector_shift(H, BANK[:, :5], INDEX),
        r"\[n, d\], n ≥ 1, with d = 8",
    ),
    (
        lambda: kernels.vector_shift(H, BANK, INDEX[:, 0]),
        r"`index` to broadcast .*\(2, 3\)",
    ),
    (lambda: kernels.vector_shift(H, BANK, INDEX.float()), "`index` of integers"),
    (lambda: kernels.vector_shift(H, BANK, INDEX + 4), "`index` within −1…3"),
    (
        lambda: kernels.vector_shift(H, BANK, INDEX, torch.ones(5)),
        "`scale` to broadcast",
    ),
    (lambda: kernels.vector_shift(H.long(), BANK, INDEX), "floating dtype"),
    (lambda: kernels.vector_shift(H, BANK.to("meta"), INDEX), "on cpu, where `h` is"),
    (
        lambda: kernels.low_rank_shift(H, WEIGHTS, WEIGHTS[:, :1], None, INDEX),
        "`up` of shape",
    ),
    (
        lambda: kernels.low_rank_shift(H, WEIGHTS, WEIGHTS, BANK, INDEX),
        r"`bias` of shape \[n, r\].* n = 4 and r = 2",
    ),
    (
        lambda: kernels.low_rank_shift(
            H, WEIGHTS, WEIGHTS, None, INDEX, activation="elu"
        ),
        "`activation` in",
    ),
    (
        lambda: kernels.candidate_shifts(H, BANK, torch.ones(3)),
        r"`scale` of shape \(4,\)",
    ),
    (lambda: kernels.vector_shift_(H.mT, BANK[:, :2], INDEX), "contiguous"),
    (
        lambda: kernels.vector_shift_(H, BANK.clone().requires_grad_(), INDEX),
        "in place has no derivative",
    ),
    (
        lambda: kernels.low_rank_shift(
            torch.zeros(2, 3), *torch.zeros(2, 1, 65, 3), impl="fused"
        ),
        "rank 1…64 with impl='fused', got 65",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_calls_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
