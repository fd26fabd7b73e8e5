"""Reports as JSON files: strict JSON, whole or absent, equal when read back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiv.errors import FileFormatError
from equiv.fields import encoded, whole
from equiv.writing import write_text

if TYPE_CHECKING:
    from equiv.report.report import Report


def write_fields(content: object, path: Path) -> None:
    """Write what `encoded` can turn into JSON; the file is whole or absent."""
    write_text(path, json.dumps(encoded(content), indent=1, allow_nan=False))


def write_json(report: "Report", path: Path) -> None:
    """Write a report as JSON."""
    write_fields(report.to_dict(), path)


def read_json(path: Path) -> "Report":
    """Read a report.

    Raises:
        FileFormatError: If the file is missing, not JSON, or no report of this format.
    """
    from equiv.report.report import FORMAT, Report

    content = read_format(path, "report", FORMAT)
    content.pop("answer", None)
    return whole(Report, content, path, "report")


def read_format(path: Path, what: str, number: int) -> dict[str, Any]:
    """The fields of a JSON file that says its format.

    Args:
        path: The file.
        what: What the file should hold, for messages.
        number: The format that is read.

    Raises:
        FileFormatError: If the file is missing, not JSON, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{path} does not exist.") from None
    except OSError as error:
        raise FileFormatError(f"Cannot read {path}: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict) or "format" not in content:
        raise FileFormatError(f"{path} is not a {what}: it has no `format`.")
    if content["format"] != number:
        raise FileFormatError(
            f"{path} has {what} format {content['format']!r}; this version reads "
            f"format {number}."
        )
    return content
