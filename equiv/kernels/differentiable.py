"""Derivatives of the operators, in a form that every transform of PyTorch goes through.

An `autograd.Function` with `setup_context`, `backward` and `vmap`, and none for forward
mode, which `torch.compile` would refuse; under forward mode `api` takes the composite,
since an operator's tangent would silently be zero. A backward that is differentiated
itself (second derivatives, everything in `torch.func`) is the composite's too: an
operator inside it would silently count as constant.

First derivatives of y = x + s upᵀ φ(z), z = down x + b, for a gradient g of y:

    dz = φ′(z) ⊙ s up g        d down = dz xᵀ       d b = dz
    dx = downᵀ dz              d up = s φ(z) gᵀ     d s = φ(z) · up g

dx is the low-rank kernel again, with down and up exchanged and φ′(z) as a gate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from equiv.kernels import composite, operators
from equiv.kernels.activations import ACTIVATIONS, SLOPES
from equiv.kernels.rows import spread, uncast

Grads = tuple[Tensor | None, ...]


class VectorShift(Function):
    """H + scale · bank[index]."""

    @staticmethod
    def forward(
        h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, fused: bool
    ) -> Tensor:
        """The operator."""
        return operators.vector_shift(h, bank, scale, index, fused)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """What backward needs."""
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:  # pyright: ignore
        """Gradients of h, bank and scale."""
        h, bank, scale, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            own = _through(composite.vector_shift, (h, bank, scale), (index,), g)
            return (*own, None, None)
        full, d_bank, d_scale = spread(index, len(g)), None, None
        wide_g = g.to(torch.promote_types(g.dtype, torch.float32))
        if ctx.needs_input_grad[1]:
            each = wide_g
            if scale is not None:
                each = each * spread(scale, len(g))[:, None].to(each.dtype)
            d_bank = _per_steer(full, len(bank), lambda m: _where(m, each).sum(0))
            d_bank = d_bank.to(bank.dtype)
        if scale is not None and ctx.needs_input_grad[2]:
            own = bank[full.long().clamp_min(0)].to(wide_g.dtype)
            d_scale = _per_entry(_where(full >= 0, wide_g * own).sum(1), scale)
        return g, d_bank, d_scale, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """More rows, and if the bank is batched, more steers."""
        h, bank, scale, index, fused = args
        size = info.batch_size
        hs, ss, index_b = (
            _batched(t, dim, size)
            for t, dim in zip((h, scale, index), _pick(in_dims, 0, 2, 3), strict=True)
        )
        (banks,), index_b = _joined([bank], [in_dims[1]], index_b, size)
        out = VectorShift.apply(
            hs.flatten(0, 1), banks, _flat(ss), index_b.flatten(), fused
        )
        return out.unflatten(0, (size, -1)), 0


class LowRank(Function):
    """Base + scale · upᵀ φ(down x + bias), and z = down x + bias beside it.

    Without a base it is x itself: Dynamo takes no tensor twice.
    """

    @staticmethod
    def forward(
        x: Tensor,
        base: Tensor | None,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        index: Tensor,
        activation: str,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        """The operator."""
        return operators.low_rank(
            x, base, down, up, bias, scale, index, activation, fused
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What backward needs."""
        ctx.save_for_backward(*inputs[:7], output[1])
        ctx.activation, ctx.fused = inputs[7:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Grads:  # pyright: ignore
        """Gradients of x, base, down, up, bias and scale."""
        with uncast(g):
            return (*_low_rank_gradients(ctx, g.contiguous()), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """More rows, and if a part of the bank is batched, more steers."""
        x, base, down, up, bias, scale, index, activation, fused = args
        size = info.batch_size
        xs, bases, ss, index_b = (
            _batched(t, dim, size)
            for t, dim in zip(
                (x, base, scale, index), _pick(in_dims, 0, 1, 5, 6), strict=True
            )
        )
        parts, index_b = _joined([down, up, bias], in_dims[2:5], index_b, size)
        y, z = LowRank.apply(
            xs.flatten(0, 1),
            None if bases is None else bases.flatten(0, 1),
            *parts,
            _flat(ss),
            index_b.flatten(),
            activation,
            fused,
        )
        return (y.unflatten(0, (size, -1)), z.unflatten(0, (size, -1))), (0, 0)


class CandidateShifts(Function):
    """[rows, d] → [n, rows, d]: h + scale[k] · bank[k]."""

    @staticmethod
    def forward(h: Tensor, bank: Tensor, scale: Tensor | None, fused: bool) -> Tensor:
        """The operator."""
        return operators.candidate_shifts(h, bank, scale, fused)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """What backward needs."""
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:  # pyright: ignore
        """Gradients of h, bank and scale: sums, for the composite is linear in each."""
        own = _through(composite.candidate_shifts, ctx.saved_tensors, (), g)
        return (*own, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """A batch of h is more rows; a batch of banks too, each its own composite."""
        h, bank, scale, fused = args
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            rows = _batched(h, in_dims[0], size)
            out = CandidateShifts.apply(rows.flatten(0, 1), bank, scale, fused)
            return out.unflatten(1, (size, -1)), 1
        hs, banks, scales = (
            _batched(t, dim, size)
            for t, dim in zip((h, bank, scale), in_dims[:3], strict=True)
        )
        made = [
            CandidateShifts.apply(
                hs[i], banks[i], None if scale is None else scales[i], fused
            )
            for i in range(size)
        ]
        return torch.stack(made), 0


def _through(
    function: Callable[..., Tensor],
    tensors: Any,
    rest: tuple[Any, ...],
    g: Tensor,
) -> Grads:
    """Gradients of the composite, which can be differentiated again."""
    given = [t for t in tensors if t is not None]

    def call(*given: Tensor) -> Tensor:
        left = iter(given)
        return function(*[None if t is None else next(left) for t in tensors], *rest)

    found = iter(torch.func.vjp(call, *given)[1](g))
    return tuple(None if t is None else next(found) for t in tensors)


def _low_rank_gradients(ctx: Any, g: Tensor) -> Grads:
    """Of x, base, down, up, bias and scale."""
    *own, index, z = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _through(composite.low_rank, own, (index, ctx.activation), g)
    x, base, down, up, bias, scale = own
    dx, d_base = None, None if base is None else g
    if ctx.needs_input_grad[0]:
        through = g if base is None else None
        dx = operators.low_rank_linear(
            g, through, up, down, scale, index, z, ctx.activation, ctx.fused
        )
    rest: Grads = (None,) * 4
    if any(ctx.needs_input_grad[2:6]):
        rest = _of_bank(x, down, up, bias, scale, index, z, ctx.activation, g)
    return (dx, d_base, *rest)


def _of_bank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    z: Tensor,
    activation: str,
    g: Tensor,
) -> Grads:
    """Gradients of down, up, bias and scale, steer by steer, in one order always."""
    full, to = spread(index, len(g)), z.dtype
    wide_g, wide_x, count = g.to(to), x.to(to), len(down)
    up_g = torch.zeros_like(z)
    for number in range(count):
        mine = (full == number)[:, None]
        up_g = torch.where(mine, wide_g @ up[number].to(to).T, up_g)
    a = ACTIVATIONS[activation](z)
    strength = 1.0 if scale is None else spread(scale, len(g))[:, None].to(to)
    dz = up_g * strength * SLOPES[activation](z)
    sa = a * strength
    d_down = _per_steer(full, count, lambda m: _where(m, dz).T @ _where(m, wide_x))
    d_up = _per_steer(full, count, lambda m: _where(m, sa).T @ _where(m, wide_g))
    d_bias = d_scale = None
    if bias is not None:
        d_bias = _per_steer(full, count, lambda m: _where(m, dz).sum(0)).to(bias.dtype)
    if scale is not None:
        d_scale = _per_entry(_where(full >= 0, a * up_g).sum(1), scale)
    return d_down.to(down.dtype), d_up.to(up.dtype), d_bias, d_scale


def _per_steer(full: Tensor, count: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([of(full == number) for number in range(count)])


def _where(rows: Tensor, value: Tensor) -> Tensor:
    """Rows of others set to zero, whatever they hold."""
    return torch.where(rows[:, None], value, 0)


def _per_entry(value: Tensor, scale: Tensor) -> Tensor:
    return value.reshape(len(scale), -1).sum(1).to(scale.dtype)


def _pick(dims: tuple[Any, ...], *which: int) -> list[Any]:
    return [dims[i] for i in which]


def _batched(value: Any, dim: int | None, size: int) -> Any:
    """The batch axis first, whether or not there was one."""
    if value is None:
        return None
    if dim is None:
        return value.expand(size, *value.shape)
    return value.movedim(dim, 0)


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten()


def _joined(
    parts: list[Any], dims: Any, index: Tensor, size: int
) -> tuple[list[Any], Tensor]:
    """A batch of banks as one bank, and the index into it."""
    if all(dim is None for dim in dims):
        return parts, index
    batched = [_batched(p, dim, size) for p, dim in zip(parts, dims, strict=True)]
    count = batched[0].shape[1]
    offset = count * torch.arange(size, device=index.device, dtype=torch.long)[:, None]
    joined = [None if p is None else p.flatten(0, 1) for p in batched]
    return joined, torch.where(index >= 0, index.long() + offset, -1)
