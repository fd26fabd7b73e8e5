"""Models and files from a path or hub id; loading never runs code from there."""

from pathlib import Path
from typing import Any

from torch import nn

from equiv.errors import FileFormatError, UnsupportedModelError


def is_local(name: str) -> bool:
    """Whether a name is meant as a path on this machine rather than as a hub id."""
    outside = name.startswith((".", "/", "~")) or name.endswith(".safetensors")
    return outside or Path(name).exists()


def load_saved(name: str) -> nn.Module:
    """A Hugging Face model from a path or hub id, with the head it was saved with.

    Raises:
        FileFormatError: If nothing can be loaded from there.
        UnsupportedModelError: If the saved class is not known to transformers.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise FileFormatError(
            f"Expected a model in {Path(name)}: no config.json there."
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(_not_found("load a model from", name, error)) from None
    saved = (config.architectures or [None])[0]
    loader = getattr(transformers, saved, None) if saved else AutoModel
    if loader is None:
        raise UnsupportedModelError(
            f"{name!r} holds a {saved}, which transformers does not have. Code from a "
            "model's own folder is never run."
        )
    return load_model(loader, name)


def load_model(loader: Any, name: str) -> Any:
    """A Hugging Face model in its stored dtype, from safetensors.

    Args:
        loader: Its class, with a `from_pretrained`.
        name: A directory or hub id.

    Raises:
        FileFormatError: If nothing can be loaded from there.
    """
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(name, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileFormatError(_not_found("load a model from", name, error)) from None


def hub_file(name: str, file: str) -> Path | None:
    """One file of a hub repository, from the cache or the hub; `None` if it has none.

    Raises:
        FileFormatError: If the repository cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileFormatError(_not_found("find", name, error)) from None


def _not_found(do: str, name: str, error: Exception) -> str:
    said = f"Cannot {do} {name!r}: {str(error).strip().rstrip('.')}"
    return f"{said}." if is_local(name) else f"{said}; and there is no such local path."
