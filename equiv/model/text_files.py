"""Texts and conversations from a file: lines, or one JSON value per line."""

import json
from pathlib import Path

from equiv.errors import InputsError
from equiv.model.rows import FIELDS, Text, as_text
from equiv.model.text_pairs import TARGETS, target_of

_JSON = (".jsonl", ".json")


def read_texts(
    path: str | Path, field: str | None = None, *, limit: int | None = None
) -> list[Text]:
    r"""Texts from a file of lines, or of JSON objects with a field of text.

    Lines without text are left out. Passing a `pathlib.Path` as `inputs` does the same.

    Args:
        path: A file in UTF-8. With the ending .jsonl or .json every line is a JSON
            value: a text, or an object with a text or a conversation in it.
        field: Which field of the objects it is; `None` for the first there is of
            text, question, messages and prompt.
        limit: How many to read at most, the first ones; `None` for all.

    Returns:
        Texts; for a field of conversations, lists of messages with role and content.

    Raises:
        InputsError: If the file is missing or empty, or a line is no text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "texts.jsonl")
        >>> _ = path.write_text('{"title": "One", "text": "two"}\n')
        >>> read_texts(path), read_texts(path, "title")
        (['two'], ['One'])
    """
    path = Path(path)
    numbered = _lines(path)[:limit]
    if path.suffix.lower() in _JSON:
        return [_entry(path, number, line, field)[0] for number, line in numbered]
    if numbered[0][1].startswith(("{", '["')):
        raise InputsError(
            f"Expected plain texts in {path}, but its first line looks like JSON: "
            "rename it to .jsonl, with one object per line."
        )
    if field is not None:
        raise InputsError(
            f"{path} is a file of lines, which have no field {field!r}: that needs the "
            "ending .jsonl, with one object per line."
        )
    return [line for _, line in numbered]


def read_rows(path: Path, field: str | None = None) -> list[Text | dict[str, Text]]:
    """Texts as `read_texts` has them; with a target, where a JSON object has one.

    Args:
        path: The file.
        field: As for `read_texts`; a target is never the text itself.

    Raises:
        InputsError: If the file is missing or empty, or a line is no text.
    """
    if path.suffix.lower() not in _JSON:
        return [*read_texts(path, field)]
    found = [_entry(path, number, line, field) for number, line in _lines(path)]
    return [
        text if target is None else {"text": text, TARGETS[0]: target}
        for text, target in found
    ]


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1."""
    if not path.is_file():
        raise InputsError(f"Expected a file of texts, {path} does not exist.")
    try:
        whole = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputsError(f"{path} is not text in UTF-8: {error}.") from None
    # JSON strings may hold other line separators, such as U+2028, as they are.
    lines = [line.rstrip("\r") for line in whole.split("\n")]
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputsError(f"{path} holds no text.")
    return numbered


def _entry(
    path: Path, number: int, line: str, field: str | None
) -> tuple[Text, str | None]:
    """The text of a line, and its target if it has one."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputsError(f"{path}, line {number}: not JSON ({error}).") from None
    found = as_text(entry, field)
    if found is None:
        names = field or f"{', '.join(FIELDS[:-1])} or {FIELDS[-1]}"
        has = f"; it has {', '.join(entry)}" if isinstance(entry, dict) else ""
        raise InputsError(
            f"{path}, line {number}: expected a field {names} with a text or a "
            f"conversation{has}."
        )
    if isinstance(entry, dict) and field is not None:  # asked for: not the target too
        entry = {name: value for name, value in entry.items() if name != field}
    return found, target_of(entry)
