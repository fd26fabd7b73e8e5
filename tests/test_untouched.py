"""The user's model comes back bit for bit, also when the call raises."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import witness
from torch import nn

import equiv
from equiv.model.guard import measured
from equiv.testing.models import transformer

IDS = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))


def state(model: Any) -> dict[str, Any]:
    """Everything that a caller could notice, tensors as copies."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "pointers": {n: t.data_ptr() for n, t in model.state_dict().items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {
            n: None if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        },
        "training": {n: m.training for n, m in modules.items()},
        "hooks": {n: [dict(getattr(m, h)) for h in hooks] for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "attention": model.config._attn_implementation,
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def model() -> Any:
    """In training mode, with dropout, gradients, a frozen weight and a hook."""
    made = transformer("llama", seed=1, attention_dropout=0.3, dtype=torch.float32)
    made.train()
    made.model.layers[0].eval()
    made.model.embed_tokens.weight.requires_grad = False
    made(input_ids=IDS, labels=IDS).loss.backward()
    made.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return made


CALLS: dict[str, Callable[[Any, equiv.Update], object]] = {
    "check": lambda m, u: equiv.check(m, u, IDS),
    "check without inputs": lambda m, u: equiv.check(m, u),
    "check on samples": lambda m, u: equiv.check(m, u, "samples", forms=("vector",)),
    "shifts": lambda m, u: list(equiv.shifts(m, u, IDS)),
    "one shift": lambda m, u: equiv.shifts(m, u, IDS)[0, "mlp_out"],
    "fit_sequential": lambda m, u: equiv.fit_sequential(m, u, IDS),
    "random": lambda m, u: equiv.Update.random(m, 0.1, seed=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes(model: Any, name: str) -> None:
    update = equiv.Update.random(model, 0.01, seed=2)
    before = state(model)
    CALLS[name](model, update)
    assert same(before, state(model))


class _Broken(nn.Module):
    """Raises at its n-th call: in every phase of a check there is one."""

    def __init__(self, inner: nn.Module, calls: int) -> None:
        super().__init__()
        # In a list: what a module notes down about itself is put back.
        self.inner, self.left = inner, [calls]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("broken on purpose")
        return self.inner(x)


@pytest.mark.parametrize("calls", [0, 1, 5, 50, 150])
def test_nothing_changes_when_the_call_raises(model: Any, calls: int) -> None:
    broken = _Broken(model.model.layers[1].mlp, calls)
    model.model.layers[1].mlp = broken
    before = state(model)
    update = equiv.Update.random(model, 0.01, seed=2)
    with pytest.raises(Exception, match="broken on purpose"):
        equiv.check(model, update, IDS)
    assert broken.left[0] < 0
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_that_stretch_are_put_back(kind: str) -> None:
    """They note down the longest sequence seen: it would change the next forward."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope |= {"original_max_position_embeddings": 16}
    model = transformer("llama", max_position_embeddings=16, rope_parameters=rope)
    ids = torch.randint(3, 32, (3, 24), generator=torch.Generator().manual_seed(0))
    fresh = copy.deepcopy(model)
    before = state(model)
    update = equiv.Update.random(model, 0.02, seed=0)
    report = equiv.check(model, update, ids, dtype=torch.float64)
    assert report.derivative_holds, report.reason
    assert same(before, state(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copy.deepcopy(fresh)(ids).logits)
    call = {"input_ids": ids}
    expected = witness.activations(fresh, witness.parameters(fresh), call)
    for row in report.rows:
        if row.site == "block_out":
            size = float(expected[row.layer, "block_out"].norm())
            assert row.norm_base == pytest.approx(size, rel=1e-6)


def test_autocast_around_a_check_changes_nothing(model: Any) -> None:
    update = equiv.Update.random(model, 0.05, seed=2)
    plain = equiv.check(model, update, IDS, forms=())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equiv.check(model, update, IDS, forms=()) == plain


def test_buffers_that_a_forward_writes_into_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting()
    with measured(model):
        model(torch.ones(1, 3))
        assert float(model.calls) == 1
    assert float(model.calls) == 0


def test_an_abandoned_iteration_leaves_nothing_behind(model: Any) -> None:
    before = state(model)
    stream = iter(equiv.shifts(model, equiv.Update.random(model, 0.1, seed=0), IDS))
    next(stream)
    del stream
    assert same(before, state(model))


def test_between_two_shifts_the_model_is_the_callers(model: Any) -> None:
    """Two iterations side by side, with the caller's own code in between."""
    update = equiv.Update.random(model, 0.1, seed=0)
    other = equiv.Update.random(model, 0.1, seed=1)
    alone = [list(equiv.shifts(model, u, IDS)) for u in (update, other)]
    before = state(model)
    together = zip(
        equiv.shifts(model, update, IDS), equiv.shifts(model, other, IDS), strict=True
    )
    for i, pair in enumerate(together):
        assert same(before, state(model))
        for found, expected in zip(pair, (alone[0][i], alone[1][i]), strict=True):
            assert torch.equal(found.exact, expected.exact)
            assert torch.equal(found.first_order, expected.first_order)


def test_the_update_is_not_changed_either(model: Any) -> None:
    update = equiv.Update.random(model, 0.1, seed=2)
    before = {name: delta.clone() for name, delta in update.deltas.items()}  # type: ignore[union-attr]
    equiv.check(model, update, IDS)
    assert same(before, dict(update.deltas))


def test_a_model_that_draws_numbers_does_not_use_up_the_callers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(5)
            return self.linear(x)

    model = Noisy()
    before = torch.get_rng_state()
    equiv.check(model, equiv.Update.random(model, 0.1, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_is_off_whatever_the_mode() -> None:
    model = transformer("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    update = equiv.Update.random(model, 0.05, seed=2)
    noisy = equiv.shifts(model, update, IDS)[1, "block_out"]
    quiet = equiv.shifts(model.eval(), update, IDS)[1, "block_out"]
    assert torch.equal(noisy.exact, quiet.exact)
    assert torch.equal(noisy.first_order, quiet.first_order)


def test_equal_seeds_give_equal_reports(model: Any) -> None:
    update = equiv.Update.random(model, 0.05, seed=2)
    one, two = (equiv.check(model, update, IDS, seed=3) for _ in range(2))
    assert one == two
    assert one != equiv.check(model, update, IDS, seed=4)
