"""Which tokens an update sends to other experts, against routing done by hand."""

import copy
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import equiv
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.precision import arithmetic
from equiv.model.routing import chosen_experts, flipped, routers
from equiv.model.stage import Stage
from equiv.model.stages import staged
from equiv.report.html import to_html
from equiv.report.report import Report
from equiv.report.values import Row, Scope, Unflipped, Verdict
from equiv.shift.calculus import Selection
from equiv.shift.flips import FlipCount, Flips
from equiv.shift.propagate import propagate
from equiv.shift.table import FullSize, Table
from equiv.shift.traces import BASE, MIDPOINT, TUNED, Trace
from equiv.testing.models import transformer

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")
IDS = torch.randint(3, 32, (6, 9), generator=torch.Generator().manual_seed(0))
# Padding on the left, of different lengths.
MASK = (torch.arange(9)[None] >= torch.tensor([0, 3, 1, 0, 2, 0])[:, None]).long()
CALL = {"input_ids": IDS, "attention_mask": MASK}
COUNTS = MASK.bool()
F64 = torch.float64


def experts_by_hand(model: Any, layer: int) -> list[set[int]] | None:
    """The experts of each token, from the MLP's input and the gate's own weights."""
    mlp = model.model.layers[layer].mlp
    if not hasattr(mlp, "experts"):
        return None
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    # Norms of transformers compute in float32 otherwise.
    with torch.no_grad(), arithmetic(F64):
        model(**CALL)
    handle.remove()
    gate = getattr(mlp, "gate", None) or mlp.router
    scores = seen[0].flatten(0, 1) @ gate.weight.T + getattr(gate, "bias", 0.0)
    if model.config.model_type == "deepseek_v3":  # the best group of two, by its sum
        scores = scores.sigmoid()
        groups = scores.view(len(scores), 2, 2).sum(-1).argmax(-1)
        keep = torch.arange(4)[None] // 2 == groups[:, None]
        scores = scores.masked_fill(~keep, -1.0)
    return [set(row.tolist()) for row in scores.topk(2).indices]


def flips_by_hand(model: Any, update: equiv.Update) -> dict[int, Tensor]:
    """Layer → tokens that count whose experts are others in the tuned copy."""
    tuned = copy.deepcopy(model)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta
    found = {}
    for layer in range(len(model.model.layers)):
        runs = [experts_by_hand(m, layer) for m in (model, tuned)]
        if runs[0] is None or runs[1] is None:
            continue
        moved = [a != b for a, b in zip(runs[0], runs[1], strict=True)]
        found[layer] = torch.tensor(moved).view_as(COUNTS) & COUNTS
    return found


def whole(
    model: Any, update: equiv.Update, size: float = 1.0
) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Block 0's output and the logits, of an update of t times the size.

    The base, the shift, and the slopes at W and W + t/2 ΔW.
    """
    base = {name: p.detach() for name, p in model.named_parameters()}
    delta = {n: d.to(F64) for n, d in witness.dense(update).items()}

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        moved = {n: p + t * delta[n] if n in delta else p for n, p in base.items()}
        out = functional_call(
            model, moved, (), {**CALL, "output_hidden_states": True, "use_cache": False}
        )
        return out.hidden_states[1], out.logits

    one = torch.ones((), dtype=F64)
    with arithmetic(F64), sdpa_kernel(SDPBackend.MATH):
        h, slope = jvp(at, (0 * one,), (one,))[:2]
        midway = jvp(at, (one * size / 2,), (one,))[1]
        tuned = at(one * size)
    shift = [b - a for a, b in zip(h, tuned, strict=True)]
    places = ((0, "block_out"), (len(model.model.layers), "logits"))
    sets = zip(h, shift, slope, midway, strict=True)
    return {
        place: (a.detach(), b.detach(), c.detach(), d.detach())
        for place, (a, b, c, d) in zip(places, sets, strict=True)
    }


def full_pass(model: Any, update: equiv.Update, derivative: str = "forward") -> Table:
    """The engine's table at full size, without the rest of a check."""
    points = (BASE, MIDPOINT, TUNED)
    with (
        measured(model),
        staged(model, from_inputs(model, CALL, None), F64, sites=["block_out"]) as cut,
    ):
        selection = Selection(frozenset(cut.layers), ("block_out",))
        table = Table(selection, flips=Flips(cut.gates))
        passes = propagate(cut, update, points, local=points, derivative=derivative)
        for _, _, traces in passes:
            for trace in traces:
                table.add(trace, cut.mask(trace.stage, trace.batch))
    return table


@pytest.mark.parametrize("family", MIXTURES)
def test_shares_and_remainders_are_those_by_hand(family: str) -> None:
    model = transformer(family, seed=1)
    update = equiv.Update.random(model, 0.15, seed=0)
    table = full_pass(model, update)
    flips = flips_by_hand(model, update)
    ever = torch.stack(list(flips.values())).any(0)
    so_far = torch.zeros_like(COUNTS)
    expected = {}
    for layer, moved in flips.items():
        so_far = so_far | moved
        expected[layer] = FlipCount(
            int(moved.sum()), int(so_far.sum()), int(COUNTS.sum())
        )
    assert table.flips.counts == expected
    assert 0 < int(ever.sum()) < int(COUNTS.sum())
    for (layer, site), (h, shift, slope, midway) in whole(model, update).items():
        row = table.rows[layer, site, Scope.PROPAGATED]
        flipped_here = ever if site == "logits" else flips.get(layer)
        if flipped_here is None:  # no mixture up to here
            assert row.unflipped is None
            continue
        for sums, mask in ((row, COUNTS), (row.unflipped, COUNTS & ~flipped_here)):
            assert sums is not None
            size = float(shift[mask].norm())
            found = {
                "tokens": sums.tokens,
                "norm_base": sums.base.norm,
                "norm_exact": sums.first.exact**0.5,
                "remainder": sums.first.relative_remainder,
                "midpoint": sums.midpoint.relative_remainder,
            }
            assert found == pytest.approx(
                {
                    "tokens": int(mask.sum()),
                    "norm_base": float(h[mask].norm()),
                    "norm_exact": size,
                    "remainder": float((shift - slope)[mask].norm()) / size,
                    "midpoint": float((shift - midway)[mask].norm()) / size,
                },
                rel=1e-9,
            )


@cache
def checked(size: float, family: str = "mixtral") -> tuple[Any, equiv.Update, Report]:
    model = transformer(family, seed=1)
    update = equiv.Update.random(model, size, seed=0)
    return model, update, equiv.check(model, update, CALL, dtype=F64, forms=())


def propagated(report: Report) -> list[Row]:
    return [row for row in report.rows if row.scope is Scope.PROPAGATED]


def test_the_report_says_who_changes_experts(tmp_path: Path) -> None:
    model, update, report = checked(0.15)
    flips, so_far = flips_by_hand(model, update), torch.zeros_like(COUNTS)
    total = int(COUNTS.sum())
    for entry, (layer, moved) in zip(report.routing, flips.items(), strict=True):
        so_far = so_far | moved
        assert (entry.layer, entry.tokens) == (layer, total)
        assert entry.flipped == pytest.approx(int(moved.sum()) / total)
        assert entry.flipped_so_far == pytest.approx(int(so_far.sum()) / total)
    kept = [round(total * (1 - entry.flipped_so_far)) for entry in report.routing]
    for row in propagated(report):
        assert row.unflipped is not None
        assert row.unflipped.tokens == kept[min(row.layer, 1)]
    assert all(r.unflipped is None for r in report.rows if r.scope is Scope.LOCAL)
    said = " ".join(str(report).split())
    most = max(report.routing, key=lambda entry: entry.flipped)
    assert f"{100 * most.flipped:.0f} % of tokens change experts at layer" in said
    assert "the derivative does not see that" in said
    assert "They may still attend to tokens that do not" in said
    assert "Percent of tokens that the update sends to other experts" in said
    page = to_html(report)
    assert "<h2>Routing</h2>" in page
    assert "those that keep their experts" in page
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    pytest.importorskip("pandas")
    assert list(report.to_frame("routing")["flipped"]) == [
        entry.flipped for entry in report.routing
    ]
    assert "unflipped_remainder" in report.to_frame().columns


@pytest.mark.parametrize("midpoint", [False, True])
def test_the_radius_without_them_is_the_largest_good_scale(midpoint: bool) -> None:
    """Brute force: the remainder over the kept tokens, on both sides of it."""
    model, update, report = checked(0.15)
    kept = COUNTS & ~flips_by_hand(model, update)[0]
    row = next(r for r in propagated(report) if (r.layer, r.site) == (0, "block_out"))
    assert row.unflipped is not None
    pairs = (
        (row.radius, row.unflipped.radius),
        (row.radius_midpoint, row.unflipped.radius_midpoint),
    )
    over_all, radius = pairs[midpoint]
    assert over_all is not None
    assert radius is not None
    assert over_all.value < radius.value / 2
    assert not radius.at_least

    def remainder(t: float) -> float:
        _, shift, *slopes = whole(model, update, t)[0, "block_out"]
        rest = shift - t * slopes[midpoint]
        return float(rest[kept].norm() / shift[kept].norm())

    # "To 5 %": the crossing lies within 2.5 % of it.
    assert remainder(radius.value * 0.975) <= 0.1 < remainder(radius.value * 1.025)
    said = " ".join(str(report).split())
    assert "Over them the radius from the base is t = " in said


def test_an_update_too_small_to_flip_leaves_all_tokens() -> None:
    report = checked(1e-6)[2]
    assert [entry.flipped_so_far for entry in report.routing] == [0.0, 0.0]
    for row in propagated(report):
        assert row.unflipped == Unflipped(
            row.tokens,
            row.norm_base,
            row.norm_exact,
            row.remainder,
            row.remainder_midpoint,
            row.order,
            row.order_midpoint,
        )
    said = " ".join(str(report).split())
    assert "No token changes experts at any of 2 mixtures of experts" in said
    assert "Percent of tokens" not in said
    assert "<h2>Routing</h2>" not in to_html(report)


def test_nothing_of_it_is_said_of_a_dense_model() -> None:
    report = checked(0.15, "llama")[2]
    assert report.routing == ()
    assert all(row.unflipped is None for row in report.rows)
    assert "experts" not in str(report)
    assert "experts" not in to_html(report)


def test_an_order_that_only_the_routing_breaks_holds_without_it() -> None:
    """The last token of one sequence is put a hair from a tie: nobody attends to it."""
    model = transformer("mixtral", seed=1)
    gate = model.model.layers[0].mlp.gate
    seen: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    with torch.no_grad(), arithmetic(F64):
        model(**CALL)
    handle.remove()
    x = seen[0][0, -1]
    _, second, third, _ = (gate.weight @ x).argsort(descending=True).tolist()
    gap = (gate.weight[second] - gate.weight[third]) @ x
    gate.weight.data[third] += (gap - 1e-5) * x / (x @ x)
    push = torch.zeros_like(gate.weight)
    push[third] = x / (
        x @ x
    )  # over the tie at t = 1e-5, below every scale but the noise's
    deltas = dict(witness.dense(equiv.Update.random(model, 1e-3, seed=0)))
    name = "model.layers.0.mlp.gate.weight"
    deltas[name] = deltas[name] + push.to(deltas[name])
    report = equiv.check(model, deltas, CALL, dtype=F64, forms=(), sites=["mlp_out"])
    row = next(r for r in propagated(report) if (r.layer, r.site) == (0, "mlp_out"))
    assert row.order.verdict is Verdict.FAILS
    assert row.unflipped is not None
    assert row.unflipped.order is not None
    assert row.unflipped.order.verdict is Verdict.HOLDS
    assert row.unflipped.order_midpoint is not None
    assert row.unflipped.order_midpoint.verdict is Verdict.HOLDS
    said = " ".join(str(report).split())
    assert "there it is the routing that breaks it, not the derivative" in said


def test_central_differences_see_the_same_routing() -> None:
    model = transformer("gpt_oss", seed=1)
    update = equiv.Update.random(model, 0.15, seed=0)
    tables = [full_pass(model, update, how) for how in ("forward", "central")]
    assert tables[0].flips.counts == tables[1].flips.counts
    key = (2, "logits", Scope.PROPAGATED)
    parts = [table.rows[key].unflipped for table in tables]
    rest: list[FullSize] = [part for part in parts if part is not None]
    assert rest[0].first.relative_remainder == pytest.approx(
        rest[1].first.relative_remainder, rel=1e-6
    )


def trace_of(layer: int, chosen: dict[float, list[int]], batch: int = 0) -> Trace:
    """One block that sends tokens to one expert each, at some scales."""
    stage = Stage("block", layer, (), (), "block_out")
    experts = {
        scale: torch.nn.functional.one_hot(torch.tensor(ids), 4).bool()
        for scale, ids in chosen.items()
    }
    return Trace(stage, batch, True, True, {}, {}, {}, {}, experts=experts)


def test_who_has_flipped_stays_flipped() -> None:
    mask = torch.tensor([[True, True, True, False]])
    flips = Flips({0, 2})
    first = trace_of(0, {0.0: [0, 1, 2, 3], 0.5: [3, 1, 2, 3], 1.0: [0, 1, 3, 0]})
    dense = trace_of(1, {})
    last = trace_of(2, {0.0: [0, 1, 2, 3], 1.0: [0, 2, 2, 0]})
    assert flips.kept(first, mask) is None
    kept = []
    for trace in (first, dense, last):
        flips.add(trace, mask)
        found = flips.kept(trace, mask)
        assert found is not None
        kept.append(found[0].tolist())
    assert kept == [
        [True, True, False, False],  # the padding has flipped, and does not count
        [True, True, False, False],
        [True, False, False, False],
    ]
    assert flips.counts == {0: FlipCount(1, 1, 3), 2: FlipCount(1, 2, 3)}
    other = trace_of(2, {0.0: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}, batch=1)
    flips.add(other, mask)
    assert flips.kept(other, mask) is not None
    assert flips.counts[2] == FlipCount(1, 2, 6)


def test_every_scale_may_be_asked_for() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    flips = Flips({0}, scales=None)
    trace = trace_of(0, {0.0: [0, 1, 2, 3], 0.5: [3, 1, 2, 3], 1.0: [0, 1, 3, 3]})
    flips.add(trace, mask)
    kept = flips.kept(trace, mask)
    assert kept is not None
    assert kept[0].tolist() == [False, True, False, True]


def test_a_router_that_does_not_say_whom_it_chooses_is_left_out() -> None:
    flips = Flips({0})
    trace, mask = trace_of(0, {}), torch.ones(1, 2, dtype=torch.bool)
    flips.add(trace, mask)
    assert flips.counts == {}
    assert flips.kept(trace, mask) is None


def test_mixtures_that_stay_silent_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("mixtral", seed=1)
    update = equiv.Update.random(model, 0.1, seed=0)
    monkeypatch.setattr(
        "equiv.model.staged_model.chosen_experts", lambda _gates: nullcontext({})
    )
    report = equiv.check(model, update, IDS[:2], forms=(), sites=["mlp_out"])
    assert report.routing == ()
    assert "experts not counted at layers 0, 1:" in " ".join(str(report).split())


@given(st.integers(0, 2**16))
def test_flips_are_sets_compared(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    ids = [torch.rand(7, 5, generator=source).topk(2).indices for _ in range(2)]
    runs = [{3: torch.zeros(7, 5, dtype=torch.bool).scatter(1, i, True)} for i in ids]
    expected = [set(a.tolist()) != set(b.tolist()) for a, b in zip(*ids, strict=True)]
    assert flipped(*runs)[3].tolist() == expected
    assert flipped(runs[1], runs[0])[3].tolist() == expected
    assert not flipped(runs[0], runs[0])[3].any()


def test_two_runs_of_other_tokens_are_refused() -> None:
    one = {0: torch.ones(3, 4, dtype=torch.bool)}
    with pytest.raises(equiv.ArgumentError, match="same tokens"):
        flipped(one, {0: torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(equiv.ArgumentError, match="same tokens"):
        flipped(one, {})


@torch.no_grad()
def test_hooks_are_gone_and_the_model_is_as_it_was() -> None:
    model = transformer("mixtral", seed=5)
    before = model(input_ids=IDS).logits
    full_pass(model, equiv.Update.random(model, 0.1, seed=0))
    assert torch.equal(model(input_ids=IDS).logits, before)
    blocks = find_blocks(model)
    assert blocks is not None
    with pytest.raises(RuntimeError, match="mine"), chosen_experts(routers(blocks)):
        raise RuntimeError("mine")
    assert not any(m._forward_hooks for m in model.modules())
