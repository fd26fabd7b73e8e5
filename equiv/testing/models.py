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
from equiv.testing.configurations import CLASSES, SPREAD
from equiv.testing.configurations import EVERY_FAMILY as EVERY_FAMILY
from equiv.testing.configurations import FAMILIES as FAMILIES
from equiv.testing.configurations import PAIRED as PAIRED
from equiv.testing.configurations import VOCABULARY as VOCABULARY

# Smooth ones first; a ReLU has kinks, where second order may fail.
SMOOTH = {"tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}
ACTIVATIONS = {**SMOOTH, "relu": nn.ReLU}


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

    Two layers of width 16 over 32 token ids unless `config` says otherwise; two each
    in the encoder and the decoder of families that have both.

    Args:
        family: One of `EVERY_FAMILY`.
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

    if family not in CLASSES:
        raise ArgumentError(
            f"Expected a family in {', '.join(EVERY_FAMILY)}, got {family!r}."
        )
    config_name, model_name, settings = CLASSES[family]
    made = getattr(transformers, config_name)(**{**settings, **config})
    with _seeded(seed):
        model = getattr(transformers, model_name)(made)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms: away from exact 0 and 1
                parameter.data += SPREAD * torch.randn_like(parameter)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # others know no float64
    return model.to(dtype=dtype).eval()


def example(model: Any, *, seed: int = 0) -> dict[str, Any]:
    """Inputs for a small model: what it reads, drawn by a seed, two of each.

    A decoder behind an encoder reads fewer tokens than the encoder.

    Example:
        >>> example(transformer("vit"))["pixel_values"].shape
        torch.Size([2, 3, 8, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    config, name = model.config, model.main_input_name
    read = {"decoder_input_ids": (2, 4)} if config.is_encoder_decoder else {}
    ids = {"input_ids": (2, 6), **read} if name == "input_ids" else read
    drawn = {
        name: torch.randint(3, VOCABULARY, shape, generator=generator)
        for name, shape in ids.items()
    }
    if name == "input_ids":
        return drawn
    shape = (
        (config.num_channels, config.image_size, config.image_size)
        if name == "pixel_values"
        else (config.num_mel_bins, 2 * config.max_source_positions)
    )
    sounds = torch.randn(2, *shape, generator=generator, dtype=model.dtype)
    return {name: sounds, **drawn}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
