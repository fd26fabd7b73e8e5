"""Texts with a target each: what an encoder reads, and what its decoder should say.

A row of a table is a mapping with a text, in one of the columns that are known for
that, and a target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from equiv.arguments import shown
from equiv.errors import InputsError
from equiv.model.rows import IDS, Row, as_text

# Columns that hold what a decoder should say, the first one there is.
TARGETS = ("target", "answer", "summary")


def with_targets(entries: object) -> list[tuple[str, str]] | None:
    """(text, target) of rows that all have both; `None` if these are something else.

    Example:
        >>> with_targets([{"text": "two", "target": "zwei"}])
        [('two', 'zwei')]
        >>> with_targets(["two"]) is None
        True
    """
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        return None
    found = [(as_text(entry), target_of(entry)) for entry in entries]
    pairs = [(a, b) for a, b in found if isinstance(a, str) and b is not None]
    return pairs if pairs and len(pairs) == len(found) else None


def target_of(entry: object) -> str | None:
    """The target in a row; `None` if there is none."""
    if not isinstance(entry, Mapping) or IDS in entry:
        return None
    found = next((entry[name] for name in TARGETS if name in entry), None)
    return found if isinstance(found, str) else None


def tokenised(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """Rows of token ids and labels.

    Raises:
        InputsError: If there is no tokenizer.
    """
    if not callable(tokenizer):
        raise InputsError(
            f"Expected `tokenizer=` beside texts, got {shown(tokenizer)}. Pass the "
            "tokenizer itself, as `AutoTokenizer.from_pretrained(...)` returns it."
        )
    read: Callable[..., Any] = tokenizer
    return [
        {
            IDS: list(read(text).input_ids),
            "labels": list(read(text_target=target).input_ids),
        }
        for text, target in pairs
    ]
