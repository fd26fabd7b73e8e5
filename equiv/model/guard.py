"""Leave the user's model exactly as it was: mode, hooks, forwards, RNG, adapters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from equiv.errors import UnsupportedModelError
from equiv.model.packed import unpacked

# Settings of a configuration, in Transformers' words, whose choices may have no
# forward-mode derivative of their own, those that have none, and what computes the same
# function: `sdpa` with the math backend, and experts one after the other.
_IMPLEMENTATIONS = {
    "_attn_implementation_internal": (
        ("flash", "flex", "paged", "sage", "kernels"),
        "sdpa",
    ),
    "_experts_implementation_internal": (
        ("grouped_mm", "batched_mm", "gemm", "moe"),
        "eager",
    ),
}


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """Make `model` ready to be measured, and put everything back afterwards.

    Dropout is off, gradients are off, autocast is off, adapters injected by PEFT are
    disabled; what the model keeps about itself and the random state of torch are
    restored, also after an exception.
    """
    check_model(model)
    training = [(module, module.training) for module in model.modules()]
    adapters = _adapter_layers(model)
    chosen = _implementations(model)
    cpu_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for module, _ in training:
            module.training = False
        for module, _ in adapters:
            vars(module)["_disable_adapters"] = True
        for config, name, _ in chosen:
            setattr(config, name, _IMPLEMENTATIONS[name][1])
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(kept(model, buffers=True))
            for device in {"cpu", *(p.device.type for p in model.parameters())}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for module, own in adapters:
            # Most layers only inherit the flag from their class: leave no copy behind.
            vars(module).pop("_disable_adapters", None)
            vars(module).update(own)
        for config, name, implementation in chosen:
            setattr(config, name, implementation)
        torch.random.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def kept(model: nn.Module, *, buffers: bool = False) -> Iterator[None]:
    """Put back what modules note down about themselves during a forward.

    Rotary embeddings that stretch with the sequence, for instance, keep the longest
    length seen, and the next forward would be another function. Parameters too:
    `functional_call` leaves its own in a module that goes by two names.

    Args:
        model: The model.
        buffers: Whether buffers that were changed in place are put back too.
    """
    before = [
        (m, dict(vars(m)), dict(m._buffers), dict(m._parameters))
        for m in model.modules()
    ]
    held = [b for _, _, own, _ in before for b in own.values() if b is not None]
    copies = [(b, b._version, b.clone()) for b in held] if buffers else []
    try:
        yield
    finally:
        for module, attributes, own, parameters in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(own)
            module._parameters.clear()
            module._parameters.update(parameters)
        for buffer, version, copy in copies:
            if buffer._version != version:
                buffer.copy_(copy)


# Methods of quantisation whose tensors give their values back: see `packed.py`.
_GIVE_BACK = ("torchao",)

_WRAPPERS = {
    "PeftModel": "model.get_base_model()",
    "OptimizedModule": "model._orig_mod",
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "FullyShardedDataParallel": "the model before it was wrapped",
}


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be measured, by name.

    Raises:
        UnsupportedModelError: If `model` is not a module, is a wrapper around one, is
            on the meta device, is quantised, or holds a merged adapter.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"Expected a `torch.nn.Module`, got {type(model).__name__}."
        )
    for kind in type(model).__mro__:
        if kind.__name__ in _WRAPPERS:
            raise UnsupportedModelError(
                f"Expected the base model itself, got a {kind.__name__} around it: "
                f"pass `{_WRAPPERS[kind.__name__]}`."
            )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"`{name}` is on the meta device: it has a shape but no values. Load "
                "the weights before measuring."
            )
    _check_not_quantised(model)
    for module, _ in _adapter_layers(model):
        if getattr(module, "merged", False):
            raise UnsupportedModelError(
                "An adapter is merged into this model, so its base is not at hand. "
                "Call `model.unmerge_adapter()`, or pass a base without the adapter."
            )


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite; reads all of them.

    Raises:
        UnsupportedModelError: If there are any.
    """
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(unpacked(tensor)).all()):
            raise UnsupportedModelError(
                f"`{name}` of the model has NaN or infinite entries: nothing can be "
                "measured on it. Did the training of this model diverge?"
            )


def _check_not_quantised(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    wrong = next(
        (
            name
            for name, tensor in model.named_parameters()
            if not tensor.is_floating_point()
        ),
        None,
    )
    quantised = next(
        (
            name
            for name, module in model.named_modules()
            if type(module).__module__.startswith(
                ("torch.ao.nn.quantized", "bitsandbytes", "torchao")
            )
        ),
        None,
    )
    known = method is None or method in _GIVE_BACK
    if not known or wrong is not None or quantised is not None:
        found = method or f"`{wrong or quantised}`"
        can = str(method).startswith("bitsandbytes") and hasattr(model, "dequantize")
        copy = "`model.dequantize()`" if can else "a dequantised copy"
        raise UnsupportedModelError(
            f"The model is quantised ({found}): its weights have no derivative. "
            f"Measure the model it was quantised from, or {copy}."
        )


def _adapter_layers(model: nn.Module) -> list[tuple[nn.Module, dict[str, bool]]]:
    """Modules that PEFT put in place of others, with their own "disabled" flag."""
    name = "_disable_adapters"
    return [
        (module, {name: vars(module)[name]} if name in vars(module) else {})
        for module in model.modules()
        if hasattr(module, name)
    ]


def _implementations(model: nn.Module) -> list[tuple[Any, str, str]]:
    """Configurations, settings and their choices that have no forward-mode derivative.

    Modules share configurations; each is named once.
    """
    found: dict[tuple[int, str], tuple[Any, str, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, (without, _) in _IMPLEMENTATIONS.items():
            chosen = getattr(config, name, None)
            if isinstance(chosen, str) and any(n in chosen for n in without):
                found[id(config), name] = (config, name, chosen)
    return list(found.values())
