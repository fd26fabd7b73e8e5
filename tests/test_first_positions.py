"""Figures with and without first positions, against the whole model by hand."""

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import equiv
from equiv.model.inputs import from_inputs
from equiv.model.precision import arithmetic
from equiv.model.stages import staged
from equiv.report.html import to_html
from equiv.report.report import Report
from equiv.report.values import FirstPosition, Row, Scope
from equiv.shift.calculus import Selection
from equiv.shift.table import Table
from equiv.shift.traces import Trace
from equiv.testing.models import transformer

F64 = torch.float64
SINK_TOKEN = 2
IDS = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(0))
# Padding on the left, of different lengths: the first position is not the column 0.
MASK = (torch.arange(8)[None] >= torch.tensor([0, 3, 1, 0, 2, 0])[:, None]).long()
FIRST = MASK.bool() & (MASK.cumsum(1) == 1)


def model_and_inputs(sink: bool) -> tuple[Any, dict[str, Tensor]]:
    model = transformer("llama", seed=1)
    ids = torch.where(FIRST, SINK_TOKEN, IDS)
    if sink:
        model.get_input_embeddings().weight.data[SINK_TOKEN] *= 1e4
    return model, {"input_ids": ids, "attention_mask": MASK}


def checked(sink: bool) -> tuple[Any, equiv.Update, dict[str, Tensor], Report]:
    model, call = model_and_inputs(sink)
    update = equiv.Update.random(model, 0.1, seed=2)
    report = equiv.check(model, update, call, dtype=F64, forms=())
    return model, update, call, report


def below(model: Any, update: equiv.Update, call: dict[str, Tensor]) -> list[Tensor]:
    """Block 0's output: base, shift, and slopes at W and W + ΔW/2, each [b, s, d]."""
    base = {name: p.detach() for name, p in model.named_parameters()}
    delta = {n: d.to(F64) for n, d in witness.dense(update).items()}

    def at(t: Tensor) -> Tensor:
        moved = {n: p + t * delta[n] if n in delta else p for n, p in base.items()}
        found = functional_call(
            model, moved, (), {**call, "output_hidden_states": True, "use_cache": False}
        )
        return found.hidden_states[1]

    one = torch.ones((), dtype=F64)
    # Norms of transformers compute in float32 otherwise; attention other than the
    # math path has no forward derivative.
    with arithmetic(F64), sdpa_kernel(SDPBackend.MATH):
        h, slope = jvp(at, (0 * one,), (one,))[:2]
        midway = jvp(at, (one / 2,), (one,))[1]
        return [t.detach() for t in (h, at(one) - h, slope, midway)]


@pytest.mark.parametrize("sink", [False, True])
def test_rows_are_those_of_the_whole_model(sink: bool) -> None:
    model, update, call, report = checked(sink)
    h, shift, slope, midway = below(model, update, call)
    row = next(
        r
        for r in report.rows
        if (r.layer, r.site, r.scope) == (0, "block_out", Scope.PROPAGATED)
    )
    assert row.rest is not None
    for found, mask in ((row, MASK.bool()), (row.rest, MASK.bool() & ~FIRST)):
        size = shift[mask].norm()
        expected = {
            "tokens": int(mask.sum()),
            "norm_base": float(h[mask].norm()),
            "norm_exact": float(size),
            "remainder": float((shift - slope)[mask].norm() / size),
            "remainder_midpoint": float((shift - midway)[mask].norm() / size),
        }
        # Rounding of differences of activations that are 1e4 at a sink: 1e4 eps.
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-8), name
    told = report.first_positions[0]
    assert told.norm_first == pytest.approx(float(h[FIRST].norm(dim=-1).mean()))
    rest = MASK.bool() & ~FIRST
    assert told.norm_rest == pytest.approx(float(h[rest].norm(dim=-1).mean()))
    assert [p.sink for p in report.first_positions] == [sink, sink]


@pytest.mark.parametrize("midpoint", [False, True])
def test_the_radius_without_them_is_the_largest_good_scale(midpoint: bool) -> None:
    """Brute force: remainders on whole forwards, on both sides of it."""
    model, update, call, report = checked(False)
    rows = [r for r in report.rows if r.rest is not None and r.rest.radius is not None]
    assert [(r.layer, r.site, r.scope) for r in rows] == [
        (0, "attn_out", Scope.PROPAGATED)  # elsewhere the remainder is much the same
    ]
    rest = rows[0].rest
    assert rest is not None
    radius = rest.radius_midpoint if midpoint else rest.radius
    assert radius is not None
    mask, place = MASK.bool() & ~FIRST, (0, "attn_out")
    base = witness.tuned_activations(model, update, call, 0.0)[place][mask]

    def remainder(t: float) -> float:
        slopes = witness.whole_jvp(model, update, call, t / 2 if midpoint else 0.0)[1]
        tuned = witness.tuned_activations(model, update, call, t)[place][mask]
        missed = tuned - base - t * slopes[place][mask]
        return float(missed.norm() / (tuned - base).norm())

    # "To 5 %": the crossing lies within 2.5 % of it.
    assert remainder(radius.value * 0.975) <= 0.1 < remainder(radius.value * 1.025)
    said = " ".join(str(report).split())
    assert rows[0].radius is not None
    assert rest.radius is not None
    figures = f"t = {rows[0].radius.value:.2g}", f"t = {rest.radius.value:.2g}"
    assert f"the radius is {figures[0]} with them, {figures[1]} without" in said


def test_what_only_a_sink_misses_is_gone_without_it() -> None:
    """Shift 3 missed whole at the first position, 4 caught whole at the other."""
    base = torch.zeros(1, 3, 1)
    shift, slope = torch.tensor([[[9.0], [3.0], [4.0]]]), torch.tensor([[0.0, 0, 4.0]])
    sites = [{"block_out": v} for v in (base, base + shift, slope[..., None])]
    model, call = model_and_inputs(False)
    with staged(model, [batch_of(model, call)], F64) as cut:
        stage = next(s for s in cut.stages if s.name == "block")
    trace = Trace(
        stage, 0, True, True, {0.0: sites[0], 1.0: sites[1]}, {0.0: sites[2]}, {}, {}
    )
    table = Table(Selection(frozenset([0]), ("block_out",)))
    table.add(trace, torch.tensor([[False, True, True]]))
    row = table.rows[0, "block_out", Scope.PROPAGATED]
    assert row.first.relative_remainder == pytest.approx(3 / 5)
    assert row.rest is not None
    assert row.rest.first.relative_remainder == 0.0
    assert (row.tokens, row.rest.tokens) == (2, 1)


def batch_of(model: Any, call: dict[str, Tensor]) -> Any:
    return from_inputs(model, call, None)[0]


def test_the_report_says_whether_there_is_a_sink(tmp_path: Path) -> None:
    report, plain = checked(True)[3], checked(False)[3]
    said = " ".join(str(report).split())
    assert "There is an attention sink after layers 0, 1:" in said
    assert "Without first positions the remainder changes most at" in said
    assert "There is no attention sink:" in " ".join(str(plain).split())
    assert "With and without the first position" in to_html(report)
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    pytest.importorskip("pandas")
    assert list(report.to_frame("first_positions")["sink"]) == [True, True]
    assert "rest_remainder" in report.to_frame().columns


def test_without_positions_there_is_nothing_to_leave_out() -> None:
    ids = torch.randint(3, 32, (4, 1), generator=torch.Generator().manual_seed(1))
    model = transformer("llama", seed=1)
    found = equiv.check(model, equiv.Update.random(model, 0.1, seed=2), ids, forms=())
    rows: tuple[Row, ...] = found.rows
    assert all(row.rest is None for row in rows)
    assert found.first_positions == ()
    assert "attention sink" not in str(found)


@pytest.mark.parametrize(("first", "rest", "times"), [(9.0, 3.0, 3.0), (1.0, 0.0, inf)])
def test_how_many_times_as_large(first: float, rest: float, times: float) -> None:
    assert FirstPosition(0, first, rest, sink=True).times == times
