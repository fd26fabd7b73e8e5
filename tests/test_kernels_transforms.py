"""Batched shifts under every transform of PyTorch, both implementations.

The truth is a loop over rows in float64, put through the same transform. The reference
runs in float64 too. The kernel runs in float32: there a result may be off by some 10²
roundings of numbers of size 10, 10⁻⁴, which a wrong derivative exceeds a thousandfold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from equiv import kernels
from equiv.kernels import operators
from equiv.kernels.activations import ACTIVATIONS, SLOPES

pytest.importorskip("triton")
ROWS, D, N, R = 9, 20, 3, 5
INDEX = torch.tensor([0, 2, -1, 1, 1, 0, -1, 2, 0])
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class World:
    """One implementation of one shift, and the loop that it is compared with.

    Attributes:
        function: Of the tensors alone.
        truth: The same, row by row.
        tensors: Arguments in the dtype of the implementation.
        impl: Its name.
    """

    function: Function
    truth: Function
    tensors: tuple[Tensor, ...]
    impl: str

    @property
    def exact(self) -> tuple[Tensor, ...]:
        return tuple(t.double() for t in self.tensors)

    def close(self, found: Any, expected: Any) -> None:
        if isinstance(found, tuple):
            for a, b in zip(found, expected, strict=True):
                self.close(a, b)
            return
        tolerance = 1e-10 if self.impl == "reference" else 1e-4
        largest = max(1.0, float(expected.detach().abs().max()))
        assert float((found.double() - expected).abs().max()) <= tolerance * largest
        assert float(expected.detach().abs().max()) > 1e-3  # there is something to see


def low_rank(impl: str, activation: str = "silu") -> World:
    phi = ACTIVATIONS[activation]

    def function(h: Tensor, down: Tensor, up: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return kernels.low_rank_shift(
            h, down, up, b, INDEX, s, activation=activation, impl=impl
        )

    def truth(h: Tensor, down: Tensor, up: Tensor, b: Tensor, s: Tensor) -> Tensor:
        rows = [
            h[t] if i < 0 else h[t] + s[t] * (phi(down[i] @ h[t] + b[i]) @ up[i])
            for t, i in enumerate(INDEX.tolist())
        ]
        return torch.stack(rows)

    tensors = drawn((ROWS, D), (N, R, D), (N, R, D), (N, R), (ROWS,), impl=impl)
    return World(function, truth, (tensors[0], *(0.4 * t for t in tensors[1:])), impl)


def elsewhere(impl: str) -> World:
    """A map that reads another activation than it writes, of another width."""

    def function(h: Tensor, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        return kernels.low_rank_shift(
            h, down, up, None, INDEX, read=x, activation="tanh", impl=impl
        )

    def truth(h: Tensor, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        rows = [
            h[t] if i < 0 else h[t] + torch.tanh(down[i] @ x[t]) @ up[i]
            for t, i in enumerate(INDEX.tolist())
        ]
        return torch.stack(rows)

    tensors = drawn((ROWS, D), (N, R, 13), (N, R, D), (ROWS, 13), impl=impl)
    return World(function, truth, (tensors[0], *(0.4 * t for t in tensors[1:])), impl)


def vector(impl: str) -> World:
    def function(h: Tensor, bank: Tensor, s: Tensor) -> Tensor:
        return kernels.vector_shift(h, bank, INDEX, s, impl=impl).sin()

    def truth(h: Tensor, bank: Tensor, s: Tensor) -> Tensor:
        rows = [
            h[t] if i < 0 else h[t] + s[t] * bank[i]
            for t, i in enumerate(INDEX.tolist())
        ]
        return torch.stack(rows).sin()

    return World(function, truth, drawn((ROWS, D), (N, D), (ROWS,), impl=impl), impl)


def candidates(impl: str) -> World:
    def function(h: Tensor, bank: Tensor, s: Tensor) -> Tensor:
        return kernels.candidate_shifts(h, bank, s, impl=impl).sin()

    def truth(h: Tensor, bank: Tensor, s: Tensor) -> Tensor:
        return torch.stack([h + s[k] * bank[k] for k in range(N)]).sin()

    return World(function, truth, drawn((ROWS, D), (N, D), (N,), impl=impl), impl)


def drawn(*shapes: tuple[int, ...], impl: str, seed: int = 3) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if impl == "reference" else torch.float32
    return tuple(
        torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
        for shape in shapes
    )


IMPLEMENTATIONS = ("reference", "fused")
worlds = pytest.mark.parametrize(
    "world",
    [
        make(impl)
        for impl in IMPLEMENTATIONS
        for make in (low_rank, elsewhere, vector, candidates)
    ],
    ids=[
        f"{n}-{i}"
        for i in IMPLEMENTATIONS
        for n in ("low rank", "elsewhere", "vector", "candidates")
    ],
)


def scalar(function: Function) -> Function:
    return lambda *tensors: function(*tensors).square().sum()


def every(world: World) -> tuple[int, ...]:
    return tuple(range(len(world.tensors)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation: str, impl: str) -> None:
    """Forward, backward by the linear operator, forward mode; φ′ against autograd."""
    world = low_rank(impl, activation)
    backward(world)
    tangents = drawn(*(t.shape for t in world.tensors), impl=impl, seed=4)
    found = jvp(world.function, world.tensors, tangents)
    world.close(
        found, jvp(world.truth, world.exact, tuple(t.double() for t in tangents))
    )
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    one = torch.ones_like(z)
    expected = jvp(ACTIVATIONS[activation], (z,), (one,))[1]
    torch.testing.assert_close(SLOPES[activation](z), expected)


def backward(world: World) -> None:
    results = []
    for function, tensors in (
        (world.function, world.tensors),
        (world.truth, world.exact),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        scalar(function)(*leaves).backward()
        results.append(tuple(leaf.grad for leaf in leaves))
    world.close(*results)


@worlds
def test_backward(world: World) -> None:
    backward(world)


@worlds
def test_gradcheck(world: World) -> None:
    """In float64, and in float32 by differences of 10⁻²: exact to some 10⁻³."""
    leaves = [t.clone().requires_grad_() for t in world.tensors]
    if world.impl == "reference":
        assert torch.autograd.gradcheck(world.function, leaves)
        assert torch.autograd.gradgradcheck(world.function, leaves)
        return
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            world.function, leaves, eps=1e-2, atol=5e-3, rtol=1e-2, fast_mode=True
        )


@worlds
def test_forward_mode(world: World) -> None:
    """The tangent of every argument alone: right, not silently zero."""
    for number in every(world):
        tangents = [torch.zeros_like(t) for t in world.tensors]
        tangents[number] = drawn(tangents[number].shape, impl=world.impl, seed=5)[0]
        exact = tuple(t.double() for t in tangents)
        found = jvp(world.function, world.tensors, tuple(tangents))
        world.close(found[1], jvp(world.truth, world.exact, exact)[1])


@worlds
def test_vmap_over_every_argument(world: World) -> None:
    for number in every(world):
        dims = [None] * len(world.tensors)
        batched: list[Tensor] = list(world.tensors)
        batched[number] = drawn((4, *batched[number].shape), impl=world.impl)[0]
        dims[number] = 0  # type: ignore[call-overload]
        found = vmap(world.function, tuple(dims))(*batched)
        rows = []
        for value in batched[number].double():
            exact = list(world.exact)
            exact[number] = value
            rows.append(world.truth(*exact))
        world.close(found, torch.stack(rows))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap_over_the_index(impl: str) -> None:
    world = low_rank(impl)
    h, down, up, b, s = world.tensors
    index = torch.stack([INDEX, INDEX.flip(0), INDEX.roll(2)])

    def one(i: Tensor) -> Tensor:
        return kernels.low_rank_shift(h, down, up, b, i, s, impl=impl)

    def tangent(i: Tensor) -> Tensor:
        def function(h: Tensor) -> Tensor:
            return kernels.low_rank_shift(h, down, up, b, i, s, impl=impl)

        return jvp(function, (h,), (torch.ones_like(h),))[1]

    for function in (one, tangent):
        expected = torch.stack([function(i) for i in index])
        torch.testing.assert_close(vmap(function)(index), expected)


@worlds
def test_vmap_of_grad_and_jacrev(world: World) -> None:
    last = every(world)[-1]
    found = jacrev(world.function, argnums=last)(*world.tensors)
    world.close(found, jacrev(world.truth, argnums=last)(*world.exact))
    banks = drawn((3, *world.tensors[1].shape), impl=world.impl)[0]
    rest = world.tensors[2:]

    def gradient(function: Function, tensors: tuple[Tensor, ...]) -> Function:
        return lambda bank: grad(scalar(function), 1)(tensors[0], bank, *tensors[2:])

    found = vmap(gradient(world.function, world.tensors))(banks)
    expected = [gradient(world.truth, world.exact)(bank.double()) for bank in banks]
    world.close(found, torch.stack(expected))
    assert rest


@worlds
def test_second_derivatives(world: World) -> None:
    """Forward over reverse, reverse over reverse, and double backward."""
    h, rest = world.tensors[0], world.tensors[1:]
    v = drawn(h.shape, impl=world.impl, seed=6)[0]

    def hvp(
        function: Function, h: Tensor, rest: tuple[Tensor, ...], v: Tensor
    ) -> Tensor:
        return jvp(grad(lambda h: scalar(function)(h, *rest)), (h,), (v,))[1]

    def twice(
        function: Function, h: Tensor, rest: tuple[Tensor, ...], v: Tensor
    ) -> Tensor:
        return vjp(grad(lambda h: scalar(function)(h, *rest)), h)[1](v)[0]

    def double(
        function: Function, h: Tensor, rest: tuple[Tensor, ...], v: Tensor
    ) -> Tensor:
        leaf = h.clone().requires_grad_()
        (first,) = torch.autograd.grad(
            scalar(function)(leaf, *rest), leaf, create_graph=True
        )
        return torch.autograd.grad(first, leaf, v)[0]

    for how in (hvp, twice, double):
        expected = how(world.truth, h.double(), world.exact[1:], v.double())
        world.close(how(world.function, h, rest, v), expected)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@worlds
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(world: World, dynamic: bool, fresh_dynamo: None) -> None:
    """Forward, backward, and forward mode inside the graph."""
    settings: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.compile(world.function, dynamic=dynamic, **settings)
    expected = world.truth(*world.exact)
    world.close(compiled(*world.tensors), expected)
    results = []
    for function, tensors in ((compiled, world.tensors), (world.truth, world.exact)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        scalar(function)(*leaves).backward()
        results.append(tuple(leaf.grad for leaf in leaves))
    world.close(*results)

    def tangent(h: Tensor, v: Tensor) -> Tensor:
        return jvp(lambda h: world.function(h, *world.tensors[1:]), (h,), (v,))[1]

    h, v = world.tensors[0], torch.ones_like(world.tensors[0])
    found = torch.compile(tangent, dynamic=dynamic, **settings)(h, v)
    world.close(found, tangent(h, v).double())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_graph_for_batches_of_any_size(impl: str, fresh_dynamo: None) -> None:
    """Dynamic shapes: the number of rows is no constant of the graph."""
    _, down, up, b, _ = low_rank(impl).tensors
    graphs: list[object] = []

    def count(graph: Any, _example: object) -> Any:
        graphs.append(graph)
        return graph.forward

    def function(h: Tensor, index: Tensor) -> Tensor:
        return kernels.low_rank_shift(h, down, up, b, index, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for rows in (6, 9, 14):  # no size of something else
        h = drawn((rows, D), impl=impl)[0]
        index = torch.arange(rows) % 4 - 1
        torch.testing.assert_close(compiled(h, index), function(h, index))
    assert len(graphs) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_operators_are_well_formed(fused: bool) -> None:
    """`torch.library.opcheck`: schema, mutation, fake tensors, under ahead-of-time."""
    impl = "fused" if fused else "reference"
    h, down, up, b, s = low_rank(impl).tensors
    gate = torch.randn(ROWS, R, dtype=h.dtype)
    bank = up[:, 0].contiguous()
    for operator, arguments in (
        (operators.vector_shift, (h, bank, s, INDEX)),
        (operators.vector_shift_, (h, bank, s, INDEX)),
        (operators.low_rank, (h, None, down, up, b, s, INDEX, "silu")),
        (operators.low_rank, (h, h.cos(), down, up, b, None, INDEX, "gelu")),
        (operators.low_rank_, (h, down, up, b, s, INDEX, "silu")),
        (operators.low_rank_linear, (h, h.cos(), down, up, s, INDEX, gate, "silu")),
        (operators.low_rank_linear, (h, None, down, up, None, INDEX, gate, "silu")),
        (operators.candidate_shifts, (h, bank, None)),
    ):
        torch.library.opcheck(operator, (*arguments, fused))


@pytest.mark.parametrize("lost", range(N))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_do_not_leak(impl: str, lost: int) -> None:
    """A steer nobody selected is NaN: every gradient is finite, twice as well."""
    h, down, up, b, s = (t.clone() for t in low_rank(impl).tensors)
    for part in (down, up, b):
        part[lost] = torch.nan
    index = torch.where(INDEX.eq(lost), (lost + 1) % N, INDEX)
    leaves = [t.requires_grad_() for t in (h, down, up, b, s)]
    out = kernels.low_rank_shift(h, down, up, b, index, s, impl=impl)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    assert all(bool(torch.isfinite(g).all()) for g in first)
    for g in torch.autograd.grad(first[0].sum(), leaves):
        assert bool(torch.isfinite(g).all())
    bank = up.detach()[:, 0].clone().requires_grad_()
    out = kernels.vector_shift(h, bank, index, s, impl=impl)
    for g in torch.autograd.grad(out.square().sum(), (h, bank, s)):
        assert bool(torch.isfinite(g).all())
