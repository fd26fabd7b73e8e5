"""`equiv.design`: which sites, layers and ranks to spend a budget of parameters on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import SupportsIndex

from equiv.arguments import as_integer, shown
from equiv.designing.plans import Added, Candidate, best_plan, missing
from equiv.designing.values import Choice, Design, Trial
from equiv.errors import ArgumentError
from equiv.report.answer import unsteered, why_no_behaviour
from equiv.report.naming import is_plain
from equiv.report.numbers import percent
from equiv.report.report import Report
from equiv.report.values import Contributions, Spectrum


def design(report: Report, budget: SupportsIndex) -> Design:
    """Which steers to fit, so that a budget of parameters recovers most behaviour.

    At most one steer in each layer, a vector or an affine map, is chosen from what the
    report measured: what each block's own update adds to the output
    (`report.contributions`), and what a steer of every size leaves of the effect that
    the shift has on the output (`report.spectra`, held-out sequences). The plan is the
    best there is by the prediction that `equiv.designing.plans` states; of equals the
    cheapest. A larger budget never does worse by it. `Design.tried` says how far to
    trust it: the same prediction for what the report steered and measured.

    Args:
        report: Of a model with blocks, checked on real inputs, with the sites to choose
            from among its `sites`.
        budget: The most parameters that all steers together may have.

    Returns:
        The steers with the reason for each; `fit_sequential(plan=design.plan)` fits
        them.

    Raises:
        ArgumentError: If the budget is no integer >= 0, or the report lacks what is
            needed; it says what.

    Example:
        >>> import torch
        >>> from equiv import Update, check
        >>> from equiv.testing.models import transformer
        >>> model = transformer("llama", seed=1, dtype=torch.float32)
        >>> source = torch.Generator().manual_seed(0)
        >>> ids = torch.randint(3, 32, (16, 9), generator=source)
        >>> report = check(model, Update.random(model, 0.05, seed=2), ids)
        >>> found = design(report, 100)
        >>> found.num_parameters <= 100 and 0 < found.predicted < 1
        True
    """
    budget = as_integer("budget", budget, 0)
    contributions = _contributions(report)
    if contributions is None:
        return Design((), budget, predicted=0.0, reachable=0.0)
    prediction = _Prediction(report.spectra, contributions)
    plan = best_plan(prediction.helpful(), prediction.added, budget)
    return Design(
        choices=tuple(prediction.choices(plan)),
        budget=budget,
        predicted=prediction.of(plan),
        reachable=prediction.reachable(),
        even=prediction.even(budget),
        tried=tuple(prediction.tried(report)),
    )


def _contributions(report: Report) -> Contributions | None:
    """What the layers add; `None` where no steer can do anything.

    Raises:
        ArgumentError: If the report lacks what is needed.
    """
    if not isinstance(report, Report):
        raise ArgumentError(f"Expected a report of `equiv.check`, got {shown(report)}.")
    if is_plain(report):
        raise ArgumentError(
            "Expected a report of a model with blocks: this one is one stage, and what "
            "its parts add to the output was not measured."
        )
    if unsteered(report) is None:
        raise ArgumentError(
            f"This report has nothing to design from: {why_no_behaviour(report)}. "
            "Check the model on texts or other real inputs, two sequences at least, "
            "with the forms to choose from."
        )
    if not report.spectra:
        return None  # the update moves nothing before the head
    if report.contributions is None:
        raise ArgumentError(
            "This report does not say what each layer adds to the output: the update "
            "does not change it to first order, or the model has too many layers."
        )
    return report.contributions


class _Prediction:
    """What plans are predicted to recover, by one report."""

    def __init__(
        self, spectra: Sequence[Spectrum], contributions: Contributions
    ) -> None:
        self.added = Added(contributions)
        self.spectra = {(s.layer, s.site): s for s in spectra}
        self.layers = sorted({s.layer for s in spectra})
        self.sites = tuple(dict.fromkeys(s.site for s in spectra))

    def of(self, plan: Sequence[Candidate]) -> float:
        """The share that a plan recovers."""
        return 1 - missing(plan, self.added)

    def reachable(self) -> float:
        """What is recovered if nothing is missing at the last block."""
        return 1 - self.added.between(self.layers[-1], None)

    def steer(self, layer: int, site: str, rank: int | None) -> Candidate | None:
        """A vector (rank `None`) or an affine map; `None` if it was not judged."""
        spectrum = self.spectra.get((layer, site))
        if spectrum is None or (rank is not None and rank > len(spectrum.affine)):
            return None
        if rank is None:  # it reads nothing
            left, form, site = spectrum.output_vector, "vector", spectrum.writes
        else:
            left, form = spectrum.output_affine[rank - 1], "affine"
        cost = spectrum.num_parameters(rank)
        return Candidate(layer, site, form, rank, cost, left)

    def helpful(self) -> list[Candidate]:
        """Every steer that leaves less than there is."""
        steers = (
            self.steer(layer, site, rank)
            for layer, site in self.spectra
            for rank in (None, *self._ranks(layer, site))
        )
        return [steer for steer in steers if steer is not None and steer.left < 1]

    def choices(self, plan: Sequence[Candidate]) -> Iterator[Choice]:
        """The steers of a plan, with what each is worth and why."""
        for i, steer in enumerate(plan):
            rest = [*plan[:i], *plan[i + 1 :]]
            yield Choice(
                layer=steer.layer,
                site=steer.site,
                form=steer.form,
                rank=steer.rank,
                num_parameters=steer.num_parameters,
                gain=self.of(plan) - self.of(rest),
                why=self._why(plan, i),
            )

    def _why(self, plan: Sequence[Candidate], i: int) -> str:
        steer = plan[i]
        arriving = missing(plan[:i], self.added, steer.layer)
        said = (
            f"{percent(arriving)} of the change is missing here, and it leaves "
            f"{percent(steer.left)} of that"
        )
        next_rank = (steer.rank or 0) + 1
        larger = self.steer(steer.layer, steer.site, next_rank)
        if larger is None:
            return said
        more = self.of([*plan[:i], larger, *plan[i + 1 :]]) - self.of(plan)
        if more <= 0:
            return f"{said}; rank {next_rank} would not help"
        cost = larger.num_parameters - steer.num_parameters
        return (
            f"{said}; rank {next_rank} would recover {percent(more)} more for "
            f"{cost:,} numbers"
        )

    def even(self, budget: int) -> Trial | None:
        """The same map in every layer, as large as the budget allows; the best site."""
        found = []
        for site in self.sites:
            ranks = (None, *self._ranks(self.layers[-1], site))
            trials = [self._everywhere(site, rank) for rank in ranks]
            within = [t for t in trials if t and t.num_parameters <= budget]
            found += within[-1:]
        return max(found, key=lambda trial: trial.predicted, default=None)

    def tried(self, report: Report) -> Iterator[Trial]:
        """What the report measured with one site steered in all layers."""
        for row in report.behaviour:
            name, _, rank = row.rung.partition(" r")
            if row.layers != "all" or not (rank.isdigit() or name == "vector"):
                continue
            trial = self._everywhere(row.site, int(rank) if rank else None)
            if trial is not None:
                yield replace(trial, measured=row.recovered)

    def _everywhere(self, site: str, rank: int | None) -> Trial | None:
        steers = [self.steer(layer, site, rank) for layer in self.layers]
        plan = [steer for steer in steers if steer is not None]
        if len(plan) < len(steers):
            return None
        name = "vector" if rank is None else f"affine r{rank}"
        cost = sum(steer.num_parameters for steer in plan)
        return Trial(site, name, cost, self.of(plan))

    def _ranks(self, layer: int, site: str) -> range:
        spectrum = self.spectra.get((layer, site))
        return range(1, 1 + (0 if spectrum is None else len(spectrum.affine)))
