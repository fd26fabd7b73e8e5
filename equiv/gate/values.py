"""The gate's results as plain values: floats, strings and tuples, no tensors."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

FORMAT = 1  # 1: first format


@dataclass(frozen=True)
class WeightDifference:
    """One matrix that is not what was expected, to the rounding of its dtype.

    `wrong` of its `entries` lie outside the bound; `largest` is the largest of their
    differences, at index `where`, against the `tolerance` there.
    """

    name: str
    layer: int | None
    entries: int
    wrong: int
    largest: float
    where: tuple[int, ...]
    tolerance: float
    looks_like: str


@dataclass(frozen=True)
class OutputDifference:
    """Outputs against the expected ones, token by token.

    A token's difference is relative: ‖actual − expected‖ / ‖expected‖ over its logits
    or log-probabilities, each less its mean. `largest` is the largest of them, in
    sequence `sequence` at position `position`. `undecided` says that outputs which
    agree would do so without the update too.
    """

    tokens: int
    wrong: int
    largest: float
    tolerance: float
    sequence: int
    position: int
    same_top: float
    looks_like: str
    undecided: bool = False


@dataclass(frozen=True)
class Agreement:
    """Whether one side is the other, what differs most, and what it looks like.

    Attributes:
        actual: What was tested.
        expected: What it was tested against.
        rule: How the tolerances came about.
        compared: How many matrices were compared.
        weights: Those that differ.
        outputs: The outputs, where they were compared.
        only_actual: Parameters that only the actual side has.
        only_expected: Parameters that only the expected side has.
        looks_like: The likeliest story of all differences together.
        settings: Settings of the two that differ and change what they compute.
        format: Number of the file format of `to_json`.
    """

    actual: str
    expected: str
    rule: str
    compared: int = 0
    weights: tuple[WeightDifference, ...] = ()
    outputs: OutputDifference | None = None
    only_actual: tuple[str, ...] = ()
    only_expected: tuple[str, ...] = ()
    looks_like: str = ""
    settings: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def same(self) -> bool:
        """Whether nothing differs beyond the tolerances."""
        return not (
            self.weights
            or self.only_actual
            or self.only_expected
            or self.settings
            or (self.outputs is not None and self.outputs.wrong)
            or (self.outputs is not None and self.outputs.undecided)
        )

    @property
    def reason(self) -> str:
        """What differs most, where, by how much, and what it looks like: one line."""
        from equiv.gate.wording import reason

        return reason(self)

    def to_json(self, path: str | Path) -> None:
        """Write it as JSON; the file is whole or absent."""
        from equiv.gate.files import write_json

        write_json(Path(path), agreement=self)

    @classmethod
    def from_json(cls, path: str | Path) -> "Agreement":
        """Read it back, equal to the one written.

        Raises:
            FileFormatError: If the file is missing or damaged, or holds none.
        """
        from equiv.gate.files import read_json

        return read_json(cls, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page; the file is whole or absent."""
        from equiv.gate.html import write_html

        write_html(Path(path), agreement=self)

    def __str__(self) -> str:
        from equiv.gate.wording import agreement_text

        return agreement_text(self)


class Fate(StrEnum):
    """What became of one part of an update."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    FLIPPED = "sign flipped"
    TWICE = "applied twice"
    SCALED = "wrong scale"
    NOT_IDENTIFIABLE = "not identifiable"
    OTHER = "changed in another way"


@dataclass(frozen=True)
class Share:
    """How much of one part of an update was really applied: 1 all of it, 0 none.

    Attributes:
        part: "layer 3", "q_proj", or a parameter's name.
        coefficient: The share; `None` where it is not identifiable.
        uncertainty: Its standard error.
        fate: What that looks like.
        reason: Why, in words.
    """

    part: str
    coefficient: float | None
    uncertainty: float | None
    fate: Fate
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What actually happened to a model that was to get an update.

    Attributes:
        actual: What was diagnosed.
        update: The update that was to be applied.
        evidence: "weights" or "outputs".
        layers: Per layer ("outside the blocks" for embedding and head).
        kinds: Per kind of weight, over all layers.
        matrices: Per matrix, where there are weights.
        explained: Share of the observed change that the coefficients explain.
        looks_like: The likeliest story, in one line.
        forwards: Cost in forwards of the base on the same inputs.
        format: Number of the file format of `to_json`.
    """

    actual: str
    update: str
    evidence: str
    layers: tuple[Share, ...]
    kinds: tuple[Share, ...]
    matrices: tuple[Share, ...]
    explained: float | None
    looks_like: str
    forwards: float
    format: int = FORMAT

    @property
    def applied(self) -> bool:
        """Whether every part of the update was applied, as far as can be told."""
        fates = {share.fate for share in (*self.layers, *self.kinds)}
        return fates - {Fate.NOT_IDENTIFIABLE} == {Fate.APPLIED}

    def to_json(self, path: str | Path) -> None:
        """Write it as JSON; the file is whole or absent."""
        from equiv.gate.files import write_json

        write_json(Path(path), diagnosis=self)

    @classmethod
    def from_json(cls, path: str | Path) -> "Diagnosis":
        """Read it back, equal to the one written.

        Raises:
            FileFormatError: If the file is missing or damaged, or holds none.
        """
        from equiv.gate.files import read_json

        return read_json(cls, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page; the file is whole or absent."""
        from equiv.gate.html import write_html

        write_html(Path(path), diagnosis=self)

    def __str__(self) -> str:
        from equiv.gate.wording import diagnosis_text

        return diagnosis_text(self)
