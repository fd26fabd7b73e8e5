"""Files and folders written in one step: whole or absent, on a full disk too."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from equiv.errors import ArgumentError


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        ArgumentError: If the folder does not exist.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        ArgumentError: If the folder does not exist.
    """
    _check_parent(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder of files.

    Args:
        path: The folder; it may exist if it is empty.
        files: File name → content.

    Raises:
        ArgumentError: If its own folder does not exist, or it is not empty.
    """
    _check_parent(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError(
            f"Expected {path} to be a new or empty folder: nothing is overwritten."
        )
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        for name, content in files.items():
            (made / name).write_bytes(content)
        made.chmod(0o755)
        os.replace(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise ArgumentError(f"Expected a folder {path.parent}, which does not exist.")
