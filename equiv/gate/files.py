"""The gate's results as JSON files: strict JSON, whole or absent, equal when read back.

One file holds an agreement, a diagnosis, or both: `format`, `answer`, and the fields
under `agreement` and `diagnosis`.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

from equiv.errors import FileFormatError
from equiv.fields import whole
from equiv.gate.values import FORMAT, Agreement, Diagnosis
from equiv.report.files import read_format, write_fields

Found = TypeVar("Found", Agreement, Diagnosis)

_WHAT = "comparison"


def answer(agreement: Agreement | None, diagnosis: Diagnosis | None) -> str:
    """What was found, in one line.

    Example:
        >>> answer(Agreement("a", "b", "weights to the rounding of float32"), None)
        'Same: a is b: weights to the rounding of float32'
    """
    parts = []
    if agreement is not None:
        word = "Same" if agreement.same else "Not the same"
        parts.append(f"{word}: {agreement.reason}")
    if diagnosis is not None:
        parts.append(f"{diagnosis.update}: {diagnosis.looks_like}")
    return ". ".join(parts)


def write_json(
    path: Path,
    *,
    agreement: Agreement | None = None,
    diagnosis: Diagnosis | None = None,
) -> None:
    """Write what was found, either or both."""
    content: dict[str, object] = {
        "format": FORMAT,
        "answer": answer(agreement, diagnosis),
    }
    for found in (agreement, diagnosis):
        if found is not None:
            fields = dataclasses.asdict(found)
            del fields["format"]  # the file says it
            content[_key(type(found))] = fields
    write_fields(content, path)


def read_json(kind: type[Found], path: Path) -> Found:
    """Read an agreement or a diagnosis.

    Raises:
        FileFormatError: If the file is missing or damaged, or holds none.
    """
    content = read_format(path, _WHAT, FORMAT)
    if _key(kind) not in content:
        raise FileFormatError(f"{path} holds no {_key(kind)}.")
    return whole(kind, content[_key(kind)], path, _WHAT)


def _key(kind: type) -> str:
    return kind.__name__.lower()
