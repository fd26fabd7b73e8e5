"""The ladder against plain forwards of steered and tuned models."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import witness

import equiv
from equiv.behaviour.distance import Distances, interval, kl_divergence, recovered
from equiv.model.batches import split
from equiv.model.inputs import from_inputs
from equiv.report.numbers import percent
from equiv.report.report import Report
from equiv.steering.fits.moments import RIDGE
from equiv.testing.models import mlp, transformer

IDS = torch.randint(3, 32, (16, 9), generator=torch.Generator().manual_seed(0))
SEED = 5


def tuned_model(model: Any, update: equiv.Update) -> Any:
    tuned = copy.deepcopy(model)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta.to(tuned.dtype)
    return tuned


def held_out(model: Any, inputs: Any = IDS) -> tuple[list[int], list[int]]:
    """(fitting, held-out) rows, as a check with this seed divides them."""
    batches = split(from_inputs(model, inputs), 0.25, SEED)
    parts: dict[bool, list[int]] = {False: [], True: []}
    for batch in batches:
        parts[batch.held_out] += batch.index
    return sorted(parts[False]), sorted(parts[True])


@torch.no_grad()
def kl(tuned: Any, other: Any, ids: torch.Tensor) -> torch.Tensor:
    """[sequences, tokens], by torch's own kl_div."""
    p = F.log_softmax(tuned(input_ids=ids).logits.double(), -1)
    q = F.log_softmax(other(input_ids=ids).logits.double(), -1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def found(report: Report, rung: str, site: str = "block_out", layers: str = "all"):  # type: ignore[no-untyped-def]
    return next(
        b
        for b in report.behaviour
        if (b.rung, b.site, b.layers) == (rung, site, layers)
    )


@pytest.fixture(scope="module")
def case() -> tuple[Any, equiv.Update, Report]:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    return model, update, equiv.check(model, update, IDS, rank=4, seed=SEED)


def test_a_quarter_is_held_out(case: Any) -> None:
    fitting, held = held_out(case[0])
    assert len(held) == 4 and sorted(fitting + held) == list(range(16))
    assert case[2].subject.held_out_sequences == 4


def test_unsteered_is_the_base_model(case: Any) -> None:
    model, update, report = case
    _, held = held_out(model)
    tuned = tuned_model(model, update)
    values = kl(tuned, model, IDS[held])
    row = next(b for b in report.behaviour if b.rung == "unsteered")
    assert row.distance == pytest.approx(float(values.mean()), rel=1e-4)
    assert row.distance_max == pytest.approx(float(values.max()), rel=1e-4)
    assert row.distance_p999 == pytest.approx(
        float(np.quantile(values.numpy(), 0.999)), rel=1e-4
    )
    with torch.no_grad():
        same = tuned(input_ids=IDS[held]).logits.argmax(-1) == model(
            input_ids=IDS[held]
        ).logits.argmax(-1)
    assert row.same_top == pytest.approx(float(same.double().mean()))
    assert row.recovered == 0 and row.sequences == 4


@pytest.mark.parametrize("site", ["attn_out", "mlp_in", "mlp_out", "block_out"])
@pytest.mark.parametrize("rung", ["vector", "affine r1", "affine r4", "affine full"])
def test_a_fitted_rung_is_the_steered_model(case: Any, site: str, rung: str) -> None:
    """Fitted by `fit_sequential` on the same rows, applied by `steer`: the same KL."""
    model, update, report = case
    row = found(report, rung, site)
    fitting, held = held_out(model)
    form = rung.split()[0]
    rank = {"r1": 1, "r4": 4, "full": None}[rung.split()[1]] if form != "vector" else 1
    steering = equiv.fit_sequential(
        model, update, IDS[fitting], site=site, form=form, rank=rank, ridge=RIDGE
    )
    tuned = tuned_model(model, update)
    tried = {0.0: float(kl(tuned, model, IDS[held]).mean())}
    for strength in (0.25, 0.5, 0.75, 1.0):
        scaled = {key: s.scaled(strength) for key, s in steering.items()}
        with equiv.steer(model, scaled):
            tried[strength] = float(kl(tuned, model, IDS[held]).mean())
    assert row.strength == min(tried, key=lambda s: tried[s])
    assert row.distance == pytest.approx(min(tried.values()), rel=1e-3)
    assert row.recovered == pytest.approx(1 - min(tried.values()) / tried[0], abs=1e-3)
    assert (row.recovered or 0) >= 0  # never worse than no steering
    if row.strength:
        assert row.num_parameters == sum(s.num_parameters for s in steering.values())


def test_the_exact_oracle_leaves_only_the_head() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    blocks = equiv.Update.random(model, 0.05, seed=2).restricted(layers=[0, 1])
    report = equiv.check(model, blocks, IDS, seed=SEED)
    assert found(report, "exact oracle").recovered == pytest.approx(1, abs=1e-6)
    head = equiv.Update.random(model, 0.3, seed=2).restricted(names="lm_head.*")
    report = equiv.check(model, head, IDS, seed=SEED)
    assert all(b.recovered == 0 for b in report.behaviour if b.layers == "all")
    assert "does not replace" in report.headline or "not measured" in report.headline


@pytest.mark.parametrize("site", ["mlp_in", "resid_mid", "block_out"])
def test_simultaneous_offsets_are_shifts_of_two_models_added_at_once(site: str) -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    report = equiv.check(
        model, update, IDS, sites=(site,), forms=("vector",), seed=SEED
    )
    _, held = held_out(model)
    s = equiv.shifts(model, update, IDS[held], sites=(site,))
    added = {(layer, site): equiv.Offset(s[layer, site].exact) for layer in (0, 1)}
    tuned = tuned_model(model, update)
    with equiv.steer(model, added):
        distance = float(kl(tuned, model, IDS[held]).mean())
    row = found(report, "simultaneous offsets", site)
    assert row.distance == pytest.approx(distance, rel=1e-3)
    assert row.num_parameters is None and row.strength is None


@torch.no_grad()
def test_offsets_count_a_shift_once_per_layer_above_it() -> None:
    """To first order they move the logits by Σ_l (L − l) J δ_l, not by Σ_l J δ_l.

    J δ_l, what layer l's own update does to the logits, is the derivative of the
    whole model in the direction of that layer's part alone. The rest is of order t.
    """
    model, layers, t = transformer("llama", seed=1, num_hidden_layers=3), 3, 1e-4
    update = equiv.Update.random(model, 0.05, seed=2).restricted(layers=range(layers))
    call = {"input_ids": IDS[:4]}
    counted = torch.zeros(())
    for layer in range(layers):
        part = update.restricted(layers=[layer])
        _, first = witness.whole_jvp(model, part, call)
        counted = counted + (layers - layer) * first["logits"]
    s = equiv.shifts(model, update.scaled(t), IDS[:4], dtype=torch.float64)
    keys = [(layer, "block_out") for layer in range(layers)]
    added = {key: equiv.Offset(s[key].exact) for key in keys}
    with witness.own_arithmetic():
        base = model(**call).logits
        with equiv.steer(model, added):
            moved = (model(**call).logits - base) / t
    assert float((moved - counted).norm() / counted.norm()) < 10 * t


def test_one_layer_has_no_offsets_that_count_twice() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32, num_hidden_layers=1)
    update = equiv.Update.random(model, 0.05, seed=2)
    report = equiv.check(model, update, IDS, forms=("vector",), seed=SEED)
    assert not any(b.rung == "simultaneous offsets" for b in report.behaviour)


def test_what_offsets_cost_is_said_where_they_cost(case: Any) -> None:
    _, _, report = case
    said = " ".join(str(report).split())
    best = next(b for b in report.behaviour if b.site and b.site in report.headline)
    cost = found(report, "simultaneous offsets", best.site).recovered
    assert cost is not None and cost < (
        found(report, "exact oracle", best.site).recovered or 0
    )
    assert f"recovers {percent(cost)}" in said and "counted again there" in said
    assert "simultaneous offsets" not in report.headline


def test_least_squares_may_be_worse_than_none_the_report_never() -> None:
    """One fitting sequence for a full-rank map, a large update: nothing generalises."""
    refused = 0
    for seed in range(3):
        model = transformer("llama", seed=seed, dtype=torch.float32)
        update = equiv.Update.random(model, 0.5, seed=seed)
        report = equiv.check(model, update, IDS[:2], seed=SEED)
        for row in report.behaviour:
            if row.num_parameters or row.strength == 0:
                assert row.recovered is not None and row.recovered >= 0
        none = [b for b in report.behaviour if b.strength == 0]
        refused += len(none)
        for row in none:
            assert row.recovered == 0 and "worse than no steering" in row.reason
    assert refused


@pytest.mark.parametrize("site", ["mlp_out", "block_out"])
def test_rungs_of_an_encoder_are_the_steered_encoder(site: str) -> None:
    model = transformer("bert", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    report = equiv.check(model, update, IDS, seed=SEED)
    row = found(report, "affine r8", site)
    fitting, held = held_out(model)
    steering = equiv.fit_sequential(model, update, IDS[fitting], site=site, ridge=RIDGE)
    tuned = tuned_model(model, update)
    assert row.strength
    scaled = {key: s.scaled(row.strength) for key, s in steering.items()}
    with equiv.steer(model, scaled):
        distance = float(kl(tuned, model, IDS[held]).mean())
    assert row.distance == pytest.approx(distance, rel=1e-3)


def test_labels_give_the_losses_of_plain_models(case: Any) -> None:
    model, update, _ = case
    mask = torch.ones_like(IDS)
    mask[:, 7:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    call = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    report = equiv.check(model, update, call, seed=SEED, forms=("vector",))
    _, held = held_out(model, call)
    row = next(b for b in report.behaviour if b.rung == "unsteered")
    picked = {name: value[held] for name, value in call.items()}
    with torch.no_grad():
        base = float(model(**picked).loss)
        tuned = float(tuned_model(model, update)(**picked).loss)
    assert row.loss == pytest.approx(base, rel=1e-5)
    assert row.loss_tuned == pytest.approx(tuned, rel=1e-5)


def test_masked_language_models_do_not_shift_their_labels() -> None:
    model = transformer("bert", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    labels = IDS.clone()
    labels[:, ::2] = -100
    call = {"input_ids": IDS, "labels": labels}
    report = equiv.check(model, update, call, seed=SEED, forms=("vector",))
    _, held = held_out(model, call)
    with torch.no_grad():
        loss = float(model(input_ids=IDS[held], labels=labels[held]).loss)
    row = next(b for b in report.behaviour if b.rung == "unsteered")
    assert row.loss == pytest.approx(loss, rel=1e-5)


def test_without_logits_the_output_is_compared() -> None:
    model = mlp((4, 8, 3), dtype=torch.float32)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    update = equiv.Update.random(model, 0.2, seed=0)
    report = equiv.check(model, update, x, seed=SEED)
    _, held = held_out(model, x)
    with torch.no_grad():
        tuned = torch.func.functional_call(
            model,
            {n: p.float() for n, p in witness.moved(model, update, 1.0).items()},
            (x[held],),
        )
        base = model(x[held])
    row = next(b for b in report.behaviour if b.rung == "unsteered")
    difference = float((tuned - base).norm() / tuned.norm())
    assert row.measure == "output" and row.same_top is None
    assert row.output_difference == pytest.approx(difference, rel=1e-4)
    cosine = float(F.cosine_similarity(tuned.flatten(), base.flatten(), dim=0))
    assert row.output_cosine == pytest.approx(cosine, rel=1e-5)


def test_kl_of_two_coins() -> None:
    p, q = torch.tensor([[0.3, 0.7]]).double(), torch.tensor([[0.6, 0.4]]).double()
    value, same = kl_divergence(p.log(), q.log() + 3.0)
    expected = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4)
    assert float(value) == pytest.approx(expected) and not bool(same)


def test_interval_covers_the_share_of_a_known_population() -> None:
    """95 % of intervals hold the true share; with 200 trials 88 … 99 % are expected."""
    source = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        none = source.gamma(2.0, size=(30, 1))
        steered = 0.3 * none * source.uniform(0.5, 1.5, size=(30, 1))
        pair = []
        for values in (steered, none):
            made = Distances(has_logits=True)
            made.sequences, made.tokens = 30, 30
            made.per_token, made.sequence = [values.ravel()], [np.arange(30)]
            pair.append(made)
        low, high = interval(pair[0], pair[1], trial)
        assert low is not None and high is not None
        assert low <= (recovered(pair[0], pair[1]) or 0) <= high
        hits += low <= 0.7 <= high
    assert 0.88 * 200 <= hits <= 0.99 * 200


def test_fewer_than_two_sequences_are_inconclusive(case: Any) -> None:
    model, update, _ = case
    report = equiv.check(model, update, IDS[:1])
    assert report.derivative_holds and not report.behaviour
    assert {f.verdict for f in report.fits} == {"inconclusive"}
    assert "fewer than two sequences" in report.headline


def test_random_inputs_give_the_calculus_only(case: Any) -> None:
    model, update, _ = case
    report = equiv.check(model, update)
    assert report.derivative_holds and not report.fits and not report.behaviour
    assert all(row.radius is None for row in report.rows)
    assert "not measured: random inputs" in report.headline
    assert report.subject.tokens == 8 * 32


def test_samples_come_from_both_models(case: Any) -> None:
    model, update, _ = case
    report = equiv.check(model, update, "samples", forms=("vector",))
    assert (report.subject.inputs, report.subject.sequences) == ("samples", 64)
    assert report.behaviour
    assert report == equiv.check(model, update, "samples", forms=("vector",))


def test_target_site_and_block_differ_where_they_should(case: Any) -> None:
    model, update, report = case
    own = equiv.check(model, update, IDS, rank=4, seed=SEED, target="shift")
    assert {f.target for f in own.fits} == {"shift"}
    assert {f.target for f in report.fits} == {"block"}

    def misfit(r: Report, site: str) -> float | None:
        return next(
            f.misfit
            for f in r.fits
            if (f.layer, f.site, f.form) == (0, site, "affine r4")
        )

    assert misfit(own, "block_out") == misfit(report, "block_out")
    assert misfit(own, "attn_out") != misfit(report, "attn_out")
    s = equiv.shifts(model, update, IDS[held_out(model)[0]])
    for target, r in (("attn_out", own), ("block_out", report)):
        x, y = s[0, "attn_out"].base, s[0, target].exact
        x, y = (t.reshape(-1, 16).double().numpy() for t in (x, y))
        weight, bias = witness.reduced_rank_regression(x, y, 4, 1e-3)
        expected = ((y - x @ weight - bias) ** 2).sum() / (y**2).sum()
        assert misfit(r, "attn_out") == pytest.approx(expected, rel=1e-4)


def test_too_few_tokens_are_called_so(case: Any) -> None:
    # 12 fitting sequences × 9 tokens for 16 dimensions: 6.75 tokens per dimension.
    fits = case[2].fits
    assert {f.verdict for f in fits} == {"too few tokens"}
    assert {f.tokens_per_dimension for f in fits} == {6.75}
