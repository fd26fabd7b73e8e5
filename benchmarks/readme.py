"""Tables of README.md that are made from results.

    python -m benchmarks.readme

Each stands between `<!-- NAME: made by benchmarks.readme -->` and its end,
and a test compares it with the results.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"


def _support() -> str:
    return (RESULTS / "support.md").read_text()


TABLES: Mapping[str, Callable[[], str]] = {"support": _support}


def filled(readme: str) -> str:
    """The text of README.md, its tables made anew.

    Raises:
        ValueError: If the place of a table is missing.
    """
    for name, make in TABLES.items():
        begin, end = (
            f"<!-- {name}: made by benchmarks.readme -->",
            f"<!-- end of {name} -->",
        )
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        table = f"{begin}\n\n{make()}\n{end}"
        readme, found = place.subn(lambda _, table=table: table, readme)
        if found != 1:
            raise ValueError(f"README.md has {found} places for the table {name!r}")
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
