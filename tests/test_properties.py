"""Properties that must hold for every toy MLP and every tiny transformer."""

from typing import Any

import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import equiv
from equiv.report.values import Verdict
from equiv.testing.models import SMOOTH, mlp, transformer
from equiv.testing.strategies import Case, mlp_cases, seeds, transformer_cases

FEW = settings(max_examples=6 * witness.SWEEP)  # a transformer takes a second
MANY = settings(max_examples=30 * witness.SWEEP)


def shift(case: Case, update: equiv.Update | None = None) -> list[equiv.Shift]:
    used = case.update if update is None else update
    return list(equiv.shifts(case.model, used, case.inputs, dtype=torch.float64))


@FEW
@given(transformer_cases())
def test_shifts_equal_the_whole_models_own_jvp(case: Case) -> None:
    call = {"input_ids": case.inputs}
    base, first = witness.whole_jvp(case.model, case.update, call)
    _, middle = witness.whole_jvp(case.model, case.update, call, t=0.5)
    tuned = witness.tuned_activations(case.model, case.update, call)
    for s in shift(case):
        key = (s.layer, s.site)
        witness.close(s.base, base[key])
        witness.close(s.first_order, first[key])
        witness.close(s.midpoint, middle[key])
        witness.close(s.exact, tuned[key] - base[key])


@MANY
@given(mlp_cases())
def test_first_order_is_the_jacobian_times_the_update(case: Case) -> None:
    change = witness.dense(case.update)

    def run(own: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(case.model, own, (case.inputs,))

    expected = witness.jacobian_times(run, witness.parameters(case.model), change)
    last = str(len(list(case.model.children())) - 1)
    s = equiv.shifts(
        case.model, case.update, case.inputs, sites=(last,), dtype=torch.float64
    )[0, last]
    witness.close(s.first_order, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_brute_force_jacobian_of_a_transformer(family: str) -> None:
    small: dict[str, Any] = (
        {"n_embd": 4, "n_inner": 4, "n_layer": 1, "n_head": 1, "vocab_size": 8}
        if family == "gpt2"
        else {
            "hidden_size": 4,
            "intermediate_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "head_dim": 4,
            "vocab_size": 8,
        }
    )
    model = transformer(family, seed=3, **small)
    update = equiv.Update.random(model, 0.1, seed=4)
    ids = torch.tensor([[3, 5, 1]])
    layer = witness.layers_of(model) - 1

    def run(own: dict[str, torch.Tensor]) -> torch.Tensor:
        return witness.activations(model, own, {"input_ids": ids})[layer, "block_out"]

    with witness.own_arithmetic(), torch.no_grad():
        expected = witness.jacobian_times(
            run, witness.parameters(model), witness.dense(update)
        )
    found = equiv.shifts(model, update, ids, dtype=torch.float64)[layer, "block_out"]
    witness.close(found.first_order, expected)


@MANY
@given(mlp_cases(), seeds(), st.floats(-2, 2), st.floats(-2, 2))
def test_first_order_is_linear_in_the_update(
    case: Case, seed: int, a: float, b: float
) -> None:
    other = equiv.Update.random(case.model, 0.1, seed=seed)
    one, two = witness.dense(case.update), witness.dense(other)
    both = equiv.Update.from_dict({n: a * one[n] + b * two[n] for n in one})
    for s, s1, s2 in zip(
        shift(case, both), shift(case), shift(case, other), strict=True
    ):
        witness.close(s.first_order, a * s1.first_order + b * s2.first_order)


@MANY
@given(mlp_cases())
def test_a_zero_update_moves_nothing(case: Case) -> None:
    zero = {n: torch.zeros_like(d) for n, d in witness.dense(case.update).items()}
    for s in shift(case, equiv.Update.from_dict(zero)):
        for moved in (s.exact, s.first_order, s.midpoint, s.local_exact):
            assert not moved.any()
    report = equiv.check(case.model, zero, case.inputs)
    assert {r.order.verdict for r in report.rows} == {Verdict.NOT_APPLICABLE}
    assert not report.holds


@MANY
@given(mlp_cases(activations=("tanh", "gelu", "silu"), relative_norms=(0.1,)))
def test_smooth_models_are_of_second_and_third_order(case: Case) -> None:
    report = equiv.check(case.model, case.update, case.inputs)
    assert report.derivative_holds, report.reason
    for row in report.rows:
        assert row.order.verdict in (Verdict.HOLDS, Verdict.EXACT), row.order
        assert row.order_midpoint is not None
        # f = a + bt + ct² has no third-order term: the midpoint remainder is zero.
        assert row.order_midpoint.verdict in (Verdict.HOLDS, Verdict.EXACT)


@MANY
@given(st.sampled_from(sorted(SMOOTH)), seeds())
def test_exact_where_the_output_is_affine_in_the_weights(name: str, seed: int) -> None:
    model = mlp((4, 6, 3), name, seed=seed)
    update = equiv.Update.random(model, 0.3, seed=seed).restricted(names="2.*")
    x = torch.randn(6, 4, dtype=torch.float64)
    report = equiv.check(model, update, x)
    assert [row.site for row in report.rows if row.norm_exact][-1:] == ["output"]
    for row in report.rows:
        moves = row.site == "output"
        expected = Verdict.EXACT if moves else Verdict.NOT_APPLICABLE
        assert row.order.verdict is expected, row
    assert report.holds


@FEW
@given(transformer_cases(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_shift(case: Case, random: object) -> None:
    order = list(range(len(case.inputs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = equiv.shifts(
        case.model, case.update, case.inputs[order], dtype=torch.float64
    )
    for s, p in zip(shift(case), permuted, strict=True):
        witness.close(p.exact, s.exact[order])
        witness.close(p.first_order, s.first_order[order])


@FEW
@given(transformer_cases(), st.integers(1, 3), st.sampled_from(["left", "right"]))
def test_padding_does_not_matter(case: Case, extra: int, side: str) -> None:
    batch, length = case.inputs.shape
    pad = torch.full((batch, extra), 7)
    real = torch.ones_like(case.inputs)
    none = torch.zeros_like(pad)
    left = side == "left"
    mask = torch.cat([none, real] if left else [real, none], 1)
    call = {
        "input_ids": torch.cat([pad, case.inputs] if left else [case.inputs, pad], 1),
        "attention_mask": mask,
    }
    if left:  # what `generate` does: positions count the real tokens
        call["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    kept = slice(extra, None) if left else slice(0, length)
    padded = equiv.shifts(case.model, case.update, call, dtype=torch.float64)
    for s, p in zip(shift(case), padded, strict=True):
        witness.close(p.exact[:, kept], s.exact)
        witness.close(p.first_order[:, kept], s.first_order)
        assert torch.equal(p.mask, mask.bool())


def test_padding_enters_no_figure() -> None:
    model = transformer("llama", seed=1)
    update = equiv.Update.random(model, 0.05, seed=2)
    ids = torch.randint(3, 32, (8, 10), generator=torch.Generator().manual_seed(0))
    junk = torch.randint(3, 32, (8, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([torch.ones(8, 10), torch.zeros(8, 4)], 1).long()
    padded = {"input_ids": torch.cat([ids, junk], 1), "attention_mask": mask}
    plain = equiv.check(model, update, {"input_ids": ids}, dtype=torch.float64)
    other = equiv.check(model, update, padded, dtype=torch.float64)
    for a, b in zip(plain.rows, other.rows, strict=True):
        assert b.remainder == pytest.approx(a.remainder, rel=1e-9)
        assert b.norm_exact == pytest.approx(a.norm_exact, rel=1e-9)
    for a, b in zip(plain.fits, other.fits, strict=True):
        assert b.misfit_held_out == pytest.approx(a.misfit_held_out, rel=1e-6)
    for a, b in zip(plain.behaviour, other.behaviour, strict=True):
        assert (a.site, a.rung) == (b.site, b.rung)
        assert b.distance == pytest.approx(a.distance, rel=1e-6, abs=1e-15)


class _WrongDerivative(torch.autograd.Function):
    """Tanh whose derivative is off by one part in a hundred."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, dx):  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        return 1.01 * (1 - y**2) * dx


class _WrongTanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _WrongDerivative.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_derivative_is_caught(seed: int) -> None:
    right = mlp((4, 8, 8, 3), "tanh", seed=seed)
    wrong = mlp((4, 8, 8, 3), "tanh", seed=seed)
    wrong[3] = _WrongTanh()
    update = equiv.Update.random(right, 0.05, seed=seed)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)).double()
    assert equiv.check(right, update, x).derivative_holds
    report = equiv.check(wrong, update, x, max_remainder=None)
    assert not report.derivative_holds
    failing = {row.site for row in report.failing()}
    assert failing == {"3", "output"}  # where the wrong derivative is, and after it
    for row in report.failing():
        assert row.order.order == pytest.approx(1.0, abs=0.15)


@FEW
@given(transformer_cases(relative_norms=(0.1,)))
def test_float64_stays_float64_inside_hugging_face_models(case: Case) -> None:
    """A float32 norm or softmax leaves noise of 1e-8, which buries t² at t = 2⁻¹⁰."""
    base, first = witness.whole_jvp(case.model, case.update, {"input_ids": case.inputs})
    report = equiv.check(case.model, case.update, case.inputs, forms=())
    logits = next(row for row in report.rows if row.site == "logits")
    finest, next_ = (
        next(p for p in logits.taylor if p.scale == scale) for scale in (2**-10, 2**-9)
    )
    assert next_.remainder / finest.remainder == pytest.approx(4, rel=0.05)
    noise = logits.taylor_floor
    assert noise is not None and noise < 1e-12 * float(base["logits"].norm() + 1)
    assert float(first["logits"].norm()) > 0
