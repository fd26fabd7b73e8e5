"""A small call of any Hugging Face model, drawn at random: something to try it with."""

from typing import Any

import torch
from torch import Tensor, nn

from equiv.model.batches import Batch

_ROWS, _TOKENS = 2, 6


def drawn_call(model: nn.Module) -> Batch | None:
    """Two short sequences of random ids, or two random images, as the model reads.

    `None` for a model that reads something else.

    Example:
        >>> from equiv.testing.models import transformer
        >>> batch = drawn_call(transformer("vit"))
        >>> batch.arguments["pixel_values"].shape
        torch.Size([2, 3, 8, 8])
    """
    name = getattr(model, "main_input_name", "input_ids")
    drawn = {"input_ids": _ids, "pixel_values": _images}.get(name)
    main = None if drawn is None else drawn(model)
    if main is None:
        return None
    first = next(model.parameters())
    if main.is_floating_point():
        main = main.to(first.dtype)
    columns = main.shape[1] if name == "input_ids" else 1
    mask = torch.ones(_ROWS, columns, dtype=torch.bool, device=first.device)
    arguments: dict[str, Any] = {name: main.to(first.device)}
    if name == "input_ids":
        arguments["use_cache"] = False
    return Batch(arguments, mask, index=tuple(range(_ROWS)))


def _ids(model: Any) -> Tensor | None:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        return None
    generator = torch.Generator().manual_seed(0)
    # The first ids are padding and the like, which some models treat apart.
    low = min(4, size - 1)
    return torch.randint(low, size, (_ROWS, _TOKENS), generator=generator)


def _images(model: Any) -> Tensor | None:
    size = getattr(model.config, "image_size", None)
    channels = getattr(model.config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else tuple(size or (0, 0))
    if not height:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_ROWS, channels, height, width, generator=generator)
