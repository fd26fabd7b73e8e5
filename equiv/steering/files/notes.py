"""What is known of steering, as JSON can hold it: no NaN, text as keys.

NaN and infinities become the texts "NaN", "Infinity" and "-Infinity", and come back as
numbers; tuples come back as lists.
"""

from collections.abc import Mapping
from typing import Any

from equiv.arguments import shown
from equiv.errors import ArgumentError
from equiv.fields import SPECIAL, encoded


def as_notes(about: Mapping[str, object]) -> dict[str, Any]:
    """Notes as strict JSON can hold them.

    Raises:
        ArgumentError: If a key is no text, or a value is nothing that JSON has.

    Example:
        >>> as_notes({"misfits": (0.25, float("nan"))})
        {'misfits': [0.25, 'NaN']}
    """
    _check(about, "about")
    return encoded(dict(about))


def from_notes(value: Any) -> Any:
    """What `as_notes` was given.

    Example:
        >>> from_notes({"misfits": [0.25, "Infinity"]})
        {'misfits': [0.25, inf]}
    """
    if isinstance(value, dict):
        return {key: from_notes(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_notes(entry) for entry in value]
    return SPECIAL.get(value, value) if isinstance(value, str) else value


def _check(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ArgumentError(
                    f"Expected text as keys of `{where}`, got {shown(key)}."
                )
            _check(entry, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            _check(entry, f"{where}[{number}]")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ArgumentError(
            f"Expected `{where}` to be something that JSON has (text, numbers, truth "
            f"values, lists, mappings), got {type(value).__name__}."
        )
