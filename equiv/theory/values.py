"""What a claim is, and what testing it finds: plain values.

A claim is a statement with a test. The test does not say yes or no: it returns a
`ClaimResult`, whose verdict comes with the conditions it rests on and the figures that
show it. A statement that does not hold as its source makes it is kept beside the one
that does, with the smallest counterexample found.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# Numbers, words, lists and tables of them: what JSON holds.
Value = Any


def sentence(text: str) -> str:
    """The text with a capital at its beginning, unless that is the name of a site.

    Example:
        >>> sentence("the shift"), sentence("mlp_out is blind")
        ('The shift', 'mlp_out is blind')
    """
    name = "_" in text.split(maxsplit=1)[0] if text else False
    return text if name else text[:1].upper() + text[1:]


class Verdict(StrEnum):
    """Outcome of testing a claim; the result's `says` gives the reason."""

    HOLDS = "holds"
    CONDITIONAL = "holds with conditions"
    FAILS = "fails"
    NOT_APPLICABLE = "not applicable"
    INCONCLUSIVE = "inconclusive"


class Kind(StrEnum):
    """What a claim is tested on."""

    EXACT = "exact"  # an identity, on toy blocks in float64; needs no model
    MODEL = "model"  # measured on the model and update given
    TRAINED = "trained"  # judged from results of many trained models


@dataclass(frozen=True)
class AsWritten:
    """What becomes of a claim's statement as its source makes it.

    Attributes:
        verdict: Usually `fails`.
        says: Why, in one sentence.
        counterexample: The smallest one found, as figures by name.
    """

    verdict: Verdict
    says: str
    counterexample: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class ClaimResult:
    """What testing a claim found.

    Attributes:
        verdict: Of the claim's formula.
        says: The finding in one sentence, with its figures.
        conditions: What the verdict rests on, with measured values. A verdict
            `holds with conditions` names at least one.
        evidence: Figures by name.
        as_written: What becomes of the source's own statement, where it differs.

    Example:
        >>> ClaimResult(Verdict.HOLDS, "differs by 2e-16", evidence={"gap": 2e-16}).says
        'differs by 2e-16'
    """

    verdict: Verdict
    says: str
    conditions: Mapping[str, Value] = field(default_factory=dict)
    evidence: Mapping[str, Value] = field(default_factory=dict)
    as_written: AsWritten | None = None


@dataclass(frozen=True)
class Claim:
    """A statement, where it comes from, and the test that judges it.

    Attributes:
        id: Number in the theory; a name for a claim of a user's own.
        title: The statement in a few words.
        formula: The statement in one formula.
        assumptions: What it needs.
        source: "paper", "blog" or "code" of its authors, "others" or "this project",
            with a short reference.
        falsified_by: What would show it wrong.
        kind: What it is tested on.
        derivation: Why it should hold; shown by `equiv claims ID --explain`.
        as_written: The statement as its source makes it, where that does not hold.
        study: Name of the study whose results the test reads; see `trained/study.py`.
        test: The function; gets what its parameters name, see `setting.py`.
        needs: Names of the test's parameters.
    """

    id: int | str
    title: str
    formula: str
    assumptions: str
    source: str
    falsified_by: str
    kind: Kind
    derivation: str
    as_written: str
    study: str
    test: Callable[..., ClaimResult]
    needs: tuple[str, ...]
