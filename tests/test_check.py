"""Rows of a check against brute force: remainders, orders, radii, coverage, sums."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import witness
from torch import nn
from torch.func import functional_call

import equiv
from equiv.model.batches import split
from equiv.model.inputs import from_inputs
from equiv.report.report import Report
from equiv.report.values import Row, Scope, TaylorPoint, Verdict
from equiv.shift.taylor import order_of
from equiv.testing.models import FAMILIES, mlp, transformer

IDS = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(0))
SITES = ("attn_out", "mlp_in", "mlp_out", "block_out")


def row_of(report: Report, layer: int, site: str, scope: str = "propagated") -> Row:
    return next(
        r for r in report.rows if (r.layer, r.site, r.scope) == (layer, site, scope)
    )


def moves(model: Any, update: equiv.Update, t: float) -> dict[Any, torch.Tensor]:
    """Every propagated shift at scale t, by whole-model forwards."""
    call = {"input_ids": IDS}
    base = witness.tuned_activations(model, update, call, 0.0)
    tuned = witness.tuned_activations(model, update, call, t)
    return {key: tuned[key] - base[key] for key in base}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_whole_forwards_say(family: str) -> None:
    model = transformer(family, seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    report = equiv.check(model, update, IDS, dtype=torch.float64)
    exact = moves(model, update, 1.0)
    base, first = witness.whole_jvp(model, update, {"input_ids": IDS})
    _, middle = witness.whole_jvp(model, update, {"input_ids": IDS}, t=0.5)
    for layer in range(2):
        for site in SITES:
            row, key = row_of(report, layer, site), (layer, site)
            size = float(exact[key].norm())
            assert row.norm_exact == pytest.approx(size)
            assert row.norm_base == pytest.approx(float(base[key].norm()))
            assert row.norm_first_order == pytest.approx(float(first[key].norm()))
            for shift, remainder, cosine in (
                (first[key], row.remainder, row.cosine),
                (middle[key], row.remainder_midpoint, row.cosine_midpoint),
            ):
                assert remainder == pytest.approx(
                    float((exact[key] - shift).norm()) / size
                )
                angle = torch.nn.functional.cosine_similarity(
                    exact[key].flatten(), shift.flatten(), dim=0
                )
                assert cosine == pytest.approx(float(angle))
    logits = row_of(report, 2, "logits")
    assert logits.norm_exact == pytest.approx(float(exact["logits"].norm()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_local_rows_hold_the_input_at_the_base(family: str) -> None:
    """The first moved block's local shift is the propagated one of its part alone."""
    model = transformer(family, seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    whole = equiv.shifts(model, update, IDS, dtype=torch.float64)
    for layer in range(2):
        part = equiv.shifts(
            model, update.restricted(layers=[layer]), IDS, dtype=torch.float64
        )
        for site in SITES:
            local, alone = whole[layer, site], part[layer, site]
            witness.close(local.local_exact, alone.exact)
            witness.close(local.local_first_order, alone.first_order)
            assert not torch.allclose(local.local_exact, local.exact)


def test_no_shift_below_the_first_updated_block() -> None:
    model = transformer("llama", seed=1, num_hidden_layers=3)
    update = equiv.Update.random(model, 0.1, seed=2).restricted(layers=[1])
    report = equiv.check(model, update, IDS)
    for site in SITES:
        row = row_of(report, 0, site)
        assert row.order.verdict is Verdict.NOT_APPLICABLE
        assert row.order.reason == "no shift here"
        assert row.remainder is None and row.norm_exact == 0
        assert row_of(report, 1, site).order.verdict is Verdict.HOLDS
        assert row_of(report, 2, site).order.verdict is Verdict.HOLDS
    assert not any(r.layer == 2 and r.scope is Scope.LOCAL for r in report.rows)
    assert report.derivative_holds
    assert "no shift" in str(report)


@pytest.mark.parametrize("midpoint", [False, True])
def test_the_radius_is_the_largest_good_scale(midpoint: bool) -> None:
    """Brute force: relative remainders on whole forwards, on both sides of it."""
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.2, seed=2)
    report = equiv.check(model, update, IDS, dtype=torch.float64)
    _, first = witness.whole_jvp(model, update, {"input_ids": IDS})
    for layer, site in [(0, "mlp_out"), (1, "block_out")]:
        row = row_of(report, layer, site)
        radius = row.radius_midpoint if midpoint else row.radius
        assert radius is not None and not radius.at_least

        def remainder(t: float, key: Any = (layer, site)) -> float:
            slope = first
            if midpoint:
                _, slope = witness.whole_jvp(model, update, {"input_ids": IDS}, t / 2)
            exact = moves(model, update, t)[key]
            return float((exact - t * slope[key]).norm() / exact.norm())

        # "To 5 %": the crossing lies within 2.5 % of it.
        assert remainder(radius.value * 0.975) <= 0.1 < remainder(radius.value * 1.025)
        for t in (0.25, 0.5, 0.75):
            assert remainder(t * radius.value) <= 0.1
        assert radius.predicted == pytest.approx(radius.value, rel=0.35)


def test_the_radius_of_a_parabola_is_its_closed_form() -> None:
    """f = (w + t)² x: f′ = 2wx, f″ = 2x. The remainder is t²/(2wt + t²) = τ at
    t = 2wτ/(1 − τ); predicted 2τ‖f′‖/‖f″‖ = 2wτ; midpoint exact for every t.
    """

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w**2 * x

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
    report = equiv.check(Square(), {"w": torch.tensor(1.0).double()}, x)
    (row,) = report.rows
    assert row.order.order == pytest.approx(2, abs=1e-6)
    assert row.order_midpoint is not None
    assert row.order_midpoint.verdict is Verdict.EXACT
    assert row.remainder == pytest.approx(1 / 5)
    assert row.radius is not None and row.radius.predicted == pytest.approx(0.4)
    closed = 2 * 2 * 0.1 / 0.9
    assert row.radius.value == pytest.approx(closed, rel=0.025)
    assert row.radius_midpoint is not None and row.radius_midpoint.at_least


def test_the_four_coverage_ratios() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    report = equiv.check(model, update, IDS, dtype=torch.float64)
    exact = moves(model, update, 1.0)
    base, _ = witness.whole_jvp(model, update, {"input_ids": IDS})
    for entry in report.coverage:
        if entry.scope is not Scope.PROPAGATED:
            continue
        d = {s: exact[entry.layer, s].norm() for s in SITES}
        skip = (exact[entry.layer, "block_out"] - exact[entry.layer, "mlp_out"]).norm()
        a = {s: base[entry.layer, s].norm() for s in SITES}
        assert entry.shift_mlp_over_block == pytest.approx(
            float(d["mlp_out"] / d["block_out"])
        )
        assert entry.shift_mlp_share == pytest.approx(
            float(d["mlp_out"] / (d["mlp_out"] + skip))
        )
        assert entry.activation_mlp_share == pytest.approx(
            float(a["mlp_out"] / (a["mlp_out"] + a["attn_out"]))
        )
        assert entry.activation_mlp_over_block == pytest.approx(
            float(a["mlp_out"] / a["block_out"])
        )
    assert len(report.coverage) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_superposition_holds_to_rounding(family: str) -> None:
    model = transformer(family, seed=1)
    report = equiv.check(model, equiv.Update.random(model, 0.1, seed=2), IDS)
    found = report.superposition
    assert found is not None and found.verdict is Verdict.HOLDS
    assert found.relative_difference is not None
    assert found.relative_difference <= 1e-12
    assert found.stages == 4  # embedding, two blocks, head


@pytest.mark.parametrize(("blocks", "measured"), [(14, True), (49, False)])
def test_superposition_is_off_above_forty_eight_blocks(
    blocks: int, measured: bool
) -> None:
    small: dict[str, Any] = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_attention_heads": 1,
    }
    model = transformer("llama", seed=1, num_hidden_layers=blocks, head_dim=4, **small)
    update = equiv.Update.random(model, 0.01, seed=2)
    last = [blocks - 1]
    report = equiv.check(model, update, IDS, forms=(), layers=last, at="base")
    assert (report.superposition is not None) == measured
    assert (report.contributions is not None) == measured
    assert {r.layer for r in report.rows} == {blocks - 1, blocks}
    if report.superposition is not None:
        assert report.superposition.verdict is Verdict.HOLDS


def test_a_kink_is_named() -> None:
    """At x = 0 a ReLU is not differentiable: half of the shift is missed, order 1."""
    model = mlp((2, 4, 2), "relu")
    with torch.no_grad():
        model.get_parameter("0.bias").zero_()
    x = torch.zeros(4, 2, dtype=torch.float64)
    update = {"0.bias": 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).double()}
    report = equiv.check(model, update, x)
    assert not report.derivative_holds and not report.holds
    row = row_of(report, 0, "1")
    assert row.order.verdict is Verdict.FAILS
    assert row.order.order == pytest.approx(1)
    assert "ReLU" in row.order.reason
    with pytest.raises(equiv.NotEquivalentError, match=r"propagated.*: fails"):
        report.assert_holds()


def test_an_update_too_small_to_see_is_inconclusive() -> None:
    model = mlp((4, 8, 3))
    report = equiv.check(model, equiv.Update.random(model, 1e-16, seed=0))
    verdicts = {row.order.verdict for row in report.rows}
    assert verdicts == {Verdict.INCONCLUSIVE}
    assert "too small" in report.reason
    assert not report.holds
    assert "could not be judged" in report.reason or "inconclusive" in report.reason


def test_float32_has_its_window_at_coarse_scales() -> None:
    model = mlp((4, 8, 3))
    report = equiv.check(
        model, equiv.Update.random(model, 0.1, seed=0), dtype=torch.float32
    )
    for row in report.rows:
        if row.order.verdict is Verdict.HOLDS:
            assert row.order.window is not None and row.order.window[0] >= 2**-7
    assert report.derivative_holds


def test_max_remainder_decides() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    strict = equiv.check(model, update, IDS)
    worst = max(r.remainder for r in strict.rows if r.remainder is not None)
    assert worst > 0.1 and strict.derivative_holds and not strict.holds
    with pytest.raises(equiv.NotEquivalentError) as caught:
        strict.assert_holds()
    assert isinstance(caught.value, AssertionError)
    lines = str(caught.value).splitlines()
    large = [r for r in strict.rows if (r.remainder or 0) > 0.1]
    assert len(lines) == len(large) + 2
    assert all("radius t = " in line for line in lines[1:-1])
    loose = equiv.check(model, update, IDS, max_remainder=1.01 * worst)
    assert loose.holds
    loose.assert_holds()
    assert equiv.check(model, update, IDS, max_remainder=None).holds
    middle = equiv.check(model, update, IDS, at="midpoint", max_remainder=0.1)
    worst = max(r.remainder_midpoint or 0 for r in middle.rows)
    assert middle.holds == (worst <= 0.1)


def test_at_base_measures_no_midpoint() -> None:
    model = transformer("llama", seed=1)
    report = equiv.check(model, equiv.Update.random(model, 0.1, seed=2), IDS, at="base")
    for row in report.rows:
        assert (
            row.remainder_midpoint is row.order_midpoint is row.radius_midpoint is None
        )
        assert row.remainder is not None
    assert not any(b.rung == "midpoint oracle" for b in report.behaviour)
    assert "midpoint" not in report.headline
    assert "midpoint" not in str(report).split("What this means")[1]


@pytest.mark.parametrize("noise", [0.0, 1e-12])
@pytest.mark.parametrize(
    ("power", "verdict"), [(2, "holds"), (1.5, "fails"), (1, "fails")]
)
def test_orders_of_power_laws(power: float, verdict: str, noise: float) -> None:
    scales = [2.0**-k for k in range(11)]
    points = [TaylorPoint(t, t, 0.5 * t**power + noise, None) for t in scales]
    found = order_of(points, floor=1e-14 + noise, shift=1.0)
    assert found.verdict == verdict
    assert found.order == pytest.approx(power, abs=0.02)
    assert found.window is not None or verdict == "fails"


def test_orders_without_a_window() -> None:
    scales = [2.0**-k for k in range(11)]
    flat = [TaylorPoint(t, t, 1e-13, None) for t in scales]
    assert order_of(flat, floor=1e-13, shift=1.0).verdict is Verdict.EXACT
    far = [TaylorPoint(t, t, 50 * t**2, None) for t in scales[:4]]
    assert order_of(far, floor=1e-13, shift=1.0).verdict is Verdict.INCONCLUSIVE
    one = [TaylorPoint(t, t, 0.01 * t**2, None) for t in scales]
    assert order_of(one, floor=3e-4, shift=1.0).verdict is Verdict.INCONCLUSIVE
    none = [TaylorPoint(t, 0.0, 0.0, None) for t in scales]
    assert order_of(none, floor=1e-13, shift=0.0).verdict is Verdict.NOT_APPLICABLE


def test_modules_of_any_kind() -> None:
    """In-place activations, repeated and tuple-returning submodules, batch norms."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 6)
            self.act = nn.ReLU(inplace=True)
            self.norm = nn.BatchNorm1d(6)
            self.twice = nn.Linear(6, 6)
            self.rnn = nn.RNN(6, 5, batch_first=True)
            self.same = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.act(self.first(x)))
            h = self.twice(torch.tanh(self.twice(h)))
            return self.same(self.rnn(h[:, None])[0][:, 0])

    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(20, 3)
    report = equiv.check(model, equiv.Update.random(model, 0.01, seed=0), x)
    assert [r.site for r in report.rows] == ["first", "act", "norm", "output"]
    s = equiv.shifts(model, equiv.Update.random(model, 0.01, seed=0), x)
    assert (s[0, "first"].base < 0).any()  # not what the in-place ReLU made of it
    assert not (s[0, "act"].base < 0).any()


@pytest.mark.parametrize(
    ("shape", "module"),
    [
        (
            (16, 5, 4),
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        ),
        ((6, 4, 8), lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        ((6, 2, 5, 5), lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh())),
    ],
)
def test_outputs_with_more_axes(shape: tuple[int, ...], module: Any) -> None:
    torch.manual_seed(0)
    model, x = module(), torch.randn(shape)
    update = equiv.Update.random(model, 0.05, seed=0)
    report = equiv.check(model, update, x, seed=1)
    assert report.subject.sequences == shape[0]
    row = next(b for b in report.behaviour if b.rung == "unsteered")
    held = [
        i for b in split(from_inputs(model, x), 0.25, 1) if b.held_out for i in b.index
    ]
    with torch.no_grad():
        base = model.eval().double()(x[held].double())
        moved = witness.moved(model, update, 1.0)
        tuned = functional_call(model, moved, (x[held].double(),))
    expected = float((tuned - base).norm() / tuned.norm())
    assert row.output_difference == pytest.approx(expected, rel=1e-4)
    assert any(b.num_parameters for b in report.behaviour)


def test_a_submodule_may_be_called_output() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.output = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.output(torch.tanh(self.inp(x))))

    torch.manual_seed(0)
    model, x = Named(), torch.randn(16, 3)
    report = equiv.check(model, equiv.Update.random(model, 0.05, seed=0), x)
    assert [row.site for row in report.rows] == ["inp", "output", "model output"]
    assert {row.tokens for row in report.rows} == {16}
    exact = [b for b in report.behaviour if b.rung == "exact oracle"]
    assert {b.site for b in exact} == {"inp", "output"}
    best = next(b for b in exact if b.site == "output")
    assert best.recovered == pytest.approx(1, abs=1e-6)


def test_outputs_per_sequence_are_not_taken_for_tokens() -> None:
    """[batch, labels] with as many labels as tokens, regression, start positions."""
    ids = torch.randint(3, 32, (8, 5), generator=torch.Generator().manual_seed(0))
    for name, count, labels in (
        ("BertForSequenceClassification", 5, torch.arange(8) % 5),
        ("BertForSequenceClassification", 1, torch.rand(8)),
        ("BertForQuestionAnswering", 2, None),
    ):
        model = bert(name, count)
        call = {"input_ids": ids} | ({} if labels is None else {"labels": labels})
        report = equiv.check(model, equiv.Update.random(model, 0.05, seed=0), call)
        none = next(b for b in report.behaviour if b.rung == "unsteered")
        assert none.sequences == report.subject.held_out_sequences == 2
        assert (none.measure == "kl") == (count == 5)
        assert (none.loss is not None) == (count == 5)
        assert none.distance > 0


def bert(name: str, count: int) -> Any:
    import transformers

    small = transformer("bert", seed=1).config
    small.num_labels = count
    torch.manual_seed(0)
    return getattr(transformers, name)(small).eval()


def test_nothing_holds_that_is_not_a_number() -> None:
    class Exp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Exp(), nn.Linear(3, 2)).double()
    x = torch.randn(16, 2).double()
    update = {"0.bias": torch.full((3,), 100.0).double()}
    with pytest.raises(equiv.UpdateError, match=r"at 1 is not finite.*float32"):
        equiv.check(model, update, x)
    held = equiv.check(model, update, x, dtype=torch.float64, forms=())
    assert not held.holds
    over = {"0.bias": torch.full((3,), 1000.0).double()}
    with pytest.raises(equiv.UpdateError, match=r"float64"):
        equiv.check(model, over, x, dtype=torch.float64)
    points = [TaylorPoint(t, t, math.nan, None) for t in (0.5, 0.25)]
    assert order_of(points, floor=1e-12, shift=1.0).verdict is Verdict.FAILS
    odd = dataclasses.replace(held.rows[0], remainder=math.nan)
    assert not dataclasses.replace(held, rows=(odd,)).holds


def test_the_midpoint_is_judged_by_its_own_order() -> None:
    """|x|^2.5 has two derivatives but not three: second order holds, third fails."""

    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 5 * x.abs() ** 2.5

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Power()).double()
    with torch.no_grad():
        model.get_parameter("0.bias").zero_()
    x = torch.zeros(8, 2).double()
    update = {"0.bias": torch.full((3,), 1e-2).double()}
    base = equiv.check(model, update, x, max_remainder=None, forms=())
    middle = equiv.check(model, update, x, at="midpoint", max_remainder=None, forms=())
    assert base.derivative_holds == (base.rows[-1].order.verdict is Verdict.HOLDS)
    assert middle.rows[-1].order_midpoint is not None
    assert middle.rows[-1].order_midpoint.verdict is Verdict.FAILS
    assert not middle.derivative_holds
    assert middle.failing()


@pytest.mark.parametrize("size", [1e-5, 1e-8])
def test_rounding_is_not_taken_for_the_remainder(size: float) -> None:
    model = transformer("llama", seed=0, dtype=torch.float32)
    update = equiv.Update.random(model, size, seed=0)
    report = equiv.check(model, update, IDS, forms=())
    wide = equiv.check(model, update, IDS, forms=(), dtype=torch.float64)
    assert "too small for float32" in report.notes[0]
    for a, b in zip(report.rows, wide.rows, strict=True):
        assert a.dtype == "float64" and a.remainder == b.remainder
    assert report.holds
    assert all(r.radius and r.radius.value == 8 for r in report.rows)


def test_a_remainder_that_comes_back_does_not_hide_the_radius() -> None:
    """y = x + 3w²(1 − w): zero remainder at t = 1, more than its share below."""

    class Bump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.w + 3 * self.w**2 * (1 - self.w))

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
    report = equiv.check(Bump(), {"w": torch.tensor(1.0).double()}, x)
    (row,) = report.rows
    assert row.remainder == pytest.approx(0, abs=1e-6)
    # The relative remainder is 3t(1 − t)/(1 + 3t(1 − t)): a tenth at t = 0.0385.
    assert row.radius is not None and not row.radius.at_least
    assert row.radius.value == pytest.approx(0.0385, rel=0.025)


def test_dataloaders_and_lists_are_one_batch_split() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row} for row in IDS],  # type: ignore[arg-type]
        batch_size=4,
    )
    whole = equiv.check(model, update, IDS, dtype=torch.float64)
    for inputs in (loader, [IDS[:1], IDS[1:]], [(IDS,)]):
        other = equiv.check(model, update, inputs, dtype=torch.float64)
        for a, b in zip(whole.rows, other.rows, strict=True):
            assert a.remainder == pytest.approx(b.remainder, rel=1e-9)
        for a, b in zip(whole.behaviour, other.behaviour, strict=True):
            assert a.distance == pytest.approx(b.distance, rel=1e-6, abs=1e-14)


def test_order_of_sequences_is_the_callers() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    mask = torch.ones_like(IDS)
    mask[2] = 0  # a sequence of which no token counts keeps its place
    call = {"input_ids": IDS, "attention_mask": mask}
    s = equiv.shifts(model, update, call)[0, "mlp_in"]
    assert s.base.shape == (6, 8, 16) and torch.equal(s.mask, mask.bool())
    alone = equiv.shifts(model, update, IDS[3:4])[0, "mlp_in"]
    torch.testing.assert_close(s.exact[3:4], alone.exact)
    parts = [IDS[:2, :5], IDS[2:]]
    ragged = equiv.shifts(model, update, parts)[0, "mlp_in"]
    assert ragged.base.shape == (6, 8, 16)
    assert ragged.mask.sum(1).tolist() == [5, 5, 8, 8, 8, 8]
    torch.testing.assert_close(ragged.exact[3:4], alone.exact)


def test_updates_of_every_form_agree() -> None:
    model, tuned = transformer("gpt2", seed=1), transformer("gpt2", seed=1)
    update = equiv.Update.random(model, 0.05, seed=2)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta
    forms = {
        "mapping": witness.dense(update),
        "update": update,
        "model": tuned,
        "between": equiv.Update.between(model, tuned),
        "state dicts": equiv.Update.from_state_dicts(
            dict(model.named_parameters()), dict(tuned.named_parameters())
        ),
    }
    reports = {n: equiv.check(model, u, IDS, forms=()) for n, u in forms.items()}
    for name, report in reports.items():
        for a, b in zip(reports["update"].rows, report.rows, strict=True):
            assert a.norm_exact == pytest.approx(b.norm_exact, rel=1e-5), name
    assert update.scaled(0.5).norm() == pytest.approx(0.5 * update.norm())
    assert update.relative_norm() == pytest.approx(0.05)
    assert update.relative_norm(model) == pytest.approx(0.05)
    names = math.sqrt(sum(float(d.norm()) ** 2 for d in forms["mapping"].values()))
    assert update.norm() == pytest.approx(names)


def test_weights_are_not_taken_for_differences() -> None:
    model, tuned = transformer("gpt2", seed=1), transformer("gpt2", seed=1)
    for name, delta in witness.dense(equiv.Update.random(model, 0.05, 2)).items():
        tuned.get_parameter(name).data += delta
    weights = dict(tuned.named_parameters())
    with pytest.raises(equiv.UpdateError, match="look like the weights themselves"):
        equiv.check(model, weights, IDS)
    doubled = {"lm_head.weight": 2 * model.lm_head.weight.detach()}
    assert equiv.check(model, doubled, IDS, forms=()).derivative_holds


def test_buffers_that_differ_are_no_update() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    tuned = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.get_parameter("0.bias").add_(0.1)
    assert equiv.Update.between(base, tuned).norm() == pytest.approx(0.2)
    tuned(torch.randn(8, 3))  # in training mode: its running means move
    with pytest.raises(equiv.UpdateMismatchError, match=r"`1.running_.*a buffer"):
        equiv.Update.between(base, tuned)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_refused_by_name(wrap: Any) -> None:
    model = mlp((3, 4, 2))
    with pytest.raises(equiv.UnsupportedModelError, match=r"pass `model\.(_orig|mod)"):
        equiv.check(wrap(model), {"0.bias": torch.ones(4)})


def test_a_broken_base_is_not_blamed_on_the_update() -> None:
    model = mlp((3, 4, 2))
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(equiv.UnsupportedModelError, match=r"`2.weight` of the model"):
        equiv.check(model, {"0.bias": torch.ones(4)})
    with pytest.raises(equiv.UnsupportedModelError, match=r"`2.weight` of the model"):
        equiv.check(model, mlp((3, 4, 2), seed=1))


def test_no_ladder_says_why() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    assert "`forms=()`" in equiv.check(model, update, IDS, forms=()).notes[0]
    one = nn.Sequential(nn.Linear(2, 3))
    report = equiv.check(one, equiv.Update.random(one, 0.1, 0), torch.randn(8, 2))
    assert report.notes == ("behaviour not measured: no site lies before the output",)
