"""Parts of README.md that are made from results.

    python -m benchmarks.readme

Each stands between `<!-- NAME: made by benchmarks.readme -->` and its end,
and a test compares it with the results.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.findings_results import read

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"


def _support() -> str:
    return (RESULTS / "support.md").read_text()


def _claims() -> str:
    """How many claims there are, of which kind, and how they were judged."""
    found = read()
    counts = Counter(entry["kind"] for entry in found.claims.values())
    kinds = [text.format(counts[kind]) for kind, text in KINDS.items() if counts[kind]]
    text = f"{found.answer}. Of these claims, {', '.join(kinds)}."
    return textwrap.fill(text, 88) + "\n"


KINDS = {
    "exact": "{} are exact identities on small float64 blocks",
    "model": "{} are measured on the model and update given",
    "trained": "{} are judged from models trained for the purpose",
}
PARTS: Mapping[str, Callable[[], str]] = {"support": _support, "claims": _claims}


def filled(readme: str) -> str:
    """The text of README.md, these parts made anew.

    Raises:
        ValueError: If the place of one is missing.
    """
    for name, make in PARTS.items():
        begin, end = (
            f"<!-- {name}: made by benchmarks.readme -->",
            f"<!-- end of {name} -->",
        )
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        part = f"{begin}\n\n{make()}\n{end}"
        readme, found = place.subn(lambda _, part=part: part, readme)
        if found != 1:
            raise ValueError(f"README.md has {found} places for {name!r}")
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
