"""Files that commands write: refused before the work, told about after it."""

from collections.abc import Callable
from pathlib import Path

import typer

from equiv.errors import FileFormatError


def check_outputs(*paths: Path | None) -> None:
    """Complain before the work about a file that cannot be written.

    Raises:
        FileFormatError: If it cannot.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise FileFormatError(f"Cannot write {path}: no folder {path.parent}.")
        if path is not None and path.is_dir():
            raise FileFormatError(
                f"Cannot write {path}: it is a folder. Name a file in it."
            )


def write_outputs(
    json: Path | None,
    as_json: Callable[[Path], None],
    html: Path | None,
    as_html: Callable[[Path], None],
) -> None:
    """Write what was asked for, and say so.

    Raises:
        FileFormatError: If that fails.
    """
    for path, write in ((json, as_json), (html, as_html)):
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise FileFormatError(f"Cannot write {path}: {error}.") from None
        typer.echo(f"Wrote {path}")
