"""Tokenizers and texts from what a command line names."""

import sys
from pathlib import Path
from typing import Any

from equiv.errors import ArgumentError, FileFormatError
from equiv.model.rows import Text
from equiv.model.text_files import read_rows


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


def check_field(field: str | None, inputs: str | None) -> None:
    """Refuse a field without a file that has it.

    Raises:
        ArgumentError: If it is so.
    """
    if field is not None and inputs in (None, "samples"):
        raise ArgumentError(
            f"--field {field} needs a file of JSON objects: pass it with --inputs."
        )


def read_texts(
    path: Path, limit: int, field: str | None = None
) -> list[Text | dict[str, Text]]:
    """Texts of a file, with targets if it has some; says so if any are left out.

    Args:
        path: The file.
        limit: How many are used at most.
        field: Which field of JSON objects is the text; `None` for the usual ones.

    Raises:
        InputsError: If the file is missing, empty, or a line is no text.
    """
    texts = read_rows(path, field)
    if len(texts) > limit:
        print(f"Using the first {limit} of {len(texts)} texts.", file=sys.stderr)
    return texts[:limit]
