"""Inputs for small encoder–decoders, and one jvp of a whole one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.support_witness import Key, activations, places_of
from equiv.model.precision import KeepFloat64
from equiv.testing.models import example

F64 = torch.float64
SITES = ("attn_heads", "attn_out", "cross_out", "resid_mid", "mlp_in", "mlp_hidden")
EVERY = (*SITES, "mlp_out", "block_out")


def padded(model: Any) -> dict[str, Any]:
    """Inputs of which neither stack's rows are all full."""
    call = example(model, seed=5)
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[1, 3:] = 0
    call["decoder_attention_mask"] = mask
    if "input_ids" in call:
        call["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    return call


def several(model: Any, count: int) -> dict[str, Any]:
    """Inputs of `count` times as many sequences."""
    calls = [example(model, seed=seed) for seed in range(count)]
    return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}


def whole(
    model: Any, deltas: Mapping[str, Tensor], call: Mapping[str, Any], t: float
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Activations and their derivative at W + tΔW, by one jvp of the whole model."""
    places = places_of(model.config.model_type, model.config)
    base = {name: p.detach() for name, p in model.named_parameters()}
    at = {name: base[name] + t * delta for name, delta in deltas.items()}

    def run(moving: dict[str, Tensor]) -> dict[Key, Tensor]:
        return activations(model, places, {**base, **moving}, call)

    with sdpa_kernel(SDPBackend.MATH), KeepFloat64(), torch.no_grad():
        values, tangents = jvp(run, (at,), (dict(deltas),))[:2]
    return values, tangents
