"""Scaled dot-product attention with derivatives of its own, forward and reverse.

PyTorch's fused kernels have no forward one, and that of its math path makes a dozen
passes over the matrix of scores. With S = QKᵀ/√d + B and P = softmax(S) row by row:

    O = P V
    Ȯ = P (Ṡ − rowsum(P Ṡ)) V + P V̇,    Ṡ = (Q̇Kᵀ + QK̇ᵀ)/√d + Ḃ

and in reverse, with x̄ the derivative of a scalar by x:

    V̄ = Pᵀ Ō,    S̄ = P (P̄ − rowsum(P P̄)),  P̄ = Ō Vᵀ,    Q̄ = S̄ K/√d,  K̄ = S̄ᵀ Q/√d,  B̄ = S̄

The matrix P, [batch, heads, seq, seq], is made in full. First derivatives only: what
PyTorch makes of a derivative of these is not the second one; see `composed.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiv.model.composed import is_composed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, without dropout.

    Args:
        query: [*batch, heads, seq, d].
        key: [*batch, heads, source, d]; with `enable_gqa` a divisor of the heads.
        value: [*batch, heads, source, e].
        attn_mask: Broadcastable to [*batch, heads, seq, source]; boolean (true takes
            part) or added to the scores. Rows without any source give zero.
        dropout_p: Ignored: dropout is off while measuring.
        is_causal: Whether a position sees only itself and what is before it.
        scale: Instead of 1/√d.
        enable_gqa: Whether query heads share keys and values in groups.
    """
    if query.ndim < 3:  # the groups need an axis of heads
        one_head = attention(
            query[None], key[None], value[None], attn_mask, 0.0, is_causal, scale
        )
        return one_head[0]
    bias, empty = _bias(query, key, attn_mask, is_causal)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_composed():
        return _composed(query * factor, key, value, bias, empty)
    applied: Any = _Attention.apply(query * factor, key, value, bias, empty)
    return applied[0]


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    empty: Tensor | None,
) -> Tensor:
    """The same, of operations that can be differentiated any number of times."""
    scores = _scores(query, key)
    shares = torch.softmax(scores if bias is None else scores + bias, -1)
    if empty is not None:
        shares = shares.masked_fill(empty, 0.0)
    return _mixed(shares, value)


def _bias(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and the rows that see nothing (if any do)."""
    bias = mask
    if is_causal:
        shape = query.shape[-2], key.shape[-2]
        bias = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    elif mask is None:
        return None, None
    assert bias is not None
    if bias.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        bias = torch.where(bias, zero, -math.inf)
    empty = (bias == -math.inf).all(-1, keepdim=True)
    return bias, empty if bool(empty.any()) else None


class _Attention(torch.autograd.Function):
    """(scaled query, key, value, bias, empty rows) → (output, P)."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        empty: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(query, key)
        if bias is not None:
            scores += bias
        shares = torch.softmax(scores, -1)
        if empty is not None:
            shares = shares.masked_fill(empty, 0.0)
        return _mixed(shares, value), shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        query, key, value, bias, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_forward(query, key, value, output[1])
        ctx.save_for_backward(query, key, value, output[1])
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def jvp(
        ctx: Any,
        dquery: Tensor | None,
        dkey: Tensor | None,
        dvalue: Tensor | None,
        dbias: Tensor | None,
        _: None,
    ) -> tuple[Tensor, None]:
        query, key, value, shares = ctx.saved_tensors
        out = shares.new_zeros(*shares.shape[:-1], value.shape[-1])
        if dvalue is not None:
            out = _mixed(shares, dvalue)
        parts = []
        if dquery is not None:
            parts.append(_scores(dquery, key))
        if dkey is not None:
            parts.append(_scores(query, dkey))
        if dbias is not None:
            parts.append(dbias.expand_as(shares))
        if parts:
            moved = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
            for part in parts[2:]:
                moved += part
            moved = moved * shares
            moved.addcmul_(shares, moved.sum(-1, keepdim=True), value=-1)
            out += _mixed(moved, value)
        return out, None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        if dout is None:
            return None, None, None, None, None
        query, key, value, shares = ctx.saved_tensors
        for_query, for_key, for_value, for_bias, _ = ctx.needs_input_grad
        dvalue = _gathered(shares, dout, value) if for_value else None
        if not (for_query or for_key or for_bias):
            return None, None, dvalue, None, None
        moved = _scores(dout, value).mul_(shares)
        moved.addcmul_(shares, moved.sum(-1, keepdim=True), value=-1)
        return (
            _mixed(moved, key) if for_query else None,
            _gathered(moved, query, key) if for_key else None,
            dvalue,
            moved.sum_to_size(ctx.bias_shape) if for_bias else None,
            None,
        )


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """QKᵀ, [*batch, heads, seq, source]; heads of a group stand beneath each other."""
    together = (*query.shape[:-3], key.shape[-3], -1, query.shape[-1])
    product = query.reshape(together) @ key.transpose(-2, -1)
    return product.reshape(*query.shape[:-1], key.shape[-2])


def _mixed(shares: Tensor, value: Tensor) -> Tensor:
    """PV, [*batch, heads, seq, e]."""
    together = (*shares.shape[:-3], value.shape[-3], -1, shares.shape[-1])
    product = shares.reshape(together) @ value
    return product.reshape(*shares.shape[:-1], value.shape[-1])


def _gathered(shares: Tensor, rows: Tensor, source: Tensor) -> Tensor:
    """PᵀX in the shape of keys or values: summed over the heads of a group."""
    groups = (*shares.shape[:-3], source.shape[-3], -1)
    left = shares.reshape(*groups, shares.shape[-1])
    return left.transpose(-2, -1) @ rows.reshape(*groups, rows.shape[-1])
