"""Tokenizers and texts from what a command line names."""

import json
import sys
from pathlib import Path
from typing import Any

from equiv.errors import FileFormatError, InputsError

_FIELDS = ("text", "question", "prompt")


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        FileFormatError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"No tokenizer beside {name!r}: {error}") from None


def read_texts(path: Path, limit: int) -> list[str]:
    """Texts from a file of lines, or of JSON objects with a text field.

    Raises:
        InputsError: If the file is missing, empty, or a line is no text.
    """
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
    if len(numbered) > limit:
        print(f"Using the first {limit} of {len(numbered)} texts.", file=sys.stderr)
    numbered = numbered[:limit]
    if path.suffix.lower() in (".jsonl", ".json"):
        return [_text(path, i, line) for i, line in numbered]
    if numbered[0][1].startswith(("{", '["')):
        raise InputsError(
            f"Expected plain texts in {path}, but its first line looks like JSON: "
            "rename it to .jsonl, with one object per line."
        )
    return [line for _, line in numbered]


def _text(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputsError(f"{path}, line {number}: not JSON ({error}).") from None
    if isinstance(entry, str):
        return entry
    found = next(
        (entry[f] for f in _FIELDS if isinstance(entry, dict) and f in entry), None
    )
    if not isinstance(found, str):
        raise InputsError(
            f"{path}, line {number}: expected a field {', '.join(_FIELDS)} with a text."
        )
    return found
