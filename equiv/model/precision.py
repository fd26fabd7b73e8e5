"""Arithmetic that forward-mode differentiation and float64 checks can rely on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equiv.model.attention import attention

_FUSED = torch.nn.functional.scaled_dot_product_attention
_CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type)


class KeepFloat64(TorchFunctionMode):
    """Inside, a float64 tensor that is asked to become float32 stays float64.

    Hugging Face norms, softmax and rotary tables cast to float32 whatever the model's
    dtype; without this every float64 check has a floor of about 6e-4 under it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32 and any(
            isinstance(a, Tensor) and a.dtype == torch.float64 for a in args
        ):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class DifferentiableAttention(TorchFunctionMode):
    """Inside, attention is computed by `equiv.model.attention`.

    Plain forwards as well, so that base and tuned activations differ by the update
    alone and not by the rounding of two kernels.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _FUSED:
            func = attention
        if func is torch.nn.functional.multi_head_attention_forward:
            with _attention_inside():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _attention_inside() -> Iterator[None]:
    """For functions of PyTorch that attend where no mode is on."""
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _FUSED


@contextmanager
def _no_fused_encoder() -> Iterator[None]:
    """PyTorch's fused encoder layers, which have no derivative, switched off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Attention that forward-mode AD can differentiate, and float64 that stays so."""
    keep = KeepFloat64() if dtype == torch.float64 else nullcontext()
    with keep, DifferentiableAttention(), _no_fused_encoder():
        yield
