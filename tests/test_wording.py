"""What a report says: headline, reasons, meaning, and text that loses nothing."""

import dataclasses
import re
from collections.abc import Sequence

import pytest
from gallery import NAMES, PLAIN, reports
from rich.console import Console

from equiv.report.answer import best, exact_oracle
from equiv.report.grid import Grid
from equiv.report.meaning import meaning
from equiv.report.naming import place
from equiv.report.numbers import percent
from equiv.report.prose import Prose
from equiv.report.remainders import share_missed
from equiv.report.report import Report
from equiv.report.text import rendered
from equiv.report.values import Behaviour, Order, Scope, Verdict


def text_of(report: Report) -> str:
    """The text as one line."""
    return " ".join(str(report).split())


def with_order(report: Report, places: Sequence[int], order: Order) -> Report:
    """The report with another order from the base at some rows."""
    rows = [
        dataclasses.replace(row, order=order) if i in places else row
        for i, row in enumerate(report.rows)
    ]
    return dataclasses.replace(report, rows=tuple(rows))


def with_recovered(report: Report, shares: dict[str, float]) -> Report:
    """The report with other shares recovered, by rung, the best one's site alone."""

    def changed(row: Behaviour) -> Behaviour:
        share = shares.get(row.rung, row.recovered)
        strength = row.strength and (1.0 if (share or 0) > 0 else 0.0)
        return dataclasses.replace(row, recovered=share, strength=strength)

    rows = tuple(changed(row) for row in report.behaviour)
    return dataclasses.replace(report, behaviour=rows)


@pytest.mark.parametrize("name", NAMES)
def test_text_starts_with_the_answer_and_fits_the_width(name: str) -> None:
    text = str(reports()[name])
    assert all(len(line) <= 80 for line in text.splitlines())
    joined = " ".join(text.split())
    assert joined.startswith(" ".join(reports()[name].headline.split()))
    assert "nan" not in text and "None" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("name", NAMES)
def test_text_says_the_figures_of_the_report_at_any_width(
    name: str, width: int
) -> None:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(rendered(reports()[name]))
    text = captured.get()
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text  # nothing is cut off
    for row in reports()[name].rows:
        if row.scope is Scope.PROPAGATED and row.remainder is not None:
            assert share_missed(row.remainder) in text
            assert row.site in text
    for entry in reports()[name].behaviour:
        if entry.layers == "all" and name != "head":
            assert percent(entry.recovered) in text


def test_a_table_goes_on_below_and_folds_only_when_it_must() -> None:
    header, row = ("layer", "first_site", "second_site"), ("0", "0.123456", "12345678")
    shown = {}
    for width in (40, 22, 12):
        console = Console(width=width, no_color=True)
        with console.capture() as captured:
            console.print(Grid("A title", header, [row]))
        shown[width] = captured.get()
    assert [text.count("layer") for text in shown.values()][:2] == [1, 2]
    assert all("0.123456" in shown[w] and "12345678" in shown[w] for w in (40, 22))
    digits = "".join(c for c in shown[12] if c.isdigit())
    assert digits.replace("0", "") == "12345612345678"


def test_a_word_wider_than_the_console_is_broken_and_not_cut() -> None:
    console = Console(width=10)
    with console.capture() as captured:
        console.print(Prose("of /a/path/longer/than/that"))
    assert "".join(captured.get().split()) == "of/a/path/longer/than/that"


@pytest.mark.parametrize("name", NAMES)
def test_no_table_has_an_empty_head(name: str) -> None:
    for grid in rendered(reports()[name]).renderables:  # type: ignore[attr-defined]
        if isinstance(grid, Grid):
            assert all(grid.header)
            assert all(len(row) == len(grid.header) for row in grid.rows)


def test_the_headline_of_each_kind() -> None:
    headline = {name: report.headline for name, report in reports().items()}
    assert re.match(
        r"Steering (replaces \d+ % of|does not replace) this update.*KL .*; first "
        r"order holds to t = [\d.]+ from the base, ",
        headline["llama"],
    )
    assert "not measured: random inputs" in headline["random"]
    assert "output difference" in headline["module"]
    assert "fewer than two sequences" in headline["single"]
    assert "not established" in headline["fails"]
    assert not reports()["fails"].derivative_holds


@pytest.mark.parametrize("verdict", [Verdict.FAILS, Verdict.INCONCLUSIVE])
def test_the_headline_names_a_row_whose_order_is_the_cause(verdict: Verdict) -> None:
    """The first rows fail by their size alone: they are no reason against the order."""
    report = dataclasses.replace(
        reports()["llama"],
        subject=dataclasses.replace(reports()["llama"].subject, max_remainder=0.0),
    )
    last = len(report.rows) - 1
    wrong = with_order(report, [last - 2, last], Order(verdict, "because of this"))
    named = f"{place(report, report.rows[last - 2])}: {verdict}: because of this"
    assert f"not established: {named}; and 1 more row" in wrong.headline
    assert wrong.headline.endswith("1 more row")
    assert wrong.failing()[0] is wrong.rows[0]
    one = with_order(report, [last], Order(verdict, "because of this"))
    assert one.headline.endswith("because of this")
    worse = with_order(wrong, [last], Order(Verdict.FAILS, "it is wrong"))
    if verdict is Verdict.INCONCLUSIVE:  # what fails comes before what is not seen
        assert f"{place(report, report.rows[last])}: fails" in worse.headline


def test_complaints_end_after_twelve_lines_the_midpoint_among_them() -> None:
    report = reports()["llama"]
    order = Order(Verdict.FAILS, "order 1.02, expected ≥ 2.8")
    rows = [dataclasses.replace(row, order_midpoint=order) for row in report.rows]
    one = dataclasses.replace(report, rows=(rows[0], *report.rows[1:]))
    where = f"{place(report, rows[0])}, from the midpoint: fails: order 1.02"
    assert where in text_of(one) and " more " not in str(one).split("Superposition")[0]
    every = str(dataclasses.replace(report, rows=tuple(rows)))
    assert every.count("order 1.02") == 12
    assert f"and {len(rows) - 12} more" in every


def test_an_update_of_the_head_alone_leaves_nothing_to_steer() -> None:
    report = reports()["head"]
    assert "it moves nothing before the head" in report.headline
    assert "at every strength tried" not in report.headline
    assert "no way of steering changes it" in text_of(report)
    assert "Share of" not in str(report)  # fits to nothing
    (said,) = (line for line in meaning(report) if "head" in line)
    assert "fitted to zero" in said
    # Where a fit saw a shift, something moved that is no row.
    fit = dataclasses.replace(report.fits[0], misfit=0.5)
    other = dataclasses.replace(report, fits=(fit,))
    assert "at every strength tried" in other.headline


def test_few_sequences_are_counted_in_the_headline() -> None:
    assert "on 1 held-out sequence)" in reports()["few"].headline
    assert "interval" not in str(reports()["few"])
    assert "on 3 held-out sequences, 95 % interval" in reports()["llama"].headline
    assert "held-out" not in reports()["module"].headline
    low = [
        dataclasses.replace(row, recovered_low=-0.004, recovered_high=0.72)
        for row in reports()["llama"].behaviour
    ]
    report = dataclasses.replace(reports()["llama"], behaviour=tuple(low))
    assert "95 % interval −0.4 to 72 %)" in report.headline


@pytest.mark.parametrize(
    ("fitted", "oracle", "says"),
    [
        (0.4, 0.9, "price of the form"),
        (0.4, 0.4, "not the form of the steering that sets the limit"),
        (0.4, 0.4001, "no more than what was fitted"),  # 40 % as it is printed
        (0.4, 0.3, "no more than what was fitted"),
        (0.4, -0.8, "recovers −80 %, no more than what was fitted"),
        (0.0, 0.9, "not by the forms that were fitted"),
        (0.0, -0.1, "recovers nothing either"),
    ],
)
def test_the_oracle_is_compared_with_what_was_fitted(
    fitted: float, oracle: float, says: str
) -> None:
    rungs = dict.fromkeys(("vector", "affine r1", "affine r8", "affine full"), fitted)
    # Offsets as good as the oracle: nothing is said of what they cost.
    known = {**rungs, "exact oracle": oracle, "simultaneous offsets": oracle}
    report = with_recovered(reports()["llama"], known)
    *_, before, last = meaning(report)
    assert says in last
    assert ("price" in last) == (0 < fitted < oracle - 0.001)
    assert ("No steering that was fitted helps" in before) == (fitted == 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_meaning_is_never_empty(name: str) -> None:
    report = reports()[name]
    said = meaning(report)
    assert said and all(line.endswith(".") for line in said)
    row, oracle = best(report), exact_oracle(report)
    if any("price of the form" in line for line in said):
        assert row and oracle and 0 < (row.recovered or 0) < (oracle.recovered or 0)
    nothing = dataclasses.replace(
        report, rows=(), fits=(), behaviour=(), first_positions=(), notes=()
    )
    assert meaning(nothing) == [
        "No layer and site could be judged: nothing was measured."
    ]


def test_a_failing_order_is_part_of_the_meaning() -> None:
    assert meaning(reports()["fails"])[0].startswith("At 2 of 3 sites the remainder")
    unseen = with_order(reports()["random"], [0], Order(Verdict.INCONCLUSIVE, "tiny"))
    assert "could not be read off" in meaning(unseen)[0]


@pytest.mark.parametrize(
    ("share", "full", "says"),
    [
        (0.09, 0.5, "The best small steering that"),
        (0.11, 0.3, "The best steering that"),
        (0.11, 0.5, "The best steering of low rank that"),
    ],
)
def test_small_is_less_than_a_tenth(share: float, full: float, says: str) -> None:
    shares = {"vector": 0.1, "affine r1": 0.2, "affine r8": 0.4, "affine full": full}
    report = with_recovered(reports()["llama"], shares)
    rows = [dataclasses.replace(b, parameter_share=share) for b in report.behaviour]
    report = dataclasses.replace(report, behaviour=tuple(rows))
    assert any(line.startswith(says) for line in meaning(report))


@pytest.mark.parametrize("name", NAMES)
def test_plain_modules_have_sites_and_rows_and_no_layers(name: str) -> None:
    text = text_of(reports()[name])
    assert (" one stage " in text) == (name in PLAIN)
    if name in PLAIN:
        assert "layer" not in text and " token" not in text
        assert "40 rows, 10 held out" in text
    else:
        assert "2 layers" in text and " rows, " not in text
    encoder = name in (*PLAIN, "encoder")
    assert text.count("KL: not applicable (the model has no logits)") == encoder


def test_rows_are_named_by_what_they_are() -> None:
    names = {place(reports()["llama"], row) for row in reports()["llama"].rows}
    assert {"layer 0, attn_out, local", "logits (propagated)"} <= names
    module = reports()["module"]
    assert [place(module, row) for row in module.rows][1] == "1 (propagated)"


def test_at_the_base_nothing_is_said_of_the_midpoint() -> None:
    assert "midpoint" not in str(reports()["part"])
    assert "from the base | midpoint" in str(reports()["llama"])


def test_best_single_layers_are_those_that_recover_something() -> None:
    report = reports()["llama"]
    assert "Best single layers" in str(report)
    rows = [
        row if row.layers == "all" else dataclasses.replace(row, recovered=None)
        for row in report.behaviour
    ]
    none = dataclasses.replace(report, behaviour=tuple(rows))
    assert "Best single layers" not in str(none)
    assert "–" not in text_of(report).split("Best single layers")[1].split("Share")[0]


def test_few_tokens_are_a_matter_of_maps() -> None:
    assert "generalise; the held-out misfit above" in text_of(reports()["llama"])
    assert "that vector leaves" in text_of(reports()["vector"])
    assert "generalise" not in text_of(reports()["vector"])
