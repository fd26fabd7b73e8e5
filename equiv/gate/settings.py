"""Settings of two Hugging Face models that make them different functions."""

import re
from typing import Any

from torch import nn

# What says where a model came from or how it is run, not what it computes.
_ASIDE = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|use_cache|.*_token_id|"
    r"output_.*|return_dict|id2label|label2id|problem_type|.*drop(out)?(_.*)?|.*_pdrop|"
    r"initializer_.*|gradient_checkpointing|task_specific_params|name_or_path|"
    r"tie_word_embeddings|model_max_length|summary_.*|pretraining_tp|num_labels|"
    r"chunk_size_.*|bos_.*|eos_.*|pad_.*|is_decoder|add_cross_attention"
)


def different_settings(actual: nn.Module, expected: nn.Module) -> tuple[str, ...]:
    """Each setting that differs, with both values; none for plain modules.

    Example:
        >>> from equiv.testing.models import transformer
        >>> odd = transformer("llama", rms_norm_eps=0.5)
        >>> different_settings(transformer("llama"), odd)
        ('rms_norm_eps 1e-06, expected 0.5',)
    """
    mine, theirs = (_settings(model) for model in (actual, expected))
    return tuple(
        f"{name} {mine.get(name)!r}, expected {theirs.get(name)!r}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    )


def _settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    entries: dict[str, Any] = config.to_dict()
    return {n: value for n, value in entries.items() if not _ASIDE.fullmatch(n)}
