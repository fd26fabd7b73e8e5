"""Independent ways to the same numbers: plain hooks, brute force, numpy, closed forms.

Nothing here uses the engine. Where a site is, and what it adds up to, is written down
once more from the model's own code, family by family.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from equiv.model.precision import KeepFloat64
from equiv.update.low_rank import LowRank
from equiv.update.update import Update

# How many times as many examples property tests draw; see `make sweep`.
SWEEP = int(os.environ.get("SWEEP", "1"))

# Family → path of the blocks, and (path inside the block, side) of each site.
_LLAMA = {
    "attn_heads": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn", "output"),
    "resid_mid": ("post_attention_layernorm", "input"),
    "mlp_in": ("mlp", "input"),
    "mlp_hidden": ("mlp.down_proj", "input"),
    "mlp_out": ("mlp", "output"),
    "block_out": ("", "output"),
}
PLACES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.layers", _LLAMA)),
    "gemma2": (
        "model.layers",
        {
            **_LLAMA,
            "attn_out": ("post_attention_layernorm", "output"),
            "resid_mid": ("pre_feedforward_layernorm", "input"),
            "mlp_out": ("post_feedforward_layernorm", "output"),
        },
    ),
    "olmo2": (
        "model.layers",
        {
            **_LLAMA,
            "attn_out": ("post_attention_layernorm", "output"),
            "resid_mid": ("mlp", "input"),
            "mlp_out": ("post_feedforward_layernorm", "output"),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            **_LLAMA,
            "attn_heads": ("attn.c_proj", "input"),
            "attn_out": ("attn", "output"),
            "resid_mid": ("ln_2", "input"),
            "mlp_hidden": ("mlp.c_proj", "input"),
        },
    ),
    "bert": (
        "bert.encoder.layer",
        {
            "attn_heads": ("attention.output.dense", "input"),
            "attn_out": ("attention.output.dense", "output"),
            "resid_mid": ("attention.output", "output"),
            "mlp_in": ("intermediate", "input"),
            "mlp_hidden": ("output.dense", "input"),
            "mlp_out": ("output.dense", "output"),
            "block_out": ("", "output"),
        },
    ),
}


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """PyTorch's own attention, by the path that has a derivative, in float64."""
    with sdpa_kernel(SDPBackend.MATH), KeepFloat64():
        yield


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of a few thousand float64 products."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def dense(update: Update) -> dict[str, Tensor]:
    """The update as float64 matrices."""
    return {
        name: delta.dense() if isinstance(delta, LowRank) else delta.double()
        for name, delta in update.deltas.items()
    }


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in model.named_parameters()}


def moved(model: nn.Module, update: Update, t: float) -> dict[str, Tensor]:
    """All parameters at W + tΔW, float64."""
    change = dense(update)
    return {
        name: value + t * change[name] if name in change else value
        for name, value in parameters(model).items()
    }


def layers_of(model: Any) -> int:
    return model.config.num_hidden_layers


def activations(
    model: Any, tensors: Mapping[str, Tensor], call: Mapping[str, Any]
) -> dict[Any, Tensor]:
    """(layer, site) → activation, and "logits", by plain hooks on one whole forward."""
    path, sites = PLACES[model.config.model_type]
    seen: dict[Any, Tensor] = {}

    def keep(key: Any) -> Callable[..., None]:
        return lambda _m, _a, out: seen.update(
            {key: out[0] if isinstance(out, tuple) else out}
        )

    def keep_input(key: Any) -> Callable[..., None]:
        return lambda _m, args: seen.update({key: args[0]})

    with ExitStack() as stack:
        for layer, block in enumerate(model.get_submodule(path)):
            for site, (inner, side) in sites.items():
                module = block.get_submodule(inner)
                key = (layer, site)
                handle = (
                    module.register_forward_hook(keep(key))
                    if side == "output"
                    else module.register_forward_pre_hook(keep_input(key))
                )
                stack.callback(handle.remove)
        out = functional_call(model, dict(tensors), (), {**call, "use_cache": False})
    return {**seen, "logits": out.logits}


def whole_jvp(
    model: Any, update: Update, call: Mapping[str, Any], t: float = 0.0
) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """Activations and their derivative at W + tΔW, by one jvp of the whole model."""
    change = dense(update)
    at = moved(model, update, t)
    fixed = {n: v for n, v in at.items() if n not in change}
    moving = {n: at[n] for n in change}

    def run(own: dict[str, Tensor]) -> dict[Any, Tensor]:
        return activations(model, {**fixed, **own}, call)

    with own_arithmetic(), torch.no_grad():
        values, tangents = jvp(run, (moving,), (change,))[:2]
    return values, tangents


def tuned_activations(
    model: Any, update: Update, call: Mapping[str, Any], t: float = 1.0
) -> dict[Any, Tensor]:
    """Activations at W + tΔW."""
    with own_arithmetic(), torch.no_grad():
        return activations(model, moved(model, update, t), call)


def jacobian_times(
    run: Callable[[dict[str, Tensor]], Tensor],
    at: dict[str, Tensor],
    change: Mapping[str, Tensor],
) -> Tensor:
    """Every partial derivative by `jacfwd`, summed against the change: brute force."""
    jacobian = jacfwd(run)(at)
    assert isinstance(jacobian, dict)
    total = torch.zeros(())
    for name, delta in change.items():
        total = total + torch.tensordot(jacobian[name], delta, dims=delta.ndim)
    return total


def reduced_rank_regression(
    x: np.ndarray, y: np.ndarray, rank: int, ridge: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(map [d, e], bias [e]) of the best rank-r affine map, by numpy's SVD.

    Ridge as in "λ tr(C)/d on the diagonal", done by appending rows to the data.
    """
    mx, my = x.mean(0), y.mean(0)
    xc, yc = x - mx, y - my
    d = x.shape[1]
    level = np.sqrt(ridge * (xc**2).sum() / d)
    xa = np.vstack([xc, level * np.eye(d)])
    ya = np.vstack([yc, np.zeros((d, y.shape[1]))])
    full, *_ = np.linalg.lstsq(xa, ya, rcond=None)
    _, _, right = np.linalg.svd(xa @ full, full_matrices=False)
    kept = right[:rank].T
    weight = full @ kept @ kept.T
    return weight, my - mx @ weight
