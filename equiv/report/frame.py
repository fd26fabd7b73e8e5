"""A report's tables as pandas data frames."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from equiv.arguments import as_choice
from equiv.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas

    from equiv.report.report import Report


TABLES = (
    "rows",
    "coverage",
    "fits",
    "behaviour",
    "spectra",
    "first_positions",
    "routing",
)


def to_frame(report: "Report", table: str = "rows") -> "pandas.DataFrame":
    """One row per entry; nested fields flattened, curves left out.

    Args:
        report: The report.
        table: Which of its tables, by the report's own name for it.

    Raises:
        ArgumentError: If there is no such table.
        MissingExtraError: If pandas is not installed.
    """
    entries = getattr(report, as_choice("table", table, TABLES))
    try:
        import pandas
    except ImportError:
        raise MissingExtraError(
            "Data frames need pandas: pip install 'equiv[report]'."
        ) from None
    return pandas.DataFrame([dict(_flat("", entry)) for entry in entries])


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
