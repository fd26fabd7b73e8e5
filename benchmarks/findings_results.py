"""Results of claims, for words and pictures that rest on them.

What is said of a claim names it through `Results.holds`, `fails` or `fails_as_written`,
and so cannot say what its verdict does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equiv.report.files import read_format
from equiv.theory.findings import FORMAT
from equiv.theory.trained import study
from equiv.theory.values import Verdict

CLAIMS = Path(__file__).parent / "results" / "claims.json"
HOLD = (Verdict.HOLDS, Verdict.CONDITIONAL)


class AbsentError(Exception):
    """A claim that is not among the results."""


class ContradictionError(ValueError):
    """Words that say of a claim what the results do not."""


@dataclass
class Results:
    """What templates read.

    Attributes:
        updates: What claims about the model were tested on.
        answer: How many claims got which verdict, in words.
        claims: Number → entry of `equiv claims --json`.
        studies: Folder of results of trained models; what is shipped by default.
        told: Claims whose statement as written has a section of its own; filled while
            the sections are written.
    """

    updates: Sequence[str]
    answer: str
    claims: Mapping[int, Mapping[str, Any]]
    studies: Path | None = None
    told: set[int] = field(default_factory=set)

    def study(self, name: str) -> Mapping[str, Any]:
        """What a study found, lists in the order of its seeds."""
        return study.results(name, self.studies)

    def claim(self, number: int) -> Mapping[str, Any]:
        """The entry of a claim, whatever its verdict.

        Raises:
            AbsentError: If it is not among the results.
        """
        if number not in self.claims:
            raise AbsentError(f"Claim {number} is not among the results.")
        return self.claims[number]

    def holds(self, number: int) -> Mapping[str, Any]:
        """The entry of a claim that the words say holds.

        Raises:
            ContradictionError: If it does not.
        """
        found = self.claim(number)
        return _expected(found, f"claim {number}", found["verdict"], HOLD)

    def fails(self, number: int) -> Mapping[str, Any]:
        """The entry of a claim that the words say fails.

        Raises:
            ContradictionError: If it does not.
        """
        found = self.claim(number)
        says = f"claim {number}"
        return _expected(found, says, found["verdict"], (Verdict.FAILS,))

    def fails_as_written(self, number: int) -> Mapping[str, Any]:
        """What became of a source's statement that the words say is wrong.

        Raises:
            ContradictionError: If it is not, or the source made none.
        """
        found = self.claim(number)["as_written"] or {"verdict": "not made"}
        says = f"claim {number} as written"
        self.told.add(number)
        return _expected(found, says, found["verdict"], (Verdict.FAILS,))

    def listed(self) -> Iterator[Mapping[str, Any]]:
        """Wrong statements that no section tells of."""
        for number, found in self.claims.items():
            written = found["as_written"]
            if written and written["verdict"] == "fails" and number not in self.told:
                yield found


def _expected(
    found: Mapping[str, Any], name: str, verdict: str, wanted: Sequence[str]
) -> Mapping[str, Any]:
    if verdict not in wanted:
        raise ContradictionError(
            f"The words rest on {name}: expected {' or '.join(wanted)}, and the "
            f"results say {verdict}."
        )
    return found


def read(path: Path = CLAIMS) -> Results:
    """The results of all claims."""
    content = read_format(path, "file of claims", FORMAT)
    claims = {entry["id"]: entry for entry in content["claims"]}
    return Results(content["subject"]["updates"], content["answer"], claims)
