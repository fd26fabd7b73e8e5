"""Blocks small enough to check by hand, in float64: what exact claims are tested on.

Vectors are rows, [tokens, d], and weights act from the right by their transpose, as in
`torch.nn.functional.linear`:

    y = W_d (φ(W_g u + b_g) ⊙ (W_u u + b_u)) + b_d

Attention and whole blocks are in `toy_blocks.py`.

Drawn weights have entries of size 1/√(inputs), so that activations are near 1 and a
nonlinearity is really used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import gelu, linear, silu

Activation = Callable[[Tensor], Tensor]
T = TypeVar("T", bound="Tensors")


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


class Tensors:
    """Weights by name, or an update of them: sums and selections."""

    def __iter__(self) -> Iterator[Tensor]:
        for field in fields(cast(Any, self)):
            yield getattr(self, field.name)

    def plus(self, other: Self, scale: float = 1.0) -> Self:
        """W + scale · other."""
        return type(self)(*(a + scale * b for a, b in zip(self, other, strict=True)))

    def moved(self, changes: Mapping[str, Tensor]) -> Self:
        """With something added to those of these tensors that are named."""
        every = [field.name for field in fields(cast(Any, self))]
        return type(self)(
            *(
                tensor + changes[name] if name in changes else tensor
                for name, tensor in zip(every, self, strict=True)
            )
        )

    def only(self, *names: str) -> Self:
        """These tensors, the others zero."""
        every = [field.name for field in fields(cast(Any, self))]
        kept = [
            tensor if name in names else torch.zeros_like(tensor)
            for name, tensor in zip(every, self, strict=True)
        ]
        return type(self)(*kept)


@dataclass(frozen=True)
class Weights(Tensors):
    """Weights of a gated MLP; biases are zero where unused.

    Attributes:
        gate: W_g, [f, d].
        up: W_u, [f, d].
        down: W_d, [d, f].
        gate_bias: b_g, [f].
        up_bias: b_u, [f].
        down_bias: b_d, [d].
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor


class Draw:
    """Normal tensors in float64, from a seed and from nothing else."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal entries."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Entries of variance 1 / columns: it keeps the size of what it acts on."""
        return self.normal(rows, columns) / columns**0.5

    def orthonormal(self, rows: int, columns: int) -> Tensor:
        """Orthonormal columns, or rows where there are fewer of them."""
        if rows < columns:
            return self.orthonormal(columns, rows).T
        return torch.linalg.qr(self.normal(rows, columns)).Q

    def glu(self, width: int, hidden: int, *, biases: bool = False) -> Weights:
        """Weights of a gated MLP."""
        keep = float(biases)
        return Weights(
            self.matrix(hidden, width),
            self.matrix(hidden, width),
            self.matrix(width, hidden),
            keep * self.normal(hidden),
            keep * self.normal(hidden),
            keep * self.normal(width),
        )


def hidden(w: Weights, u: Tensor, phi: Activation = silu) -> Tensor:
    """M = φ(a_g) ⊙ a_u, [tokens, f]."""
    return phi(linear(u, w.gate, w.gate_bias)) * linear(u, w.up, w.up_bias)


def glu(w: Weights, u: Tensor, phi: Activation = silu) -> Tensor:
    """The gated MLP, [tokens, d]."""
    return linear(hidden(w, u, phi), w.down, w.down_bias)


def rms_norm(x: Tensor, eps: float = 0.0) -> Tensor:
    """An RMS norm without weights."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def slope(phi: Activation, x: Tensor) -> Tensor:
    """φ′, by forward mode."""
    return jvp(phi, (x,), (torch.ones_like(x),))[1]


def curvature(phi: Activation, x: Tensor) -> Tensor:
    """φ″, by two reverse passes."""
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        first = torch.autograd.grad(phi(at).sum(), at, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), at)[0]


def glu_slopes(w: Weights, u: Tensor, phi: Activation = silu) -> tuple[Tensor, Tensor]:
    """J = diag(φ′(a_g) ⊙ a_u) W_g + diag(φ(a_g)) W_u, [tokens, f, d], and A = W_d J."""
    gate, up = linear(u, w.gate, w.gate_bias), linear(u, w.up, w.up_bias)
    inner = (slope(phi, gate) * up)[..., None] * w.gate + phi(gate)[..., None] * w.up
    return inner, w.down @ inner


def derivative(run: Callable[[T], Tensor], at: T, along: T) -> Tensor:
    """The derivative of a function of weights along an update, by forward mode."""

    def of_tensors(*tensors: Tensor) -> Tensor:
        return run(type(at)(*tensors))

    return jvp(of_tensors, tuple(at), tuple(along))[1]


def glu_jvp(w: Weights, update: Weights, u: Tensor, phi: Activation = silu) -> Tensor:
    """The derivative of the gated MLP along an update of its weights."""
    return derivative(lambda moved: glu(moved, u, phi), w, update)
