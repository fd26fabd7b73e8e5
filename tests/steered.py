"""Steering of a small Llama in all its ways, and what "nothing is left" means."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiv import Affine, LoReFT, LowRankMLP, Vector
from equiv.testing.models import transformer

IDS = torch.tensor([[3, 9, 4, 11, 5], [0, 0, 7, 8, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return transformer("llama", dtype=dtype)


def run(model: Any) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation() -> Tensor:
    return torch.linalg.qr(random(16, 2))[0].T


def steering(seed: int = 0) -> dict[Any, Any]:
    """Several forms at several sites of both layers."""
    return {
        (0, "block_out"): Vector(random(16, seed=seed)),
        (0, "mlp_in"): LowRankMLP(random(2, 16, seed=seed), random(16, 2)),
        (1, "resid_mid"): Affine(random(3, 16, seed=seed), random(16, 3)),
        (1, "mlp_out"): LoReFT(rotation(), random(2, 16, seed=seed), random(2)),
        (1, "attn_heads->block_out"): Vector(random(16, seed=seed + 1)),
    }


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "all": (steering(), {}),
    "other values": (steering(7), {}),
    "another dtype": (
        {key: form.to("cpu", torch.float64) for key, form in steering().items()},
        {},
    ),
    "other sites": ({(0, "mlp_out"): Vector(random(16))}, {}),
    "one more site": ({(0, s): Vector(random(16)) for s in ("mlp_in", "mlp_out")}, {}),
    "positions": (steering(), {"positions": "first 2 + last"}),
    "mask": (steering(), {"positions": MASK.bool().flip(0)}),
    "rows": ([steering(), {(0, "mlp_out"): Vector(random(16))}], {"index": [1, 0]}),
    "rows and positions": (
        [{(0, "block_out"): Vector(random(16))}],
        {"index": [-1, 0], "positions": "last 2"},
    ),
}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What modules hold is afterwards what it was, in the same order."""

    def state() -> list[tuple[str, list[str], list[list[int]]]]:
        return [
            (
                name,
                list(vars(module)),
                [list(module._forward_hooks), list(module._forward_pre_hooks)],
            )
            for name, module in model.named_modules()
        ]

    before = state()
    yield
    assert state() == before
