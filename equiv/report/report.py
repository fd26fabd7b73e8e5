"""`Report`: the frozen result of `equiv.check`; renderings live in their own files."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from equiv.errors import NotEquivalentError
from equiv.report import answer
from equiv.report.values import (
    Behaviour,
    Contributions,
    Coverage,
    FirstPosition,
    FitRow,
    Order,
    Routing,
    Row,
    Spectrum,
    Subject,
    Superposition,
    Verdict,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# 1: first format; 2: what steers read and write apart, spectra, contributions.
FORMAT = 2

_PASSING = (Verdict.HOLDS, Verdict.EXACT, Verdict.NOT_APPLICABLE)


@dataclass(frozen=True, repr=False)
class Report:
    """What `equiv.check` measured, per layer and site, and the answer in words.

    Attributes:
        subject: The model, the update, the inputs and the settings.
        rows: First-order equivalence, one row per (layer, site, scope).
        coverage: The four coverage ratios per (layer, scope).
        fits: Closed-form steering per (layer, site, form), with held-out misfit.
        behaviour: The steered model against the tuned model, per site and form.
        superposition: The first-order equivalence at the output; `None` when off.
        spectra: What steering of each size leaves, per (layer, site).
        contributions: What each stage's own update adds to the output, to first order.
        first_positions: Per layer, whether first positions hold an attention sink.
        routing: Per mixture of experts, the tokens that the update sends to others.
        notes: Whatever the reader must know before using a figure.
        format: Number of the file format of `to_json`.
    """

    subject: Subject
    rows: tuple[Row, ...]
    coverage: tuple[Coverage, ...] = ()
    fits: tuple[FitRow, ...] = ()
    behaviour: tuple[Behaviour, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    superposition: Superposition | None = None
    contributions: Contributions | None = None
    first_positions: tuple[FirstPosition, ...] = ()
    routing: tuple[Routing, ...] = ()
    notes: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def derivative_holds(self) -> bool:
        """Whether the remainder is of second order (or zero) at every row.

        Of third order with `at="midpoint"`. A verdict on the derivative and the
        smoothness of the model here, not on the size of the update. Rows without a
        shift are left out; at least one other row must have been judged.
        """
        judged = [self.judged_order(row).verdict for row in self.rows]
        return all(v in _PASSING for v in judged) and any(
            v in (Verdict.HOLDS, Verdict.EXACT) for v in judged
        )

    @property
    def holds(self) -> bool:
        """`derivative_holds`, and every row within `max_remainder` at full size."""
        return self.derivative_holds and not any(self._too_large())

    @property
    def reason(self) -> str:
        """Why `holds` is what it is, in one sentence."""
        return answer.reason(self)

    @property
    def headline(self) -> str:
        """The answer in words: what steering recovers, and how far first order goes."""
        return answer.headline(self)

    def failing(self) -> tuple[Row, ...]:
        """The rows because of which `holds` is false."""
        orders = ((row, self.judged_order(row).verdict) for row in self.rows)
        wrong = {id(row) for row, verdict in orders if verdict not in _PASSING}
        wrong |= {id(row) for row in self._too_large()}
        return tuple(row for row in self.rows if id(row) in wrong)

    def judged_order(self, row: Row) -> Order:
        """The order that `derivative_holds` judges: the base's, or the midpoint's."""
        if self.subject.at == "midpoint" and row.order_midpoint is not None:
            return row.order_midpoint
        return row.order

    def judged_remainder(self, row: Row) -> float | None:
        """The relative remainder that `max_remainder` is compared with.

        The base's, unless the check ran with `at="midpoint"`.
        """
        if self.subject.at == "midpoint":
            return row.remainder_midpoint
        return row.remainder

    def assert_holds(self) -> None:
        """Raise unless `holds`.

        Raises:
            NotEquivalentError: One line per failing layer and site, with its radius.
        """
        if not self.holds:
            raise NotEquivalentError(answer.failure(self))

    def to_frame(self, table: str = "rows") -> "pandas.DataFrame":
        """A table as a data frame, nested fields flattened (`order_verdict`, …).

        Args:
            table: "rows", "coverage", "fits", "behaviour", "spectra",
                "first_positions" or "routing".

        Raises:
            ArgumentError: If there is no such table.
            MissingExtraError: If pandas is not installed.
        """
        from equiv.report.frame import to_frame

        return to_frame(self, table)

    def to_dict(self) -> dict[str, object]:
        """The whole report as plain dictionaries, lists, strings and numbers."""
        return {**dataclasses.asdict(self), "answer": self.headline}

    def to_json(self, path: str | Path) -> None:
        """Write the report; the file is whole or absent."""
        from equiv.report.files import write_json

        write_json(self, Path(path))

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Read a report back, equal to the one written.

        Raises:
            FileFormatError: If the file is not a report of a known format.
        """
        from equiv.report.files import read_json

        return read_json(Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page; the file is whole or absent."""
        from equiv.report.html import write_html

        write_html(self, Path(path))

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The ladder: what each way of steering recovers, one line per site.

        Args:
            path: Where to save the picture, if anywhere (.png, .svg, .pdf …).
        """
        from equiv.report.ladder_plot import ladder

        made = ladder(self)
        if path is not None:
            made.savefig(path)
        return made

    def _repr_html_(self) -> str:
        """The page, for notebooks."""
        from equiv.report.html import to_html

        return to_html(self)

    def __repr__(self) -> str:
        """The answer in short; `print` shows the whole report."""
        return f"<Report: {self.headline}>"

    def __str__(self) -> str:
        from equiv.report.text import to_text

        return to_text(self)

    def _too_large(self) -> Iterator[Row]:
        limit = self.subject.max_remainder
        if limit is None:
            return
        for row in self.rows:
            remainder = self.judged_remainder(row)
            if remainder is not None and not remainder <= limit:  # also for NaN
                yield row
