"""Small models with random weights, made from a seed: nothing is downloaded.

Weights are drawn wider than for training, so that the models are far from linear and
a wrong second-order term cannot hide.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from equiv.errors import ArgumentError

# Smooth ones first; a ReLU has kinks, where second order may fail.
SMOOTH = {"tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}
ACTIVATIONS = {**SMOOTH, "relu": nn.ReLU}

VOCABULARY = 32
_SPREAD = 0.2  # standard deviation of the weights

# No padding token: its embedding would be zero, where an RMS norm bends so sharply
# (over a distance of √ε) that no probed scale of an update is small.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": _SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": _SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": _SPREAD,
}

_GEMMA2 = {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 32}

# Family → names of configuration and model class in transformers, and the settings.
_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA2),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
}
FAMILIES = tuple(_CLASSES)


def mlp(
    widths: Sequence[int] = (4, 8, 3),
    activation: str = "tanh",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear layers with an activation between them; the last layer is linear.

    Args:
        widths: Widths of input, hidden layers and output.
        activation: One of `ACTIVATIONS`.
        seed: Draws the weights.
        dtype: Of the weights.

    Raises:
        ArgumentError: If the activation is unknown.

    Example:
        >>> mlp((2, 5, 3))(torch.zeros(1, 2, dtype=torch.float64)).shape
        torch.Size([1, 3])
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            f"Expected an activation in {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    layers: list[nn.Module] = []
    with _seeded(seed):
        for i, (inside, outside) in enumerate(
            zip(widths, list(widths)[1:], strict=False)
        ):
            layers += [ACTIVATIONS[activation]()] if i else []
            layers += [nn.Linear(inside, outside, dtype=dtype)]
    return nn.Sequential(*layers).eval()


def transformer(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> Any:
    """A tiny Hugging Face model of a family, with random weights, in eval mode.

    Two layers of width 16 over 32 token ids unless `config` says otherwise.

    Args:
        family: One of `FAMILIES`.
        seed: Draws the weights.
        dtype: Of the weights.
        **config: Settings of the model's configuration class.

    Raises:
        ArgumentError: If the family is unknown.

    Example:
        >>> model = transformer("gpt2", n_layer=3)
        >>> len(model.transformer.h)
        3
    """
    import transformers

    if family not in _CLASSES:
        raise ArgumentError(
            f"Expected a family in {', '.join(FAMILIES)}, got {family!r}."
        )
    config_name, model_name, settings = _CLASSES[family]
    made = getattr(transformers, config_name)(**{**settings, **config})
    with _seeded(seed):
        model = getattr(transformers, model_name)(made)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms: away from exact 0 and 1
                parameter.data += _SPREAD * torch.randn_like(parameter)
    return model.to(dtype=dtype).eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
