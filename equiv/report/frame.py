"""The rows of a report as a pandas data frame."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from equiv.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas

    from equiv.report.report import Report


def to_frame(report: "Report") -> "pandas.DataFrame":
    """One row per (layer, site, scope); nested fields flattened, curves left out.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MissingExtraError(
            "Data frames need pandas: pip install 'equiv[report]'."
        ) from None
    return pandas.DataFrame([dict(_flat("", row)) for row in report.rows])


def _flat(prefix: str, value: object) -> Iterator[tuple[str, Any]]:
    assert dataclasses.is_dataclass(value)
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        name = f"{prefix}{field.name}"
        if field.name == "taylor":
            continue
        if dataclasses.is_dataclass(entry):
            yield from _flat(f"{name}_", entry)
        else:
            yield name, entry.value if hasattr(entry, "value") else entry
