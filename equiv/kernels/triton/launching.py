"""Launches of the kernels, with the functions of `equiv.kernels.reference`."""

from typing import Any

import torch
import triton
from torch import Tensor

from equiv.errors import ArgumentError
from equiv.kernels.triton import configurations
from equiv.kernels.triton.configurations import Configuration
from equiv.kernels.triton.low_rank import low_rank_kernel
from equiv.kernels.triton.primitives import ACTIVATION_NUMBERS, INTERPRETED
from equiv.kernels.triton.vector import candidates_kernel, vector_kernel

# Programs that keep a large GPU busy: with fewer rows than tiles of that many, a
# program has fewer rows, down to one, each with its own steer. The interpreter runs
# them one after the other, so there the fewer the better.
_PROGRAMS = 1 if INTERPRETED else 512
_LARGEST_RANK = 64


def vector_shift(
    h: Tensor, bank: Tensor, scale: Tensor | None, index: Tensor, out: Tensor
) -> None:
    """As the reference's."""
    _check_device(h)
    rows, d = h.shape
    if not h.numel():
        return
    own = configurations.elementwise(d, h.dtype)
    vector_kernel[(triton.cdiv(rows, own.rows), triton.cdiv(d, own.columns))](
        h,
        bank,
        index,
        h if scale is None else scale,
        out,
        rows,
        d,
        bank.shape[0],
        rows // index.shape[0],
        _each(scale, rows),
        **_constants(own, HAS_SCALE=scale is not None, IN_PLACE=out is h),
    )


def low_rank(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    activation: str,
    out: Tensor,
    z: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """As the reference's."""
    _check_device(x)
    (rows, d), (n, r, e) = x.shape, up.shape
    if r > _LARGEST_RANK:
        raise ArgumentError(
            f"Expected rank 1…{_LARGEST_RANK} with impl='fused', got {r}; "
            "impl='reference' takes any."
        )
    if not rows:
        return
    down, up = _one_dtype(down, up, x)
    own = configurations.low_rank(r, down.dtype)
    per_program = min(own.rows, max(1, rows // _PROGRAMS))
    each = rows // index.shape[0]
    order = None
    if per_program > 1 and each == 1 and n > 1:
        order = torch.argsort(index, stable=True)  # so that a tile has few steers
    low_rank_kernel[(triton.cdiv(rows, per_program),)](
        x,
        x if base is None else base,
        down,
        up,
        x if bias is None else bias,
        x if scale is None else scale,
        index,
        index if order is None else order,
        x if gate is None else gate,
        x if z is None else z,
        out,
        rows,
        d,
        e,
        r,
        n,
        each,
        _each(scale, rows),
        per_program,
        **_constants(
            own,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            HAS_BASE=base is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_ORDER=order is not None,
            GATED=gate is not None,
            SAVE_Z=z is not None,
            IN_PLACE=out is base,
            PRECISION=configurations.precision(down.dtype),
            BLOCK_R=own.ranks,
        ),
    )


def candidate_shifts(
    h: Tensor, bank: Tensor, scale: Tensor | None, out: Tensor
) -> None:
    """As the reference's."""
    _check_device(h)
    rows, d = h.shape
    if not out.numel():
        return
    own = configurations.elementwise(d, h.dtype)
    candidates_kernel[(triton.cdiv(rows, own.rows), triton.cdiv(d, own.columns))](
        h,
        bank,
        h if scale is None else scale,
        out,
        rows,
        d,
        bank.shape[0],
        **_constants(own, HAS_SCALE=scale is not None),
    )


def _constants(own: Configuration, **flags: object) -> dict[str, Any]:
    """What a kernel is compiled for, and how."""
    return {
        **flags,
        "BLOCK_M": own.rows,
        "BLOCK_D": own.columns,
        "INTERPRETED": INTERPRETED,
        "num_warps": own.warps,
        "num_stages": own.stages,
    }


def _each(value: Tensor | None, rows: int) -> int:
    """How many rows an entry is of."""
    return 1 if value is None else rows // value.shape[0]


def _one_dtype(down: Tensor, up: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in the dtype of the activations if all are, else all in float32."""
    if down.dtype == up.dtype and down.dtype in (x.dtype, torch.float32):
        return down, up
    return down.float(), up.float()


def _check_device(h: Tensor) -> None:
    if h.device.type != "cuda" and not INTERPRETED:
        raise ArgumentError(
            "Expected activations on a CUDA device with impl='fused', got "
            f"{h.device}. Set TRITON_INTERPRET=1 before triton is imported to run the "
            "kernels on a CPU, slowly."
        )
