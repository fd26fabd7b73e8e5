"""A design as plain values: what to fit where, why, and what it is worth."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from equiv.fields import whole
from equiv.model.sites import Site
from equiv.report.files import read_format, write_fields
from equiv.steering.fits.plan import Planned

FORMAT = 1  # 1: first format


@dataclass(frozen=True)
class Choice:
    """One steer of a design.

    Attributes:
        layer: Index of the block.
        site: Where it reads and writes, as `Site.key`.
        form: "vector" or "affine".
        rank: Rank of the map; `None` for a vector.
        num_parameters: Numbers in it.
        gain: By how much the predicted share falls without it.
        why: One line.
    """

    layer: int
    site: str
    form: str
    rank: int | None
    num_parameters: int
    gain: float
    why: str

    @property
    def reads(self) -> str:
        """The site that it reads."""
        return Site(self.site).read

    @property
    def writes(self) -> str:
        """The site that it is added to."""
        return Site(self.site).write

    @property
    def steering(self) -> str:
        """Form and rank, as the report's ladder calls them."""
        return self.form if self.rank is None else f"{self.form} r{self.rank}"


@dataclass(frozen=True)
class Trial:
    """A plan with the same steer in every layer, and what is predicted for it.

    Attributes:
        site: Where it reads and writes, as `Site.key`.
        steering: Form and rank.
        num_parameters: Numbers in all layers together.
        predicted: The share that it is predicted to recover.
        measured: The share that the report's ladder recovered with it, if it was there.
    """

    site: str
    steering: str
    num_parameters: int
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Design:
    """What to spend a budget on; `print` shows it as a table.

    Attributes:
        choices: The steers, from the first layer to the last.
        budget: The most parameters that were allowed.
        predicted: The share of the change in behaviour that they recover together, by
            the objective of `equiv.design`: to first order, 1 is all of it.
        reachable: The share that is left to recover at the last block: what the head's
            own update adds is out of reach.
        even: The largest plan within the budget that has the same map at one site in
            every layer, the best of such.
        tried: The same prediction for what the report measured: how far to trust it.
        format: Number of the file format of `to_json`.
    """

    choices: tuple[Choice, ...]
    budget: int
    predicted: float
    reachable: float
    even: Trial | None = None
    tried: tuple[Trial, ...] = ()
    format: int = FORMAT

    @property
    def num_parameters(self) -> int:
        """Numbers in all steers together; never more than the budget."""
        return sum(choice.num_parameters for choice in self.choices)

    @property
    def plan(self) -> tuple[Planned, ...]:
        """What `equiv.fit_sequential(plan=…)` takes."""
        return tuple(Planned(c.layer, c.site, c.form, c.rank) for c in self.choices)

    def to_json(self, path: str | Path) -> None:
        """Write the design; the file is whole or absent."""
        write_fields(dataclasses.asdict(self), Path(path))

    @classmethod
    def from_json(cls, path: str | Path) -> "Design":
        """Read a design back, equal to the one written.

        Raises:
            FileFormatError: If the file is not a design of a known format.
        """
        content = read_format(Path(path), "design", FORMAT)
        return whole(cls, content, Path(path), "design")

    def __str__(self) -> str:
        from equiv.designing.text import to_text

        return to_text(self)
