"""Sequences one by one, as people keep them: texts, conversations, rows of a table.

A conversation is a list of messages, each a mapping with "role" and "content". A row of
a table is a mapping from column to value with a text or a conversation in it, or with
the `input_ids` of one sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from equiv.arguments import shown
from equiv.errors import InputsError

Conversation = list[Mapping[str, Any]]
Text = str | Conversation
# One sequence that is tokenised already: column → one value per token.
Tokenised = Mapping[str, Any]
Row = Text | Tokenised

# Columns that hold what a model reads, the first one there is.
FIELDS = ("text", "question", "messages", "prompt")
IDS = "input_ids"


def rows_in(entries: object) -> list[Row] | None:
    """The rows that some inputs are, or `None` if they are something else.

    Args:
        entries: A list of rows, or of batches of them such as a `DataLoader` makes; a
            conversation; or a mapping from column to values.

    Raises:
        InputsError: If there is something else among rows.
    """
    if isinstance(entries, Mapping):
        return _column(entries)
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        return None
    if _is_conversation(entries):
        return [list(entries)]
    opened = [_opened(entry) for entry in entries]
    if all(found is None for found in opened):
        return None
    made: list[Row] = []
    for index, found in enumerate(opened):
        if found is None:
            raise InputsError(
                f"Expected a text at index {index} of `inputs`, got "
                f"{shown(entries[index])}. Leave such entries out."
            )
        made += found
    _check_alike(made)
    return made


def as_text(entry: object, field: str | None = None) -> Text | None:
    """The text or conversation in a row; `None` if there is none.

    Example:
        >>> as_text({"id": 3, "text": "two"})
        'two'
    """
    if isinstance(entry, Mapping):
        names = FIELDS if field is None else (field,)
        found = next((entry[name] for name in names if name in entry), None)
        return as_text(found) if not isinstance(found, Mapping) else None
    if isinstance(entry, str):
        return entry
    return list(entry) if _is_conversation(entry) else None


def check_columns(table: Any) -> None:
    """Refuse a table that does not say which of its columns is to be read.

    Args:
        table: A `datasets.Dataset`, or anything else with `column_names`.

    Raises:
        InputsError: If it has several splits, or none of the columns that are known.
    """
    columns = table.column_names
    if isinstance(columns, Mapping):
        raise InputsError(
            f"Expected one split of a dataset, got {', '.join(columns)}: pass "
            f"`inputs[{next(iter(columns), 'train')!r}]`."
        )
    if columns and not set(columns) & {IDS, *FIELDS}:
        raise InputsError(
            f"Expected a dataset with a column {IDS}, {', '.join(FIELDS[:-1])} or "
            f"{FIELDS[-1]}, got {', '.join(columns)}. Pass one column, as in "
            f"`dataset[{columns[0]!r}]`."
        )


def _opened(entry: object) -> list[Row] | None:
    """The rows in one entry of a list: itself, or those of a batch."""
    text = as_text(entry)
    if text is not None and not (isinstance(entry, Mapping) and IDS in entry):
        return [text]
    if isinstance(entry, Mapping):
        return [entry] if _axes(entry.get(IDS)) == 1 else _column(entry)
    if isinstance(entry, (list, tuple)) and entry:
        inside = [as_text(e) for e in entry]
        found = [text for text in inside if text is not None]
        return [*found] if len(found) == len(inside) else None
    return None


def _column(batch: Mapping[Any, Any]) -> list[Row] | None:
    """The texts in a mapping from column to values, unless it is tokenised."""
    if IDS in batch:
        return None
    for name in FIELDS:
        values = batch.get(name)
        if isinstance(values, (list, tuple)) and not _is_conversation(values):
            return rows_in(values)
    return None


def _is_conversation(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether this is a list of messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(entry, Mapping) and "role" in entry for entry in value)
    )


def _axes(value: Any) -> int:
    """How many axes a tensor, an array or a nested list has, by its first entries."""
    if hasattr(value, "ndim"):
        return value.ndim
    count = 0
    while isinstance(value, (list, tuple)):
        count, value = count + 1, value[0] if value else None
    return count


def _check_alike(rows: Sequence[Row]) -> None:
    """Refuse texts, conversations and token ids in one call."""
    kinds = {str: "a text", list: "a conversation"}
    found = [kinds.get(type(row), "token ids") for row in rows]
    other = next((i for i, kind in enumerate(found) if kind != found[0]), None)
    if other is not None:
        raise InputsError(
            f"Expected inputs of one kind, got {found[0]} at index 0 and "
            f"{found[other]} at index {other}. Pass them in two calls."
        )
