"""The lists of theorems and claims, the tests that carry their ids, and what is wrong.

A test names what it checks by a mark: `@pytest.mark.theorem("oracle.exact")` says that
it evaluates that theorem's formula on tensors, `@pytest.mark.claim(7)` or
`@pytest.mark.claim("18, norm of Q")` that it bears on that claim of the theory, or on
that part of it, directly. The code that runs a claim on models is in `running.py`.
"""

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gate.running import FOLDER, Code, code_errors, codes
from gate.sources import THEOREM, code, source_errors, sources

# In the order of strength; "refuted" is said of a claim as its source states it.
STATUSES = ("proved", "checked symbolically", "tested", "refuted")
AXIOMS = ("none", "reals")
CLAIMS = 49  # of the theory
PATTERNS = ("test_proofs*.py", "test_symbolic*.py", "test_theory*.py")


@dataclass(frozen=True)
class Theorem:
    """One entry of theorems.toml."""

    id: str
    name: str
    file: str
    says: str
    assumptions: str
    axioms: str

    @property
    def qualified(self) -> str:
        """The name by which Coq knows it: module.theorem."""
        return f"{Path(self.file).stem}.{self.name}"


@dataclass(frozen=True)
class Claim:
    """One entry of claims.toml: what is known about a claim of the theory.

    `part` is "whole", "as written" for a statement of the sources that the claim
    corrects, or a word for a part whose witnesses are of another kind.
    """

    number: int
    part: str
    says: str
    assumptions: str
    status: str
    theorems: list[str]

    @property
    def key(self) -> int | str:
        """What marks its tests: the number, and the part where it is not the whole."""
        return self.number if self.part == "whole" else f"{self.number}, {self.part}"


@dataclass(frozen=True)
class Listing:
    """Both lists, the tests that carry an id, as `file::function`, and claims' code."""

    root: Path
    topics: dict[str, list[Theorem]]
    claims: list[Claim]
    tests: dict[str | int, list[str]]
    codes: list[Code]

    @property
    def theorems(self) -> list[Theorem]:
        """All theorems, in the order of the list."""
        return [entry for entries in self.topics.values() for entry in entries]


class ListingError(Exception):
    """An entry that cannot be read; the message names it."""


def _entry(cls: type, raw: dict[str, Any]) -> Any:
    """An entry as an object; every field there, none empty, none unknown."""
    expected = {field.name for field in fields(cls)}
    blank = [key for key, value in raw.items() if value in ("", None)]
    if raw.keys() != expected or blank:
        name = raw.get("id", raw.get("number", raw))
        raise ListingError(f"{name}: expected the non-empty fields {sorted(expected)}")
    return cls(**raw)


def _marks(path: Path) -> Iterator[tuple[str | int, str]]:
    """The ids on the tests of one file, each with the test that carries it."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) in (
                "pytest.mark.theorem",
                "pytest.mark.claim",
            ):
                for argument in mark.args:
                    yield ast.literal_eval(argument), f"{path.name}::{node.name}"


def read(root: Path) -> Listing:
    """The lists of the folder `root`, and the marks in the tests beside it."""
    topics = tomllib.loads((root / "theorems.toml").read_text())["topic"]
    claims = tomllib.loads((root / "claims.toml").read_text())["claim"]
    tests: dict[str | int, list[str]] = {}
    for pattern in PATTERNS:
        for path in sorted((root.parent / "tests").glob(pattern)):
            for key, test in _marks(path):
                tests.setdefault(key, []).append(test)
    return Listing(
        root,
        {t["name"]: [_entry(Theorem, raw) for raw in t["theorem"]] for t in topics},
        [_entry(Claim, raw) for raw in claims],
        tests,
        codes(root.parent),
    )


def witnesses(listing: Listing, claim: Claim) -> tuple[list[str], list[str]]:
    """The symbolic and the property tests of a claim: its own and its theorems'."""
    found = list(listing.tests.get(claim.key, []))
    for theorem in claim.theorems:
        found += listing.tests.get(theorem, [])
    found = list(dict.fromkeys(found))
    symbolic = [test for test in found if test.startswith("test_symbolic")]
    return symbolic, [test for test in found if test not in symbolic]


def theorem_errors(listing: Listing) -> Iterator[str]:
    """Every theorem listed once, found in its file, and tested."""
    proved = {p.name: THEOREM.findall(code(p)) for p in sources(listing.root)}
    for entry in listing.theorems:
        if entry.axioms not in AXIOMS:
            yield f"{entry.id}: axioms = {entry.axioms}, expected one of {AXIOMS}"
        if entry.name not in proved.get(Path(entry.file).name, []):
            yield f"{entry.id}: no theorem {entry.name} in {entry.file}"
        if entry.id not in listing.tests:
            yield f"{entry.id}: no test carries this id"
    for field in ("id", "name"):
        counts = Counter(getattr(entry, field) for entry in listing.theorems)
        yield from (f"two entries with {field} {v}" for v, n in counts.items() if n > 1)
    listed = {entry.name for entry in listing.theorems}
    for name in sorted({n for names in proved.values() for n in names} - listed):
        yield f"theorem {name} has no entry in theorems.toml"


def claim_errors(listing: Listing) -> Iterator[str]:
    """Every claim listed once, of a known status, with the witness it needs."""
    known = {entry.id for entry in listing.theorems}
    numbers = [claim.number for claim in listing.claims]
    keys = {claim.key for claim in listing.claims}
    if numbers != sorted(numbers) or len(keys) < len(numbers):
        yield f"claims.toml: expected claims in order, each part once, got {numbers}"
    for claim in listing.claims:
        for name in set(claim.theorems) - known:
            yield f"claim {claim.key}: no theorem {name}"
        if claim.status not in STATUSES:
            yield f"claim {claim.key}: status {claim.status}, not in {STATUSES}"
        symbolic, tests = witnesses(listing, claim)
        needed = {"proved": claim.theorems, "checked symbolically": symbolic}
        if not needed.get(claim.status, claim.theorems + symbolic + tests):
            yield f"claim {claim.key}: {claim.status}, but no witness is named"
    numbers = {code.number for code in listing.codes}
    for key in listing.tests.keys() - known - keys - numbers:
        yield f"{', '.join(listing.tests[key])}: no theorem or claim {key}"


def agreement_errors(listing: Listing) -> Iterator[str]:
    """Every claim has code; what the lists say of it, its code and its tests agree."""
    by_number = {code.number: code for code in listing.codes}
    for number in range(1, CLAIMS + 1):
        if number not in by_number:
            yield f"claim {number}: nothing in {FOLDER}/ runs it"
    for claim in listing.claims:
        code = by_number.get(claim.number)
        if code and claim.part == "as written" and not code.as_written:
            yield f"claim {claim.key}: {code.file} has no statement as written"
    for number, code in by_number.items():
        if not any(t.startswith("test_theory") for t in listing.tests.get(number, [])):
            yield f"claim {number}: no test of {code.file} carries this number"


def listing_errors(root: Path) -> Iterator[str]:
    """Everything that can be checked without Coq, except the text of README.md."""
    for path in sources(root):
        yield from source_errors(path)
    try:
        listing = read(root)
    except ListingError as error:
        yield str(error)
        return
    yield from theorem_errors(listing)
    yield from claim_errors(listing)
    yield from code_errors(listing.codes)
    yield from agreement_errors(listing)
