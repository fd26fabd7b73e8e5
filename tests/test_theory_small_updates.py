"""Claims about small updates: against plain hooks, broken once, and where they end."""

import math
from typing import Any

import pytest
import torch
from breaking import Broken, break_one, each, module_of, off
from test_theory_orders import drawn, plain_outputs
from torch import Tensor
from witness import close, whole_jvp

import equiv
from equiv.testing.models import example, transformer
from equiv.theory import ClaimResult, Setting, Verdict
from equiv.theory import approaches as approaching
from equiv.theory.norms import Fisher
from equiv.theory.setting import setting
from equiv.theory.steered_runs import local_offsets, runs, slope

AT_OUTPUT = (11, 12, 39, 40, 44)


def judged(number: int, given: Setting) -> ClaimResult:
    (claim,) = [c for c in equiv.theory.shipped() if c.id == number]
    return claim.test(**{name: getattr(given, name) for name in claim.needs})


def in_blocks(family: str = "llama", **more: Any) -> Setting:
    return drawn(family, **more).in_blocks


@pytest.fixture(scope="module")
def whole() -> Setting:
    """An update of everything."""
    return drawn()


@pytest.fixture(scope="module")
def inside() -> Setting:
    """An update of what lies in the blocks."""
    return in_blocks()


@pytest.mark.parametrize("number", AT_OUTPUT)
def test_it_holds_in_blocks(number: int, inside: Setting) -> None:
    found = judged(number, inside)
    assert found.verdict is Verdict.HOLDS and not found.conditions, found.says


@pytest.mark.parametrize("number", AT_OUTPUT)
def test_what_lies_outside_the_blocks_is_a_condition(
    number: int, whole: Setting
) -> None:
    found = judged(number, whole)
    assert found.verdict is (Verdict.HOLDS if number == 11 else Verdict.CONDITIONAL)
    assert bool(found.conditions) == (number != 11)


def kl(tuned: Tensor, other: Tensor) -> float:
    p, q = tuned.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def plain_kl(given: Setting, t: float, steers: Any) -> float:
    """KL of the tuned model and of one with offsets, times t, at blocks' outputs."""
    rows = sorted(n for batch in given.few for n in batch.index)
    found, tokens = 0.0, 0
    for batch in given.few:
        ids = batch.arguments["input_ids"]
        at = [rows.index(i) for i in batch.index]
        own = {
            layer: lambda _, s=steer[at, : ids.shape[1]]: t * s
            for layer, steer in steers.items()
        }
        tuned = plain_outputs(given, t, ids)
        found += ids.numel() * kl(tuned, plain_outputs(given, 0, ids, own))
        tokens += ids.numel()
    return found / tokens


@pytest.mark.claim(12, 39)
def test_orders_are_those_of_plain_hooks(inside: Setting, whole: Setting) -> None:
    """KL by log-softmax, orders by two scales, shifts by differences and one jvp."""
    names = ("unsteered", "last block, propagated", "all blocks, local")
    for given, orders in ((inside, (2, 4, 4)), (whole, (2, 2, 2))):
        shifts = given.shifts
        steers = (
            {},
            {1: shifts[1, "block_out"].first_order},
            {n: shifts[n, "block_out"].local_first_order for n in (0, 1)},
        )
        found = [judged(12, given).evidence[name] for name in names]
        for own, steer, order in zip(found, steers, orders, strict=True):
            full = plain_kl(given, 1.0, steer)
            assert math.isclose(own["KL at full size"], full, rel_tol=1e-8)
            pair = [plain_kl(given, t, steer) for t in (2.0**-5, 2.0**-6)]
            assert abs(math.log2(pair[0] / pair[1]) - order) < 0.2
            assert abs(own["order"] - order) < 0.1
        local = judged(39, given).evidence["local" if given is inside else "all, local"]
        assert math.isclose(local["KL at full size"], full, rel_tol=1e-8)


@pytest.mark.claim(11)
def test_each_blocks_part_is_that_of_its_own_weights(whole: Setting) -> None:
    """J_(out←l) δ_l^local in activations, against one jvp in the block's weights."""
    with runs(whole) as made:
        for layer, offset in local_offsets(whole).items():
            own = whole.update.restricted(layers=[layer])
            for n, batch in enumerate(whole.few):
                _, tangents = whole_jvp(whole.model, own, batch.arguments)
                close(slope(made.steered({layer: offset}), n), tangents["logits"])


@pytest.mark.claim(40)
def test_the_excess_is_what_plain_hooks_show(inside: Setting) -> None:
    """Two blocks: the first one's own shift, once too often."""
    e, size, excess = 1e-4, 0.0, 0.0
    rows = sorted(n for batch in inside.few for n in batch.index)
    for batch in inside.few:
        ids, call = batch.arguments["input_ids"], batch.arguments
        at = [rows.index(i) for i in batch.index]
        propagated = {
            n: inside.shifts[n, "block_out"].first_order[at, : ids.shape[1]]
            for n in (0, 1)
        }
        ends = [
            plain_outputs(
                inside,
                0,
                ids,
                {n: lambda _, s=t * s: s for n, s in propagated.items()},
            )
            for t in (e, -e)
        ]
        _, tangents = whole_jvp(inside.model, inside.update, call)
        found = (ends[0] - ends[1]) / (2 * e) - tangents["logits"]
        first = inside.update.restricted(layers=[0])
        _, expected = whole_jvp(inside.model, first, call)
        torch.testing.assert_close(found, expected["logits"], rtol=1e-5, atol=1e-6)
        excess += float(found.square().sum())
        size += float(tangents["logits"].square().sum())
    evidence = judged(40, inside).evidence
    ratio = evidence["excess over first-order change"]
    assert math.isclose(ratio, (excess / size) ** 0.5, rel_tol=1e-5)


@pytest.mark.claim(44)
def test_the_gap_is_that_of_plain_hooks(inside: Setting) -> None:
    """Steers by the claim; their misfits carried one by one, by differences."""
    steers, misfits = module_of(44).fitted(inside)
    rows = sorted(n for batch in inside.few for n in batch.index)
    t, e, rest, whole = 2.0**-4, 1e-4, 0.0, 0.0
    for batch in inside.few:
        ids = batch.arguments["input_ids"]
        at = [rows.index(i) for i in batch.index]
        expected = torch.zeros(())
        for layer, misfit in misfits.items():
            own = misfit[at, : ids.shape[1]]
            ends = [
                plain_outputs(inside, 0, ids, {layer: lambda _, s=s * own: s})
                for s in (e, -e)
            ]
            expected = expected + (ends[0] - ends[1]) / (2 * e)
        maps = {n: lambda h, s=steer: t * s(h) for n, steer in steers.items()}
        error = plain_outputs(inside, 0, ids, maps) - plain_outputs(inside, t, ids)
        rest += float((error - t * expected).square().sum())
        whole += float(error.square().sum())
    gaps = judged(44, inside).evidence["relative gap, by t"]
    assert math.isclose(gaps["0.0625"], (rest / whole) ** 0.5, rel_tol=1e-3)


BROKEN: list[Broken] = [
    (11, "local_offsets", off),
    (11, "outside_blocks", lambda _: lambda model, update: None),
    (12, "local_offsets", off),
    (12, "propagated_offsets", off),
    (39, "local_offsets", off),
    (40, "weighted", off),
    (40, "propagated_offsets", off),
    (44, "misfit", lambda f: lambda *args: 1.1 * f(*args)),
]


@pytest.mark.claim(11, 12, 39, 40, 44)
@each(BROKEN)
def test_it_fails_when_broken(
    case: Broken, whole: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(break_one(monkeypatch, case), whole)
    assert found.verdict is Verdict.FAILS, found.says


@pytest.mark.parametrize(
    ("number", "name"),
    [(12, "divergence"), (12, "slope"), (12, "bend"), (39, "divergence"), (39, "bend")],
)
def test_a_wrong_constant_is_seen(
    number: int, name: str, inside: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a tenth: the orders are the same."""
    original = getattr(approaching, name)
    monkeypatch.setattr(approaching, name, lambda *args: 1.1 * original(*args))
    found = judged(number, inside)
    assert found.verdict is Verdict.FAILS, found.says


def test_where_claims_do_not_apply(inside: Setting) -> None:
    one_block = in_blocks(num_hidden_layers=1)
    assert judged(40, one_block).verdict is Verdict.NOT_APPLICABLE
    paired = transformer("t5", seed=1)
    update = equiv.Update.random(paired, 0.1, seed=2)
    given = setting("", paired, update, [example(paired)], None, inside.norm, 0)
    assert judged(40, given).verdict is Verdict.NOT_APPLICABLE
    tiny = in_blocks(size=1e-13)
    for number in (12, 39, 44):
        assert judged(number, tiny).verdict is Verdict.INCONCLUSIVE
    for number in (11, 40):  # their identity is one of derivatives
        assert judged(number, tiny).verdict is Verdict.HOLDS
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    update = equiv.Update.random(model, 0.1, seed=0)
    found = equiv.theory.run(AT_OUTPUT, model, update, torch.ones(2, 3))
    for entry in found:
        assert entry.verdict is Verdict.INCONCLUSIVE and "no blocks" in entry.says


def test_models_without_logits_and_other_norms(inside: Setting) -> None:
    """An encoder's output, half the squared difference for KL; and Fisher's norm."""
    model = transformer("vit", seed=1)
    update = equiv.Update.random(model, 0.1, seed=2)
    call = example(model)
    given = setting("", model, update, [call], None, inside.norm, 0).in_blocks
    for number in AT_OUTPUT:
        found = judged(number, given)
        assert found.verdict is Verdict.HOLDS, found.says
    fisher = setting("", inside.model, inside.update, None, None, Fisher(), 0)
    for number in (11, 40, 44):
        assert judged(number, fisher).verdict is Verdict.HOLDS
