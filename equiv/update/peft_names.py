"""What PEFT calls things: its models, and its names around a base's own parameters."""

import re

from torch import nn

# What every kind of adapter calls its own parameters; a test compares with PEFT's list.
_ADDED = (
    "adamss_|beft_|boft_|c3a_|deft_|delora_|fourierft_|frod_|glora_|gralora_|hada_|"
    "hira_|hra_|ia3_|lily_|ln_tuning_|lokr_|lora_|miss_|modules_to_save|oft_|osf_|"
    "peanut_|poly_|psoft_|pvera_|randlora_|ranknum|road_|shadow_|shira_|supertuning_|"
    "tinylora_|trainable_tokens_|unilora_|vblora_|vera_|waveft_|xlora_"
)
_IS_ADDED = re.compile(rf"(^|\.)({_ADDED})")
_AROUND = (".base_layer", ".original_module", ".token_adapter")


def is_peft(model: object) -> bool:
    """Whether this is a `PeftModel`, without importing PEFT."""
    return isinstance(model, nn.Module) and any(
        c.__name__ == "PeftModel" and c.__module__.startswith("peft.")
        for c in type(model).__mro__
    )


def base_of(adapted: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`."""
    return adapted.get_base_model()  # pyright: ignore


def has_adapters(model: object) -> bool:
    """Whether adapters are in this model: a `PeftModel`, or loaded by transformers.

    `from_pretrained` of an adapter's folder, `load_adapter` and `add_adapter` put
    PEFT's layers into a model of transformers, which is then no `PeftModel`.
    """
    return is_peft(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def inside(adapted: nn.Module) -> nn.Module:
    """The model whose layers the adapters are around."""
    return base_of(adapted) if is_peft(adapted) else adapted


def is_own(name: str) -> bool:
    """Whether a parameter belongs to the base and not to an adapter.

    Example:
        >>> is_own("layers.0.q_proj.base_layer.weight")
        True
        >>> is_own("layers.0.q_proj.hra_u.default")
        False
    """
    return _IS_ADDED.search(name) is None


def clean(name: str) -> str:
    """The name that a parameter had before PEFT wrapped its module.

    Example:
        >>> clean("layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
    """
    for around in _AROUND:
        name = name.replace(around, "")
    return name
