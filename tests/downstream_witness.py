"""The dense Jacobian between two sites, by reverse mode through plain hooks."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import witness
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import equiv


def later(
    model: Any, key: tuple[int, str], at: Any, ids: Tensor
) -> Callable[[Tensor], Tensor]:
    """Δ [batch, seq, d] at a site → the activation at a later one."""
    path, sites = witness.PLACES[model.config.model_type]
    inner, side = sites[key[1]]
    module = model.get_submodule(path)[key[0]].get_submodule(inner)
    before = witness.activations(model, {}, {"input_ids": ids})

    def run(delta: Tensor) -> Tensor:
        def add(_m: nn.Module, args: Any, out: Any = None) -> Any:
            if side == "input":
                return (args[0] + delta, *args[1:])
            return (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

        with ExitStack() as stack, witness.own_arithmetic():
            hook = (
                module.register_forward_pre_hook
                if side == "input"
                else module.register_forward_hook
            )
            stack.callback(hook(add).remove)
            return witness.activations(model, {}, {"input_ids": ids})[at]

    run.shape = before[key].shape  # type: ignore[attr-defined]
    return run


def dense(model: Any, key: tuple[int, str], at: Any, ids: Tensor) -> np.ndarray:
    """J, [rows of the later site · e, rows of the write site · d]."""
    run = later(model, key, at, ids)
    zero = torch.zeros(run.shape, dtype=torch.float64)  # type: ignore[attr-defined]
    found = jacobian(run, zero)
    assert isinstance(found, Tensor)
    return found.reshape(-1, zero.numel()).numpy()


def wanted(model: Any, update: equiv.Update, at: Any, ids: Tensor) -> np.ndarray:
    """The update's shift at a site, flat."""
    call = {"input_ids": ids}
    tuned = witness.tuned_activations(model, update, call)
    base = witness.tuned_activations(model, update, call, t=0.0)
    return (tuned[at] - base[at]).reshape(-1).numpy()


def read(model: Any, key: tuple[int, str], ids: Tensor) -> np.ndarray:
    """The base activation at a site, [tokens, d]."""
    with witness.own_arithmetic(), torch.no_grad():
        found = witness.activations(model, {}, {"input_ids": ids})[key]
    return found.reshape(-1, found.shape[-1]).numpy()


def columns(x: np.ndarray, width: int, form: str) -> np.ndarray:
    """Numbers of a form → Δ, flat: [tokens · width, numbers]."""
    ones, eye = np.ones((len(x), 1)), np.eye(width)
    features = {"vector": ones, "linear": x, "affine": np.hstack([x, ones])}[form]
    return np.kron(features, eye)
