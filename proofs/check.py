"""Check that every theorem is proved, from allowed axioms only, listed and tested.

    python proofs/check.py            the lists, the index, the sources: no Coq needed
    python proofs/check.py --index    first write the tables of README.md
    python proofs/check.py --coq      also compile everything from scratch, read the
                                      axioms under each theorem, and compare closed
                                      statements and definitions with statements.txt
    python proofs/check.py --update   the same, and write statements.txt

Exit status: 0 if all is well, 1 if not.
"""

import sys
from pathlib import Path

from gate.coq import CoqError, coq_errors
from gate.index import index_errors, with_index
from gate.listing import listing_errors, read

ROOT = Path(__file__).resolve().parent
OPTIONS = ("--index", "--coq", "--update")


def errors(options: set[str]) -> list[str]:
    """What is wrong; Coq is only asked when the rest is in order."""
    if found := list(listing_errors(ROOT)):
        return found
    if "--index" in options:
        readme = with_index(ROOT)
        (ROOT / "README.md").write_text(readme)
    if found := list(index_errors(ROOT)):
        return found
    if not options & {"--coq", "--update"}:
        return []
    try:
        return list(coq_errors(ROOT, update="--update" in options))
    except CoqError as error:
        return [str(error)]


def main(arguments: list[str]) -> int:
    """Check; print what is wrong; 1 if anything is."""
    if unknown := set(arguments) - set(OPTIONS):
        sys.exit(f"unknown arguments {sorted(unknown)}: expected {', '.join(OPTIONS)}")
    found = errors(set(arguments))
    how = "proved" if {"--coq", "--update"} & set(arguments) else "listed"
    print("\n".join(found) or f"{len(read(ROOT).theorems)} theorems {how}: ok")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
