"""Designs against exhaustive search, and the objective written out once more."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gallery import reports
from hypothesis import given, settings
from hypothesis import strategies as st
from witness import SWEEP

import equiv
from equiv.designing.plans import Added, Candidate, best_plan, missing
from equiv.report.report import Report
from equiv.report.values import Contributions
from equiv.testing.models import transformer

Plan = Sequence[Candidate]


def left(plan: Plan, shares: dict[int, float]) -> float:
    """What a plan leaves, stage by stage: the objective as its definition reads."""
    at = {steer.layer: steer for steer in plan}
    assert len(at) == len(plan)  # one steer per layer
    total, since = 0.0, 0.0
    for stage in range(-1, max(shares) + 1):
        since += shares.get(stage, 0.0)
        if stage in at:
            total, since = at[stage].left * max(0.0, total + since), 0.0
    return max(0.0, total + since)


def cost(plan: Plan) -> int:
    return sum(steer.num_parameters for steer in plan)


def all_plans(candidates: Plan) -> list[tuple[Candidate, ...]]:
    """Every plan with at most one steer per layer."""
    layers = sorted({steer.layer for steer in candidates})
    options = [[None, *(s for s in candidates if s.layer == layer)] for layer in layers]
    return [tuple(s for s in p if s) for p in itertools.product(*options)]


@st.composite
def problems(draw, equal_costs: bool) -> tuple[list[Candidate], dict[int, float]]:  # type: ignore[no-untyped-def]
    """A few layers, a few steers in each; shares that may be negative."""
    layers = draw(st.integers(1, 4))
    share = st.floats(-0.5, 2.0)
    shares = {stage: draw(share) for stage in range(-1, layers + 1)}
    price = st.just(7) if equal_costs else st.integers(1, 30)
    steers = [
        Candidate(
            layer, "block_out", "affine", rank, draw(price), draw(st.floats(0, 1.5))
        )
        for layer in range(layers)
        for rank in range(1, 1 + draw(st.integers(0, 3)))
    ]
    return steers, shares


def contributions(shares: dict[int, float]) -> Contributions:
    return Contributions("kl", tuple(shares), tuple(shares.values()), ())


@pytest.mark.parametrize("equal_costs", [True, False])
@given(data=st.data(), budget=st.integers(0, 80))
@settings(max_examples=150 * SWEEP)
def test_no_plan_is_better(equal_costs: bool, data: st.DataObject, budget: int) -> None:
    """Dynamic programming is exact, so no gap has to be allowed for unequal costs.

    The two sum the same products in another order: 1e-12 is a few thousand roundings.
    """
    steers, shares = data.draw(problems(equal_costs))
    plan = best_plan(steers, Added(contributions(shares)), budget)
    assert cost(plan) <= budget
    assert [s.layer for s in plan] == sorted({s.layer for s in plan})
    mine = left(plan, shares)
    within = [p for p in all_plans(steers) if cost(p) <= budget]
    best = min(left(p, shares) for p in within)
    assert mine == pytest.approx(best, rel=1e-12, abs=1e-12)
    cheaper = [p for p in within if cost(p) < cost(plan)]
    assert all(left(p, shares) > mine - 1e-12 for p in cheaper)
    assert plan == best_plan(steers, Added(contributions(shares)), budget)


@given(data=st.data())
@settings(max_examples=100 * SWEEP)
def test_a_larger_budget_never_does_worse(data: st.DataObject) -> None:
    """A theorem, since the search is exact: every plan stays affordable."""
    steers, shares = data.draw(problems(equal_costs=False))
    added = Added(contributions(shares))
    found = [missing(best_plan(steers, added, b), added) for b in range(0, 90, 6)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found))
    # With everything affordable nothing but the objective decides.
    best = min(left(p, shares) for p in all_plans(steers))
    everything = missing(best_plan(steers, added, 10**9), added)
    assert everything == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_of_equals_the_cheapest_is_taken() -> None:
    """Numbers that sums of halves leave exact, so that equals are equal."""
    shares = {0: 0.5, 1: 0.5, 2: 0.0}
    made = [
        Candidate(layer, "block_out", "affine", rank, price, 0.5)
        for layer in (0, 1)
        for rank, price in ((3, 30), (1, 10), (2, 20))
    ]
    added = Added(contributions(shares))
    both = best_plan(made, added, 100)
    assert [(s.layer, s.rank) for s in both] == [(0, 1), (1, 1)]
    useless = [dataclasses.replace(s, left=1.0) for s in made]
    assert best_plan(useless, added, 100) == ()


def test_many_layers_and_ranks_take_seconds() -> None:
    """Forty-eight layers with sixty-five sizes each: no enumeration could."""
    shares = dict.fromkeys(range(-1, 49), 1 / 50)
    steers = [
        Candidate(layer, "block_out", "affine", r, 512 + r * 1024, 0.2 + 0.8 * 0.9**r)
        for layer in range(48)
        for r in range(65)
    ]
    added = Added(contributions(shares))
    even = [s for s in steers if s.rank == 8]
    plan = best_plan(steers, added, cost(even))
    assert cost(plan) <= cost(even)
    assert missing(plan, added) < missing(even, added)


def candidates(report: Report) -> list[Candidate]:
    """Every steer that the report judged, from its values alone."""
    found = []
    for s in report.spectra:
        sizes = [("vector", None, s.output_vector)]
        sizes += [("affine", r, x) for r, x in enumerate(s.output_affine, 1)]
        for form, rank, share in sizes:
            d, e = s.read_width, s.written_width
            price = e if rank is None else rank * (d + e) + e
            site = s.writes if rank is None else s.site
            found.append(Candidate(s.layer, site, form, rank, price, share))
    return found


@pytest.mark.parametrize("name", ["llama", "pairs", "further", "encoder", "part"])
@pytest.mark.parametrize("budget", [0, 15, 16, 100, 300, 10**9])
def test_a_design_is_the_best_of_all_plans(name: str, budget: int) -> None:
    report = reports()[name]
    found = equiv.design(report, budget)
    parts = report.contributions
    assert parts is not None
    shares = dict(zip(parts.stages, parts.shares, strict=True))
    steers = candidates(report)
    within = [p for p in all_plans(steers) if cost(p) <= budget]
    best = 1 - min(left(p, shares) for p in within)
    assert found.predicted == pytest.approx(best, abs=1e-12)
    assert found.num_parameters <= found.budget == budget
    known = {(s.layer, s.site, s.form, s.rank): s for s in steers}
    plan = [known[c.layer, c.site, c.form, c.rank] for c in found.choices]
    assert found.predicted == pytest.approx(1 - left(plan, shares), abs=1e-12)
    assert [c.num_parameters for c in found.choices] == [s.num_parameters for s in plan]
    for i, choice in enumerate(found.choices):
        rest = plan[:i] + plan[i + 1 :]
        lost = left(rest, shares) - left(plan, shares)
        assert choice.gain == pytest.approx(lost, abs=1e-12)
    assert all(p.left < 1 for p in plan)
    if budget < 16:  # a vector of this width has 16 numbers
        assert not found.choices and found.predicted == pytest.approx(0, abs=1e-12)
        assert f"Nothing within {budget} numbers helps" in str(found)


def test_a_plan_is_fitted_as_designed() -> None:
    report = reports()["pairs"]
    found = equiv.design(report, 400)
    assert {c.site for c in found.choices} <= {"block_out", "resid_mid->block_out"}
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    ids = torch.randint(3, 32, (12, 9), generator=torch.Generator().manual_seed(0))
    steering = equiv.fit_sequential(model, update, ids, plan=found.plan)
    assert set(steering) == {(c.layer, c.site) for c in found.choices}
    assert steering.num_parameters == found.num_parameters


def test_evenly_is_the_largest_that_fits() -> None:
    report = reports()["llama"]
    parts = report.contributions
    assert parts is not None
    shares = dict(zip(parts.stages, parts.shares, strict=True))
    found = equiv.design(report, 300)
    assert found.even is not None and found.even.num_parameters <= 300
    # Two layers of width 16: r · 32 + 16 numbers each, so rank 4 fits, rank 5 does not.
    assert found.even.steering == "affine r4" and found.even.num_parameters == 288
    sites = ("attn_out", "mlp_in", "mlp_out", "block_out")
    every = [
        1
        - left([s for s in candidates(report) if (s.site, s.rank) == (site, 4)], shares)
        for site in sites
    ]
    assert found.even.predicted == pytest.approx(max(every), abs=1e-12)
    assert found.predicted >= found.even.predicted
    assert equiv.design(report, 31).even is None


def test_predictions_stand_beside_what_was_measured() -> None:
    report = reports()["llama"]
    found = equiv.design(report, 300)
    rows = {(b.site, b.rung): b for b in report.behaviour if b.layers == "all"}
    tried = {(t.site, t.steering): t for t in found.tried}
    sites = ("attn_out", "mlp_in", "mlp_out", "block_out")
    rungs = ("vector", "affine r1", "affine r8")
    assert set(tried) == set(itertools.product(sites, rungs))
    for key, trial in tried.items():
        assert trial.measured == rows[key].recovered
        assert trial.num_parameters == rows[key].num_parameters


def test_a_design_says_why(tmp_path: Path) -> None:
    found = equiv.design(reports()["further"], 400)
    said = " ".join(str(found).split())
    assert f"{len(found.choices)} steer" in said.splitlines()[0]
    for choice in found.choices:
        assert f"Layer {choice.layer}: {choice.why}." in said
        assert "\n" not in choice.why and "is missing here" in choice.why
    assert all(len(line) <= 80 for line in str(found).splitlines())
    pairs = any("->" in choice.site for choice in found.choices)
    assert ("reads writes" in said) == pairs
    found.to_json(tmp_path / "design.json")
    assert equiv.Design.from_json(tmp_path / "design.json") == found
    content = json.loads((tmp_path / "design.json").read_text())
    content["choices"][0].pop("gain")
    (tmp_path / "design.json").write_text(json.dumps(content))
    with pytest.raises(equiv.FileFormatError, match="lacks 'gain'"):
        equiv.Design.from_json(tmp_path / "design.json")


def test_an_update_of_the_head_alone_leaves_nothing_to_steer() -> None:
    found = equiv.design(reports()["head"], 10**6)
    assert not found.choices and found.predicted == found.reachable == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("random", "random inputs"),
        ("single", "fewer than two sequences"),
        ("module", "a model with blocks"),
    ],
)
def test_what_a_report_lacks_is_said(name: str, says: str) -> None:
    with pytest.raises(equiv.ArgumentError, match=says):
        equiv.design(reports()[name], 100)


@pytest.mark.parametrize("budget", [-1, 1.5, True, "all", None])
def test_budgets_are_whole_numbers(budget: object) -> None:
    with pytest.raises(equiv.ArgumentError, match="`budget` to be an integer >= 0"):
        equiv.design(reports()["llama"], budget)  # type: ignore[arg-type]


def test_reports_are_reports() -> None:
    with pytest.raises(equiv.ArgumentError, match=re.escape("`equiv.check`")):
        equiv.design({"rows": []}, 100)  # type: ignore[arg-type]
    without = dataclasses.replace(reports()["llama"], contributions=None)
    with pytest.raises(equiv.ArgumentError, match="too many layers"):
        equiv.design(without, 100)
