"""Linear layers with a low-rank update beside their weight, never as a dense matrix.

    y = W x + b + t · up (down x)

Forward-mode AD of that formula would make a full-sized tangent of every term. Written
as one function with its own tangent, the update costs two thin products:

    ẏ = W ẋ + Ẇ x + ḃ + up (down (ṫ x + t ẋ))
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from equiv.model.composed import is_composed

# Weight name → (left, right) with ΔW = left @ right in the shape of the weight.
Factors = Mapping[str, tuple[Tensor, Tensor]]


class UnusedFactorsError(Exception):
    """Low-rank factors whose weight was not used by a plain call of its module."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


def takes_factors(module: nn.Module) -> bool:
    """Whether a low-rank update can be applied beside this module's weight.

    Only for the very classes: a subclass may use its weight in another way.
    """
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear or _is_conv1d(module)


def forward_with_factors(
    module: nn.Module, factors: tuple[Tensor, Tensor], t: Tensor | float, at: float
) -> Callable[[Tensor], Tensor]:
    """The module's forward with t times the update.

    Args:
        module: A module that `takes_factors`.
        factors: (left, right).
        t: The scale; under `jvp` it carries a tangent.
        at: The scale as a number.
    """
    left, right = factors
    own: Any = module
    if isinstance(module, nn.Embedding):
        # Rows of the factor instead of the weight's, everything else as it was.
        return lambda ids: (
            embedding(ids, own.weight, own.padding_idx)
            + t * (embedding(ids, left) @ right)
        )
    if _is_conv1d(module):  # GPT-2's: weight [in, out]
        weight, down, up = own.weight.T, left, right
    else:
        weight, down, up = own.weight, right.T, left.T
    if is_composed():
        return lambda x: linear(x, weight, own.bias) + t * (x @ down @ up)
    return lambda x: _apply(x, weight, own.bias, down, up, t, at)


def _apply(*arguments: Any) -> Tensor:
    out = _LinearWithFactors.apply(*arguments)
    assert isinstance(out, Tensor)
    return out


def _is_conv1d(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    )


class _LinearWithFactors(torch.autograd.Function):
    """x [*batch, in], weight [out, in], down [in, r], up [r, out] → [*batch, out]."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        t: Tensor,
        at: float,
    ) -> Tensor:
        out = linear(x, weight, bias)
        if at != 0:
            _rows(out).addmm_(_rows(x) @ down, up, alpha=at)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, down, up, _, at = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(x, weight, down, up)
        ctx.at = at

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        ddown: Tensor | None,
        dup: Tensor | None,
        dt: Tensor | None,
        _: None,
    ) -> Tensor:
        x, weight, down, up = ctx.saved_tensors
        assert ddown is None and dup is None, "factors are constants of an update"
        out = x.new_zeros(*x.shape[:-1], up.shape[1])
        inner = x.new_zeros(_rows(x).shape[0], down.shape[1])
        if dx is not None:
            out = linear(dx, weight, dbias)
            if ctx.at != 0:
                inner.addmm_(_rows(dx), down, alpha=ctx.at)
        elif dbias is not None:
            out += dbias
        if dweight is not None:
            _rows(out).addmm_(_rows(x), dweight.T)
        if dt is not None:
            inner += (_rows(x) @ down) * dt
        _rows(out).addmm_(inner, up)
        return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
