"""Derivatives had otherwise than by forward mode, and derivatives that are wrong.

Differences are held against the exact derivative to the tolerance that their theory
gives; two reverse passes against forward mode of the same function written plainly.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import witness
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equiv
from equiv.shift.derivative import (
    NoForwardRuleError,
    NoReverseRuleError,
    forward,
    pullback,
    twice_backward,
)
from equiv.shift.differences import step_of
from equiv.testing.models import mlp, transformer
from equiv.update.low_rank import LowRank

IDS = torch.randint(3, 32, (6, 9), generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float32, torch.float64)


class NoForward(torch.autograd.Function):
    """Tanh with a reverse rule alone, written as PyTorch's transforms want it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


class OldStyle(torch.autograd.Function):
    """Tanh as most custom operations are written: the context goes into `forward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        # The rule need not be differentiable in x, only in what it multiplies.
        return gradient * (1 - y.detach() ** 2)


class Once(OldStyle):
    """A rule that cannot be differentiated again."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


class NoRule(torch.autograd.Function):
    """Tanh without any rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)


class WrongTangent(torch.autograd.Function):
    """Tanh whose forward rule says zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


@torch.library.custom_op("equiv_tests::tanh", mutates_args=())
def custom_tanh(x: Tensor) -> Tensor:
    """Tanh as a custom operation without rules: its tangent is zero, silently."""
    return torch.tanh(x)


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def net(function: Callable[[Tensor], Any] = torch.tanh, seed: int = 0) -> nn.Sequential:
    model = mlp((4, 8, 8, 3), "tanh", seed=seed)
    model[3] = Of(function)
    return model


def llama(function: Callable[[Tensor], Any] | None = None, layer: int = 1) -> Any:
    """A Llama, of which the MLP of one block has another activation."""
    model = transformer("llama")
    model.model.layers[layer].mlp.act_fn = Of(function or torch.tanh)
    return model


def changed(model: nn.Module, size: float, low: bool) -> equiv.Update:
    """A random update, of all parameters or of rank 2 at the matrices."""
    update = equiv.Update.random(model, size, seed=3)
    if not low:
        return update
    factors = {}
    for name, delta in update.deltas.items():
        if (
            isinstance(delta, Tensor)
            and delta.ndim == 2
            and re.search(r"layer|\.h\.", name)
        ):
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            factors[name] = LowRank(u[:, :2] * s[:2], v[:2])
    return equiv.Update.from_dict(factors)


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()


@given(
    size=st.sampled_from([1e-6, 1e-4, 1e-2, 0.3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_differences_are_within_their_error(
    size: float, dtype: torch.dtype, seed: int
) -> None:
    """ε^⅔ of the shift, times 100 for rounding and curvature: whatever the size.

    A fixed step would be off by 1/size as much: see the last lines.
    """
    model = mlp((4, 8, 8, 3), "tanh", seed=seed % 1000)
    update = equiv.Update.random(model, size, seed=seed)
    options: dict[str, Any] = {"dtype": dtype, "sites": None}
    exact = list(equiv.shifts(model, update, X, dtype=torch.float64, sites=None))
    found = list(equiv.shifts(model, update, X, derivative="central", **options))
    allowed = 100 * torch.finfo(dtype).eps ** (2 / 3)
    for e, c in zip(exact, found, strict=True):
        assert (e.derivative, c.derivative) == ("jvp", "central")
        for name in ("first_order", "midpoint", "local_first_order"):
            right, got = getattr(e, name), getattr(c, name).double()
            assert (got - right).norm() <= allowed * right.norm(), (c.site, name)
    unit = (3 * torch.finfo(dtype).eps) ** (1 / 3)
    assert step_of(update, model, dtype) == pytest.approx(unit / size, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2"])
@pytest.mark.parametrize("low", [False, True])
def test_differences_of_whole_models(family: str, low: bool) -> None:
    """At every site, against one jvp of the whole model: dense and low-rank updates."""
    model = transformer(family)
    update = changed(model, 0.01, low)
    _, tangents = witness.whole_jvp(model, update, {"input_ids": IDS})
    options: dict[str, Any] = {"dtype": torch.float64, "derivative": "central"}
    allowed = 1000 * torch.finfo(torch.float64).eps ** (2 / 3)
    for s in equiv.shifts(model, update, IDS, **options):
        right = tangents[s.layer, s.site]
        assert (s.first_order - right).norm() <= allowed * right.norm(), s.site


def test_a_check_by_differences_says_so_in_every_row() -> None:
    model = transformer("llama")
    update = equiv.Update.random(model, 0.02, seed=0)
    exact = equiv.check(model, update, IDS, forms=())
    found = equiv.check(model, update, IDS, forms=(), derivative="central")
    assert {row.derivative for row in exact.rows} == {"jvp"}
    assert {row.derivative for row in found.rows} == {"central"}
    assert found.superposition is None and found.contributions is None
    assert any("central differences" in note for note in found.notes)
    # Of the shift: what a difference in float32 is off by, 100 as above.
    allowed = 100 * torch.finfo(torch.float32).eps ** (2 / 3)
    for e, c in zip(exact.rows, found.rows, strict=True):
        assert (e.layer, e.site, e.scope) == (c.layer, c.site, c.scope)
        assert c.order.verdict == e.order.verdict
        assert c.remainder == pytest.approx(e.remainder, abs=allowed)
        if e.order.order is not None:
            assert c.order.order == pytest.approx(e.order.order, abs=0.05)


def test_no_order_is_read_below_a_differences_error() -> None:
    """A tiny update: remainders lie below it, and must not look like order one."""
    model = mlp((4, 8, 8, 3))
    for size in (1e-9, 1e-7, 1e-5, 1e-3):
        update = equiv.Update.random(model, size, seed=0)
        report = equiv.check(model, update, X, derivative="central")
        for row in report.rows:
            assert row.order.verdict.value != "fails", (size, row.site, row.order)


@pytest.mark.parametrize("function", [NoForward.apply, OldStyle.apply])
def test_two_reverse_passes_are_forward_mode(function: Any) -> None:
    """Where there is no forward rule; what each row is had by is recorded."""
    model, plain = net(function), net()
    update = equiv.Update.random(plain, 0.1, seed=2)
    options: dict[str, Any] = {"dtype": torch.float64, "sites": None}
    found = list(equiv.shifts(model, update, X, **options))
    for f, p in zip(found, equiv.shifts(plain, update, X, **options), strict=True):
        assert (f.derivative, p.derivative) == ("double backward", "jvp")
        for name in ("exact", "first_order", "midpoint", "local_first_order"):
            witness.close(getattr(f, name), getattr(p, name))
    report = equiv.check(model, update.scaled(0.1), X)
    assert report.derivative_holds
    assert {row.derivative for row in report.rows} == {"double backward"}


@pytest.mark.parametrize("function", [NoForward.apply, OldStyle.apply])
@pytest.mark.parametrize("low", [False, True])
def test_two_reverse_passes_through_attention_and_factors(
    function: Any, low: bool
) -> None:
    """Their own derivatives are of first order; from the block on rows say how."""
    model, plain = llama(function), llama()
    update = changed(plain, 0.05, low)
    options: dict[str, Any] = {"dtype": torch.float64}
    for f, p in zip(
        equiv.shifts(model, update, IDS, **options),
        equiv.shifts(plain, update, IDS, **options),
        strict=True,
    ):
        assert f.derivative == ("jvp" if f.layer == 0 else "double backward")
        for name in ("exact", "first_order", "midpoint", "local_first_order"):
            witness.close(getattr(f, name), getattr(p, name))


def test_a_check_by_two_reverse_passes_is_a_check() -> None:
    """Superposition, contributions and spectra as well."""
    model, plain = llama(OldStyle.apply), llama()
    update = changed(plain, 0.05, low=True)
    options: dict[str, Any] = {"forms": ("vector",), "sites": ("mlp_out",)}
    found = equiv.check(model, update, IDS, **options)
    right = equiv.check(plain, update, IDS, **options)
    assert found.superposition is not None and right.contributions is not None
    assert found.superposition.verdict.value == "holds"
    assert found.contributions is not None and found.spectra
    assert found.contributions.shares == pytest.approx(
        right.contributions.shares, rel=1e-9
    )
    # The order's own derivative is had at every scale of the Taylor test.
    for f, r in zip(found.rows, right.rows, strict=True):
        assert f.derivative == ("jvp" if f.layer == 0 else "double backward")
        assert f.order.verdict == r.order.verdict
        assert f.remainder == pytest.approx(r.remainder, rel=1e-4)
    assert found.rows[-1].site == "logits"


def test_an_lstm_in_float32_is_measured() -> None:
    """Its fused kernel has no forward rule; in float64 it is made of parts that do."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x[:, None])[0][:, 0]

    torch.manual_seed(0)
    model = nn.Sequential(Recurrent(), nn.Linear(5, 2))
    update = equiv.Update.random(model, 0.1, seed=0)
    options: dict[str, Any] = {"sites": None}
    (single,) = equiv.shifts(model, update, X.float(), **options)
    (double,) = equiv.shifts(model, update, X, dtype=torch.float64, **options)
    assert single.derivative in ("double backward", "jvp")
    torch.testing.assert_close(
        single.first_order.double(), double.first_order, rtol=1e-4, atol=1e-5
    )


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "once differentiable": (Once.apply, "`Once`"),
    "no rule": (NoRule.apply, "`NoRule`"),
    "numpy": (through_numpy, "leaves PyTorch"),
    "a wrong rule": (WrongTangent.apply, "not that of what it computes"),
    "a custom operation": (custom_tanh, "not that of what it computes"),
    "a detach": (lambda x: torch.tanh(x.detach()), "not that of what it computes"),
    "a straight-through estimator": (
        lambda x: x + (torch.round(x) - x).detach(),
        "not that of what it computes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", [equiv.check, equiv.shifts])
@pytest.mark.parametrize("block", [False, True])
def test_what_has_no_right_derivative_is_refused_by_name(
    name: str, call: Any, block: bool
) -> None:
    """The module and the operation; with `derivative="central"` it is measured."""
    function, words = REFUSED[name]
    model, inputs = (llama(function), IDS) if block else (net(function), X)
    module = r"`model\.layers\.1\.mlp\.act_fn`" if block else "`3`"
    update = equiv.Update.random(model, 0.05, seed=1)
    options: dict[str, Any] = {"dtype": torch.float64}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(equiv.ForwardModeError) as caught:
        _ = list(call(model, update, inputs, **options))  # shifts are lazy
    message = str(caught.value)
    for part in (words, module.replace("\\", ""), 'derivative="central"'):
        assert part in message, message
    assert len(message) < 600
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_hooks for m in model.modules())


def test_a_refused_model_is_measured_by_differences() -> None:
    for function in (through_numpy, custom_tanh, NoRule.apply):
        model, plain = llama(function), llama()
        update = equiv.Update.random(plain, 0.05, seed=1)
        options: dict[str, Any] = {"dtype": torch.float64}
        exact = equiv.shifts(plain, update, IDS, **options)
        found = equiv.shifts(model, update, IDS, derivative="central", **options)
        for f, e in zip(found, exact, strict=True):
            torch.testing.assert_close(
                f.first_order, e.first_order, rtol=1e-6, atol=1e-9
            )
        options |= {"sites": ("mlp_out",), "forms": ("vector",), "dtype": None}
        report = equiv.check(model, update, IDS, derivative="central", **options)
        assert {row.derivative for row in report.rows} == {"central"}
        assert report.derivative_holds and report.behaviour
        assert not report.spectra  # these go through the model backwards
        assert any("spectra not measured" in note for note in report.notes)


@given(
    seed=st.integers(0, 2**32 - 1),
    activation=st.sampled_from(["tanh", "gelu", "silu", "relu", "identity"]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-5, 1e-3, 0.1, 1.0]),
)
def test_right_derivatives_are_not_refused(
    seed: int, activation: str, dtype: torch.dtype, size: float
) -> None:
    """Also at kinks, in float32, for updates of any size."""
    model = mlp((4, 16, 16, 3), activation, seed=seed % 1000)
    update = equiv.Update.random(model, size, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=draw).double()
    for s in equiv.shifts(model, update, x, dtype=dtype, sites=None):
        assert s.derivative == "jvp"


def test_a_kink_for_every_token_is_no_wrong_rule() -> None:
    """ReLU at zero: the two sides differ, and no rule would be right."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    draw = torch.Generator().manual_seed(0)
    delta = {"0.weight": torch.randn(4, 4, generator=draw).double()}
    assert list(equiv.shifts(model, delta, X, sites=None))


def test_a_bend_within_the_step_is_no_wrong_rule() -> None:
    """Two norms of a zero vector: straight over a millionth of the step only."""
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4, 1e-6), nn.RMSNorm(4, 1e-6))
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    model.append(nn.Linear(4, 4)).double()
    draw = torch.Generator().manual_seed(0)
    delta = {"0.weight": torch.randn(4, 4, generator=draw).double()}
    (s, *_) = equiv.shifts(model, delta, X, sites=("2",), dtype=torch.float64)
    witness.close(s.first_order, 1e6 * X @ delta["0.weight"].T)


def test_the_reverse_of_every_style_of_rule() -> None:
    def plain(x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    u = torch.randn(12, 4, generator=torch.Generator().manual_seed(2)).double()
    right = 2 * (1 - torch.tanh(X) ** 2) * u
    rules = [lambda x, f=f: f.apply(x) * 2 for f in (NoForward, OldStyle)]
    for function in (plain, *rules):
        pull = pullback(function, X)
        for _ in range(2):
            witness.close(pull(u)[0], right)
    with pytest.raises(NoReverseRuleError):
        pullback(NoRule.apply, X)(u)
    with pytest.raises(NoForwardRuleError):
        forward(NoForward.apply, (X,), (u,))
    for function in (Once.apply, lambda x: x + Once.apply(x)):  # type: ignore
        with pytest.raises(NoReverseRuleError):
            twice_backward(function, (X,), (u,))


def test_values_that_do_not_move_have_a_derivative_of_zero() -> None:
    def run(x: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
        return {"moves": NoForward.apply(x["a"]), "stays": y.detach() * 2}  # type: ignore

    v = torch.ones_like(X)
    values, tangents = twice_backward(run, ({"a": X}, X), ({"a": v}, v))
    witness.close(values["stays"], 2 * X)
    witness.close(tangents["moves"], 1 - torch.tanh(X) ** 2)
    assert not tangents["stays"].any()
    assert not any(value.requires_grad for value in (*values.values(),))
    assert math.isfinite(float(tangents["moves"].sum()))
