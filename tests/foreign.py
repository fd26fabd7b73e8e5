"""Small steering, and what would run code, for the tests of other tools' files."""

import io
from typing import Any

import torch
from torch import Tensor

import equiv

D, R = 6, 2
KEY = "layer_3_comp_block_output_unit_pos_nunit_1#0"  # of pyreft
IDS = torch.tensor([[3, 9, 4, 11, 5]])
H = torch.randn(5, D, generator=torch.Generator().manual_seed(99))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(seed: int = 0) -> equiv.Vector:
    return equiv.Vector(drawn(D, seed=seed))


def affine(seed: int = 0, *, bias: bool = True) -> equiv.Affine:
    return equiv.Affine(
        drawn(R, D, seed=seed), drawn(D, R, seed=seed + 1), drawn(D) if bias else None
    )


def loreft(seed: int = 0) -> equiv.LoReFT:
    rows = torch.linalg.qr(drawn(D, R, seed=seed))[0].T.contiguous()
    return equiv.LoReFT(rows, drawn(R, D, seed=seed + 1), drawn(R, seed=seed + 2))


def mlp(activation: str = "silu") -> equiv.LowRankMLP:
    return equiv.LowRankMLP(drawn(R, D), drawn(D, R, seed=1), activation=activation)


def same_map(actual: equiv.Steering, expected: Tensor) -> None:
    """What a steer adds to H; a few dozen float32 products of numbers up to ten."""
    torch.testing.assert_close(actual(H), expected, rtol=1e-5, atol=1e-5)


class Bomb:
    """Unpickling it would raise."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
