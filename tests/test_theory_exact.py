"""Exact claims hold for any seed, and fail when what they say is broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from breaking import Broken, break_one, each, off, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu
from witness import SWEEP

import equiv
from equiv.theory import Claim, Verdict
from equiv.theory.values import Kind

EXACT = [c for c in equiv.theory.shipped() if c.kind is Kind.EXACT]
SEEDED = [c for c in EXACT if "seed" in c.needs]


def judgement(number: int, seed: int = 0) -> Any:
    (judged,) = equiv.theory.run([number], seed=seed)
    return judged


@pytest.mark.parametrize("claim", SEEDED, ids=lambda claim: f"claim {claim.id}")
@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=5 * SWEEP)
def test_it_holds_for_any_seed(claim: Claim, seed: int) -> None:
    judged = judgement(int(claim.id), seed)
    assert judged.verdict is Verdict.HOLDS, judged.says
    if claim.as_written:
        assert judged.as_written["verdict"] is Verdict.FAILS


def late_oracle(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes a state that is off by a millionth."""
    return lambda target, layer, mask: original(scaled(target), layer, mask)


def full_projector(original: Callable[..., Any]) -> Callable[..., Any]:
    """All singular vectors of B, whatever its rank: the published code's."""

    def projector(written: Tensor) -> Tensor:
        basis = torch.linalg.svd(written, full_matrices=False).U
        return torch.eye(len(written), dtype=written.dtype) - basis @ basis.T

    return projector


BROKEN: list[Broken] = [
    (1, "first_order", off),
    (1, "slope", lambda _: lambda phi, x: torch.ones_like(x)),
    (2, "up_down", off),
    (2, "value_output", off),
    (2, "derivative", off),
    (3, "updated", off),
    (4, "updated", off),
    (5, "down_bias", off),
    (5, "output", off),
    (5, "adding", lambda original: lambda changes: original(scaled(changes))),
    (6, "own_shift", off),
    (6, "adding", lambda original: lambda changes: original(scaled(changes))),
    (7, "sequential", off),
    (8, "oracle", late_oracle),
    (9, "rank_one", off),
    (9, "adding", lambda original: lambda changes: original(scaled(changes))),
    (18, "onto_second", off),
    (18, "onto_second", lambda f: lambda first, second: f(second, first)),
    (18, "least_sine", off),
    (19, "conditional", off),
    (20, "rms_norm", lambda f: lambda x, eps=1e-3: f(x, eps)),
    (20, "silu", lambda _: lambda x: torch.sigmoid(x)),
    (22, "adapter", lambda _: gelu),
    (22, "adapter", lambda f: lambda e: f(e) + 1e-6),
    (25, "value_bound", lambda f: lambda rank: f(rank) - 1),
    (25, "shift_rank", lambda f: lambda *args: min(f(*args), 12)),
    (28, "SLOPE", lambda slope: -0.9 + 0 * slope),
    (28, "bound", lambda f: lambda *args: f(*args) / 2),
    (28, "kl", lambda f: lambda *args: 2 * f(*args)),
    (28, "_norm", lambda f: lambda matrix: f(matrix) / 2),
    (30, "projector", lambda _: lambda written: torch.eye(len(written)).double()),
    (30, "projector", full_projector),
    (33, "constrained", lambda _: lambda up, update: up),
    (33, "constrained", lambda f: lambda up, update: f(up, update) + 1e-6),
    (34, "by_formula", off),
    (38, "shifts", lambda f: lambda *args: f(*args) + 1e-6 * torch.randn(18, 8)),
    (43, "left", off),
    (43, "shift", lambda f: lambda *args: f(*args) + 1e-5 * torch.randn(20, 8)),
    (45, "up_down", lambda f: lambda draw, w: f(draw, w).only("up")),
    (45, "value_output", lambda f: lambda w: f(w).only("value")),
    (45, "norm_and_readers", lambda f: lambda *args: f(*args) + 1e-6),
]


@pytest.mark.claim(1, 2, 3, 4, 5, 6, 7, 8, 9, 18, 19, 20, 22, 25, 28, 30, 33, 34)
@pytest.mark.claim(38, 43, 45)
@each(BROKEN)
def test_it_fails_when_broken(case: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = judgement(break_one(monkeypatch, case))
    assert judged.verdict is Verdict.FAILS
    assert judged.broken and "expected" in judged.says


def test_every_exact_claim_is_tried_to_break() -> None:
    assert {number for number, _, _ in BROKEN} >= {claim.id for claim in EXACT}


def test_models_have_their_published_sizes() -> None:
    """As their model cards give them."""
    found = judgement(34).to_dict()["evidence"]
    assert {name: found[name]["total"] for name in found if "," not in name} == {
        "Llama-3.2-1B": 1_235_814_400,
        "Gemma-3-1B": 999_885_952,
        "Qwen3-4B": 4_022_468_096,
        "Llama-3.1-8B": 8_030_261_248,
    }
