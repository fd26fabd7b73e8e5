"""The update of a live model with adapters, one adapted module at a time.

Plain LoRA stays in factors. Every other kind is merged by PEFT on a copy of the
module, in float64, and the base's own weight subtracted: what PEFT's
`get_delta_weight` says is not what it merges for every kind (DoRA).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import UpdateError
from equiv.update.lora import layer_deltas, moves_base
from equiv.update.low_rank import Delta, LowRank
from equiv.update.peft_names import clean, inside, is_own, is_peft
from equiv.update.ties import each_once
from equiv.update.update import Update

# Kinds that PEFT would "merge" although what they add depends on the input.
_BY_INPUT = ("POLY", "XLORA")


def from_model(adapted: nn.Module, model: nn.Module | None = None) -> Update:
    """The update of a model's active adapters.

    Args:
        adapted: A `PeftModel`, or a model of transformers with adapters in it.
        model: The base that the update is for, if it is not the one inside `adapted`.

    Raises:
        UpdateError: If the adapter is merged, cannot be merged, is on one of several
            modules that share a weight, or has changed the base's own weights and
            there is no other base.
    """
    configs = [_as_dict(adapted.peft_config[name]) for name in _active(adapted)]  # pyright: ignore
    base = inside(adapted)
    _check_mergeable(adapted, configs)
    moved = any(moves_base(config) for config in configs)
    if moved and (model is None or model is base):
        raise UpdateError(
            "PEFT has changed the base's own weights in place for this adapter (made "
            "with `bias=`, or an `init_lora_weights` such as PiSSA), so their old "
            "values are gone. Pass a base loaded afresh: `equiv.check(base, adapted)`."
        )
    deltas: dict[str, Delta] = {}
    for name, module in _wrapped(base):
        own = layer_deltas(module)
        if own is None:
            own = _merged_difference(module, configs)
        deltas |= {f"{clean(name)}.{last}": delta for last, delta in own.items()}
    source = _kinds(configs, deltas)
    if model is not None and (apart := base_differences(base, model)):
        deltas = _added(deltas, apart)
        source += "" if moved else f", {len(apart)} of the base's own weights differ"
    if not deltas:
        raise UpdateError(
            "The active adapters change nothing: is one active, and was it trained?"
        )
    return Update.from_dict(each_once(deltas, base), source=source)


def _active(adapted: Any) -> list[str]:
    """Names of the active adapters: PEFT has a property, transformers a method."""
    found: Any = adapted.active_adapters
    return list(found if is_peft(adapted) else found())


def _as_dict(config: Any) -> dict[str, Any]:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return {**config.to_dict(), "peft_type": kind}


def _check_mergeable(adapted: Any, configs: list[dict[str, Any]]) -> None:
    for module in adapted.modules():
        if getattr(module, "merged", False):
            raise UpdateError(
                "The adapter is merged into its base. Call `unmerge_adapter()` first, "
                "or pass the base and the merged model."
            )
    kinds = [_as_dict(config)["peft_type"] for config in adapted.peft_config.values()]
    for kind in kinds:
        if kind in _BY_INPUT:  # X-LoRA's experts are active, it is not
            raise _no_update(kind)
    if is_peft(adapted) and not hasattr(adapted.base_model, "merge_and_unload"):
        raise _no_update(configs[0]["peft_type"])


def _no_update(kind: str, said: object = None) -> UpdateError:
    because = "" if said is None else f" PEFT says: {str(said).strip().rstrip('.')}."
    return UpdateError(
        f"An adapter of kind {kind} cannot be merged into its base: what it adds is no "
        f"fixed difference of weights.{because} Expected a kind that PEFT can merge, "
        "such as LoRA."
    )


def _wrapped(base: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT put around the base's own, outermost ones only."""
    for name, module in base.named_children():
        path = f"{prefix}{name}"
        if hasattr(module, "base_layer") or _is_auxiliary(module):
            yield path, module
        else:
            yield from _wrapped(module, f"{path}.")


def _is_auxiliary(module: nn.Module) -> bool:
    """Whether this holds a module trained whole, or some of an embedding's tokens."""
    return hasattr(module, "unload_and_optionally_merge_module")


def _merged_difference(
    module: nn.Module, configs: list[dict[str, Any]]
) -> dict[str, Delta]:
    """Merged minus base of one module, by the names of the module's own parameters."""
    before = {
        clean(f".{name}").removeprefix("."): parameter.detach()
        for name, parameter in module.named_parameters()
        if is_own(f".{name}")
    }
    after = _merged(module, configs).named_parameters()
    return {
        name: found.detach() - before[name].double()
        if name in before
        else found.detach()
        for name, found in after
        if name not in before or not torch.equal(found, before[name].double())
    }


def _merged(module: nn.Module, configs: list[dict[str, Any]]) -> nn.Module:
    """The base's module with the adapter in it, a copy in float64.

    In half precision merging would round away most of a small update.
    """
    copied: Any = copy.deepcopy(module).double()
    try:
        if _is_auxiliary(copied):
            return copied.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        copied.merge()
        return copied.get_base_layer()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _no_update(_kinds(configs, {}), error) from None


def base_differences(base: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """How far the base inside a `PeftModel` is from another one, where they differ."""
    within = {clean(n): p.detach() for n, p in base.named_parameters() if is_own(n)}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        own, weight = within.get(clean(name)), parameter.detach()
        if own is None or own.shape != weight.shape or own is weight:
            continue
        if not _close(own, weight):
            found[clean(name)] = own.double() - weight.double().to(own.device)
    return found


def _added(deltas: dict[str, Delta], apart: dict[str, Tensor]) -> dict[str, Delta]:
    found = dict(deltas)
    for name, difference in apart.items():
        found[name] = difference + _dense(found[name]) if name in found else difference
    return found


def _close(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are one, to the rounding of either dtype."""
    rounding = max(torch.finfo(t.dtype).eps for t in (first, second))
    a, b = first.double(), second.double().to(first.device)
    return torch.allclose(a, b, rtol=rounding, atol=0)


def _dense(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def _kinds(configs: list[dict[str, Any]], deltas: dict[str, Delta]) -> str:
    """The kinds of the adapters in words."""
    kinds = " + ".join(dict.fromkeys(_kind(config) for config in configs))
    if kinds == "LoRA" and any(isinstance(d, LowRank) for d in deltas.values()):
        return kinds
    return f"{kinds} adapter" if deltas else kinds


def _kind(config: dict[str, Any]) -> str:
    if config.get("use_dora"):
        return "DoRA"
    return "LoRA" if config["peft_type"] == "LORA" else config["peft_type"]
