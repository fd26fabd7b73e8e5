"""The tables of README.md, made from the lists so that they cannot differ from them."""

from collections.abc import Iterator
from pathlib import Path

from gate.listing import Claim, Listing, Theorem, read, witnesses
from gate.running import Code

BEGIN, END = "<!-- index: made by check.py --index -->", "<!-- end of index -->"
PROVED = {"none": "proved", "reals": "proved, reals"}


def _row(*cells: str) -> str:
    # Only a bar needs care: it would end the cell, also inside code.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _test_links(tests: list[str]) -> str:
    """`file::function` as links to the file, the function as their text."""
    links = []
    for test in tests:
        file, _, function = test.partition("::")
        links.append(f"[{function.removeprefix('test_')}](../tests/{file})")
    return ", ".join(links) or "–"


def _code_link(listing: Listing, claim: Claim) -> str:
    """The file that runs a claim, and its source's statement; parts have none."""
    if claim.part not in ("whole", "as written"):
        return "–"
    links = [_link(code) for code in listing.codes if code.number == claim.number]
    return "".join(links) or "–"


def _link(code: Code) -> str:
    return f"[{Path(code.file).stem.removeprefix('claim_')}](../{code.file})"


def _measured(listing: Listing) -> Iterator[str]:
    """Claims with code and no entry in the list: they are about models."""
    listed = {claim.number for claim in listing.claims}
    rest = [code for code in listing.codes if code.number not in listed]
    if rest:
        yield from ("", "Measured on models, without a witness here:", "")
        yield _row("claim", "statement", "code")
        yield "|---|---|---|"
        yield from (_row(str(c.number), c.title, _link(c)) for c in rest)


def _claim_row(listing: Listing, claim: Claim) -> str:
    symbolic, tests = witnesses(listing, claim)
    files = {entry.id: entry.file for entry in listing.theorems}
    coq = ", ".join(f"[`{name}`]({files[name]})" for name in claim.theorems) or "–"
    return _row(
        str(claim.key),
        claim.says,
        claim.assumptions,
        claim.status,
        _code_link(listing, claim),
        coq,
        _test_links(symbolic),
        _test_links(tests),
    )


def _theorem_row(listing: Listing, entry: Theorem) -> str:
    return _row(
        f"`{entry.id}`",
        entry.says,
        entry.assumptions,
        PROVED[entry.axioms],
        f"[{Path(entry.file).name}]({entry.file})",
        _test_links(listing.tests[entry.id]),
    )


def tables(listing: Listing) -> Iterator[str]:
    """The lines of both indexes."""
    yield from ("## Claims of the theory", "")
    yield _row(
        *("claim", "statement", "assumptions", "status"),
        *("code", "Coq", "SymPy", "tests"),
    )
    yield "|---|---|---|---|---|---|---|---|"
    yield from (_claim_row(listing, claim) for claim in listing.claims)
    yield from _measured(listing)
    yield from ("", "## Theorems")
    for topic, entries in listing.topics.items():
        yield from ("", f"### {topic}", "")
        yield _row("id", "statement", "assumptions", "status", "file", "test")
        yield "|---|---|---|---|---|---|"
        yield from (_theorem_row(listing, entry) for entry in entries)


def with_index(root: Path) -> str:
    """README.md as it should be: its own text around tables from the lists."""
    before, _, rest = (root / "README.md").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *tables(read(root)), "", END + after])


def index_errors(root: Path) -> Iterator[str]:
    """README.md differs from the lists, or has lost the place of its tables."""
    text = (root / "README.md").read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        yield f"README.md: expected {BEGIN!r} and {END!r} once each"
    elif text != with_index(root):
        yield "README.md: the index is not that of the lists; run check.py --index"
