"""What running claims found, as a value: one entry per claim, in their order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from equiv.errors import ArgumentError
from equiv.report.files import write_fields
from equiv.report.numbers import counted
from equiv.theory.values import Claim, ClaimResult, Kind, Value, Verdict, sentence

FORMAT = 1
_PLURAL = {
    Verdict.HOLDS: "hold",
    Verdict.CONDITIONAL: "hold with conditions",
    Verdict.FAILS: "fail",
}
# How bad a verdict is when a claim was tested on several updates: the worst counts.
_WORST_FIRST = (
    Verdict.FAILS,
    Verdict.INCONCLUSIVE,
    Verdict.CONDITIONAL,
    Verdict.HOLDS,
    Verdict.NOT_APPLICABLE,
)


@dataclass(frozen=True)
class Judged:
    """A claim and what its test found.

    Attributes:
        claim: The claim.
        results: Update → result. A claim that needs no model has one entry, "".
    """

    claim: Claim
    results: Mapping[str, ClaimResult]

    @property
    def verdict(self) -> Verdict:
        """The worst over the updates; `not applicable` only where it is so for all."""
        found = {result.verdict for result in self.results.values()}
        return next(verdict for verdict in _WORST_FIRST if verdict in found)

    @property
    def says(self) -> str:
        """The finding, per update where they differ."""
        said = {name: result.says for name, result in self.results.items()}
        if len(set(said.values())) == 1:
            return sentence(next(iter(said.values())))
        return "; ".join(f"{name}: {text}" for name, text in said.items())

    @property
    def broken(self) -> bool:
        """Whether something is wrong with the software rather than with the world.

        An exact identity that fails, or a claim of the user's own that does not hold.
        """
        if self.claim.kind is Kind.EXACT and isinstance(self.claim.id, int):
            return self.verdict not in (Verdict.HOLDS, Verdict.CONDITIONAL)
        own = isinstance(self.claim.id, str)
        return own and self.verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE)

    def to_dict(self) -> dict[str, Value]:
        """The claim as JSON holds it."""
        claim = self.claim
        return {
            "id": claim.id,
            "title": claim.title,
            "formula": claim.formula,
            "assumptions": claim.assumptions,
            "source": claim.source,
            "falsified_by": claim.falsified_by,
            "kind": claim.kind,
            "verdict": self.verdict,
            "says": self.says,
            "conditions": self._by_update("conditions"),
            "evidence": self._by_update("evidence"),
            "as_written": self.as_written,
        }

    def _by_update(self, name: str) -> dict[str, Value]:
        """One field of the results; keyed by update where there are several."""
        found = {
            update: dict(getattr(result, name))
            for update, result in self.results.items()
        }
        return next(iter(found.values())) if len(found) == 1 else found

    @property
    def as_written(self) -> dict[str, Value] | None:
        """What became of the source's statement: of the first update that says it."""
        for result in self.results.values():
            if (found := result.as_written) is not None:
                return {
                    "statement": sentence(self.claim.as_written),
                    "verdict": found.verdict,
                    "says": sentence(found.says),
                    "counterexample": dict(found.counterexample),
                }
        return None


@dataclass(frozen=True)
class Findings:
    """What running claims found.

    Attributes:
        judged: One entry per claim.
        subject: What they were tested on: model, updates, inputs, norm, seed.
    """

    judged: Sequence[Judged]
    subject: Mapping[str, Value]

    def __iter__(self) -> Iterator[Judged]:
        return iter(self.judged)

    def __len__(self) -> int:
        return len(self.judged)

    def __getitem__(self, id: int | str) -> Judged:
        """The entry of one claim.

        Raises:
            ArgumentError: If it was not run.
        """
        for judged in self.judged:
            if judged.claim.id == id:
                return judged
        known = ", ".join(str(judged.claim.id) for judged in self.judged)
        raise ArgumentError(f"Claim {id!r} was not run; those run: {known}.")

    @property
    def sound(self) -> bool:
        """No exact identity is broken, and every claim of the user's own holds."""
        return not any(judged.broken for judged in self.judged)

    @property
    def headline(self) -> str:
        """How many claims got which verdict.

        Example:
            >>> Findings((), {}).headline
            '0 claims'
        """
        counts = [
            f"{n} {_PLURAL.get(verdict, verdict.value) if n > 1 else verdict.value}"
            for verdict in Verdict
            if (n := sum(judged.verdict is verdict for judged in self.judged))
        ]
        said = ": ".join(filter(None, [counted(len(self), "claim"), ", ".join(counts)]))
        wrong = sum(
            found is not None and found["verdict"] is Verdict.FAILS
            for found in (judged.as_written for judged in self.judged)
        )
        fail = "fails" if wrong == 1 else "fail"
        return f"{said}; {wrong} {fail} as written" if wrong else said

    def to_dict(self) -> dict[str, Value]:
        """The findings as JSON holds them."""
        return {
            "format": FORMAT,
            "answer": self.headline,
            "subject": dict(self.subject),
            "claims": [judged.to_dict() for judged in self.judged],
        }

    def to_json(self, path: Path | str) -> None:
        """Write them as JSON; the file is whole or absent."""
        write_fields(self.to_dict(), Path(path))

    def to_html(self, path: Path | str) -> None:
        """Write them as one self-contained page.

        Raises:
            MissingExtraError: If jinja2 is not installed.
        """
        from equiv.theory.html import write_html

        write_html(self, Path(path))

    def __str__(self) -> str:
        from equiv.theory.text import plain

        return plain(self)
