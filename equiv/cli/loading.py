"""Tokenizers and texts from what a command line names."""

import sys
from pathlib import Path
from typing import Any

from equiv.errors import FileFormatError
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


def read_texts(path: Path, limit: int) -> list[Text | dict[str, Text]]:
    """Texts of a file, with targets if it has some; says so if any are left out.

    Raises:
        InputsError: If the file is missing, empty, or a line is no text.
    """
    texts = read_rows(path)
    if len(texts) > limit:
        print(f"Using the first {limit} of {len(texts)} texts.", file=sys.stderr)
    return texts[:limit]
