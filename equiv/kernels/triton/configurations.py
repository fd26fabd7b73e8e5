"""Tile sizes: a function of width, rank and dtype, never of the batch, and not tuned.

So a row's result is the same in every batch, and from run to run. What is shipped is
compiled ahead of time in the tests (`ahead`), which look for spilled registers.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Configuration:
    """One way to compile a kernel.

    Attributes:
        rows: BLOCK_M.
        columns: BLOCK_D.
        ranks: BLOCK_R; 0 for kernels without.
        warps: Of 32 threads, per program.
        stages: How many tiles are under way from memory at once.
    """

    rows: int
    columns: int
    ranks: int = 0
    warps: int = 4
    stages: int = 3


def elementwise(d: int, dtype: torch.dtype) -> Configuration:
    """Of the kernels of vectors: 16 bytes per thread and load, some 8 loads each."""
    columns = min(1 << (d - 1).bit_length(), 2048 // dtype.itemsize)
    return Configuration(max(1, 8192 // dtype.itemsize // columns), columns)


def precision(weights: torch.dtype) -> str:
    """How tensor cores multiply: float32 as three products of TensorFloat-32."""
    return "tf32x3" if weights == torch.float32 else "tf32"


def low_rank(r: int, weights: torch.dtype) -> Configuration:
    """Of the low-rank kernel.

    A larger rank has larger tiles of rows, since a tile reads all of a steer's weights;
    a product on tensor cores needs 16 ranks at least. With these, two or three programs
    share a multiprocessor's registers.
    """
    ranks = max(16, 1 << (r - 1).bit_length())
    if weights == torch.float32:
        return Configuration(16, 64, ranks, warps=8 if ranks > 32 else 4)
    if ranks <= 16:
        return Configuration(16, 128, ranks, stages=4)
    if ranks <= 32:
        return Configuration(32, 64, ranks, stages=4)
    return Configuration(32, 64, ranks, warps=8)
