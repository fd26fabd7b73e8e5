"""Models and files from a path or hub id; loading never runs code from there."""

from pathlib import Path
from typing import Any

from equiv.errors import FileFormatError


def is_local(name: str) -> bool:
    """Whether a name is meant as a path on this machine rather than as a hub id."""
    outside = name.startswith((".", "/", "~")) or name.endswith(".safetensors")
    return outside or Path(name).exists()


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
        raise FileFormatError(f"Cannot load a model from {name!r}: {error}") from None


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
        raise FileFormatError(f"Cannot find {name!r}: {error}") from None
