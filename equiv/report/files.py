"""Reports as JSON files: strict JSON, whole or absent, equal when read back."""

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from equiv.errors import ArgumentError, FileFormatError

if TYPE_CHECKING:
    from equiv.report.report import Report

T = TypeVar("T")

# JSON has no numbers for these.
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: it is whole or absent, also when the disk is full.

    Raises:
        ArgumentError: If the folder does not exist.
    """
    if not path.parent.is_dir():
        raise ArgumentError(f"Expected a folder {path.parent}, which does not exist.")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def whole(kind: type[T], content: Any, path: Path, what: str) -> T:
    """A frozen dataclass from the fields that a file holds.

    Raises:
        FileFormatError: If fields are missing, unknown or of other types.
    """
    try:
        return decoded(kind, content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path} is not a whole {what}: {error}.") from None


def encoded(value: Any) -> Any:
    """A value as JSON can hold it: no NaN, no infinity, no tuples, no enums.

    Example:
        >>> encoded({"radius": (0.5, math.inf)})
        {'radius': [0.5, 'Infinity']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: encoded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value


def decoded(kind: Any, value: Any) -> Any:
    """A value of the annotated type from what JSON holds.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is none of an enum's, or a tuple of another length.

    Example:
        >>> decoded(tuple[float, ...], [0.5, "Infinity"])
        (0.5, inf)
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return decoded(next(a for a in args if a is not types.NoneType), value)
    if dataclasses.is_dataclass(kind):
        return _decoded_fields(kind, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {value!r}")
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(decoded(k, v) for k, v in zip(each, value, strict=True))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return _decoded_plain(kind, value)


def _decoded_fields(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected the fields of {kind.__name__}, got {value!r}")
    hints = typing.get_type_hints(kind)
    if extra := sorted(value.keys() - hints.keys()):
        raise TypeError(f"{kind.__name__} has no field {extra[0]!r}")
    required = {
        f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING
    }
    if missing := sorted(required - value.keys()):
        raise TypeError(f"{kind.__name__} lacks {missing[0]!r}")
    return kind(**{name: decoded(hints[name], entry) for name, entry in value.items()})


def _decoded_plain(kind: Any, value: Any) -> Any:
    if kind is float:
        if isinstance(value, str) and value in _SPECIAL:
            return _SPECIAL[value]
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
