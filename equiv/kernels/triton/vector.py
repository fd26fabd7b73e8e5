"""Kernels of fixed vectors: one per row from a bank, and many on one activation."""

import triton
import triton.language as tl

from equiv.kernels.triton.primitives import rounded


@triton.jit
def vector_kernel(
    H,  # [rows, d]
    BANK,  # [n, d]
    INDEX,  # [rows / each]
    SCALE,  # [rows / scale_each]
    OUT,  # [rows, d]
    rows,
    d,
    n,
    each,
    scale_each,
    HAS_SCALE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Out = h + scale · bank[index]; rows of no steer are copied, or left alone."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = row < rows
    number = tl.load(INDEX + row // each, mask=there, other=-1).to(tl.int64)
    live = (number >= 0) & (number < n)
    inside = (column < d)[None, :]
    steered = live[:, None] & inside
    taken = steered if IN_PLACE else there[:, None] & inside
    at = row[:, None] * d + column[None, :]
    h = tl.load(H + at, mask=taken, other=0.0)
    own = tl.where(live, number, 0)[:, None] * d + column[None, :]
    v = tl.load(BANK + own, mask=steered, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(SCALE + row // scale_each, mask=live, other=0.0)
        v = v * scale.to(tl.float32)[:, None]
    y = rounded(h.to(tl.float32) + v, OUT.dtype.element_ty, INTERPRETED)
    tl.store(OUT + at, tl.where(steered, y, h), mask=taken)


@triton.jit
def candidates_kernel(
    H,  # [rows, d]
    BANK,  # [n, d]
    SCALE,  # [n]
    OUT,  # [n, rows, d]
    rows,
    d,
    n,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Out[k] = h + scale[k] · bank[k]: a tile of h is read once, for all k."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    taken = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * d + column[None, :]
    h = tl.load(H + at, mask=taken, other=0.0).to(tl.float32)
    step = tl.full((), 1, tl.int64) * rows * d  # in 64 bits: the result can be large
    for k in range(n):
        v = tl.load(BANK + k * d + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            v = v * tl.load(SCALE + k).to(tl.float32)
        y = rounded(h + v[None, :], OUT.dtype.element_ty, INTERPRETED)
        tl.store(OUT + at, y, mask=taken)
        at += step
