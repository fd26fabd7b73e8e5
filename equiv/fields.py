"""Frozen dataclasses as fields that strict JSON can hold, and back.

Strict JSON has no NaN and no infinity; they are written as text.
"""

import dataclasses
import math
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from equiv.errors import FileFormatError

T = TypeVar("T")

# JSON has no numbers for these.
SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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
        if isinstance(value, str) and value in SPECIAL:
            return SPECIAL[value]
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
