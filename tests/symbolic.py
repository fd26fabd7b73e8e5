"""Activations as SymPy and as torch know them; second derivatives by differences."""

from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from theorem_tensors import Function, derivative
from torch import Tensor
from torch.nn.functional import gelu, silu

x = sp.Symbol("x", real=True)
_INNER = sp.sqrt(2 / sp.pi) * (x + sp.Rational(44715, 10**6) * x**3)

# name → the activation as SymPy and as torch knows it
ACTIVATIONS: dict[str, tuple[sp.Expr, Function]] = {
    "silu": (x / (1 + sp.exp(-x)), silu),
    "gelu": (x / 2 * (1 + sp.erf(x / sp.sqrt(2))), gelu),
    "gelu_tanh": (
        x / 2 * (1 + sp.tanh(_INNER)),
        lambda z: gelu(z, approximate="tanh"),
    ),
}

# What torch needs to evaluate an expression, whose roots are of numbers and of tensors.
TORCH = [
    {"exp": torch.exp, "erf": torch.erf, "tanh": torch.tanh, "sqrt": lambda z: z**0.5},
    "math",
]


def central_difference(f: Callable[..., Tensor], at: tuple, along: tuple) -> Tensor:
    """The second derivative of f along a direction: JVPs a small step to either side.

    With the step at the cube root of the rounding, 6e-6, truncation (its square times
    the fourth derivative) and rounding (1e-16 over it) are both a few 1e-11.
    """
    step = 6e-6
    ahead, back = (
        derivative(f, tuple(a + s * v for a, v in zip(at, along, strict=True)), along)
        for s in (step, -step)
    )
    return (ahead - back) / (2 * step)


# The values come from up to 6 hidden units with factors up to about 5, fourth
# derivatives up to 100 times as large: 1e-7 leaves a factor of 10.
SECOND: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7}
