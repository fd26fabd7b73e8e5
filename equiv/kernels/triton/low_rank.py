"""The kernel of low-rank steers: out = base + scale · upᵀ a, a = φ(down x + bias).

A program has a tile of rows. For each steer that occurs in it, one after the other, it
reads the rows once to get z = down x + bias, and once more, from the cache, to write
those that are this steer's. A tile of one sequence or of sorted rows has one steer;
more cost time, never exactness: what is written of a row comes from that row and its
own steer alone, in an order that its tile has no part in.

`down` and `up` are both [n, r, d], read along d. Products of half-precision weights run
on tensor cores with float32 sums; there a, which is float32, goes in as a sum of two
half-precision numbers, its rounding and the rest.
"""

import triton
import triton.language as tl

from equiv.kernels.triton.primitives import activated, product, rounded, slope


@triton.jit
def low_rank_kernel(
    X,  # [rows, d]
    BASE,  # [rows, e]
    DOWN,  # [n, r, d]
    UP,  # [n, r, e]
    BIAS,  # [n, r]
    SCALE,  # [rows / scale_each]
    INDEX,  # [rows / each]
    ORDER,  # [rows], a permutation
    GATE,  # [rows, r]
    Z,  # [rows, r]
    OUT,  # [rows, e]
    rows,
    d,
    e,
    r,
    n,
    each,
    scale_each,
    per_program,  # rows of a program, at most BLOCK_M
    ACTIVATION: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GATED: tl.constexpr,  # a = φ′(gate) z instead
    SAVE_Z: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of rows."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0).to(tl.int64) * per_program + lane
    there = (lane < per_program) & (row < rows)
    if HAS_ORDER:
        row = tl.load(ORDER + row, mask=there, other=0).to(tl.int64)
    number = tl.load(INDEX + row // each, mask=there, other=-1).to(tl.int32)
    number = tl.where(number < n, number, -1)
    rank = tl.arange(0, BLOCK_R)
    ranked = rank < r
    weights: tl.constexpr = DOWN.dtype.element_ty
    split: tl.constexpr = weights != tl.float32
    to: tl.constexpr = OUT.dtype.element_ty

    if not IN_PLACE:
        none = there & (number < 0)
        if tl.max(none.to(tl.int32), 0) > 0:
            for start in range(0, e, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                kept = none[:, None] & (column < e)[None, :]
                at = row[:, None] * e + column[None, :]
                if HAS_BASE:
                    tl.store(OUT + at, tl.load(BASE + at, mask=kept), mask=kept)
                else:
                    tl.store(OUT + at, tl.zeros((BLOCK_M, BLOCK_D), to), mask=kept)
            if SAVE_Z:
                z_at = row[:, None] * r + rank[None, :]
                zero = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                tl.store(Z + z_at, zero, mask=none[:, None] & ranked[None, :])

    steer = tl.max(number, 0)
    while steer >= 0:
        mine = number == steer
        weight = steer.to(tl.int64) * r + rank
        z = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            read = start + tl.arange(0, BLOCK_D)
            x_at = row[:, None] * d + read[None, :]
            x = tl.load(X + x_at, mask=mine[:, None] & (read < d)[None, :], other=0.0)
            down_at = weight[None, :] * d + read[:, None]
            within = ranked[None, :] & (read < d)[:, None]
            down = tl.load(DOWN + down_at, mask=within, other=0.0)
            z = product(x.to(weights), down, z, PRECISION, INTERPRETED)
        if HAS_BIAS:
            bias = tl.load(BIAS + weight, mask=ranked, other=0.0)
            z += bias.to(tl.float32)[None, :]
        own_at = row[:, None] * r + rank[None, :]
        own = mine[:, None] & ranked[None, :]
        if SAVE_Z:
            tl.store(Z + own_at, z, mask=own)
        if GATED:
            a = z * slope(tl.load(GATE + own_at, mask=own, other=0.0), ACTIVATION)
        else:
            a = activated(z, ACTIVATION)
        if HAS_SCALE:
            scale = tl.load(SCALE + row // scale_each, mask=mine, other=0.0)
            a = a * scale.to(tl.float32)[:, None]
        a = tl.where(own, a, 0.0)
        high = rounded(a, weights, INTERPRETED)
        if split:
            low = rounded(a - high.to(tl.float32), weights, INTERPRETED)
        for start in range(0, e, BLOCK_D):
            write = start + tl.arange(0, BLOCK_D)
            up_at = weight[:, None] * e + write[None, :]
            there_up = ranked[:, None] & (write < e)[None, :]
            up = tl.load(UP + up_at, mask=there_up, other=0.0)
            y_at = row[:, None] * e + write[None, :]
            taken = mine[:, None] & (write < e)[None, :]
            if HAS_BASE:
                y = tl.load(BASE + y_at, mask=taken, other=0.0).to(tl.float32)
            else:
                y = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            y = product(high, up, y, PRECISION, INTERPRETED)
            if split:
                y = product(low, up, y, PRECISION, INTERPRETED)
            tl.store(OUT + y_at, rounded(y, to, INTERPRETED), mask=taken)
        steer = tl.max(tl.where(number < steer, number, -1), 0)
