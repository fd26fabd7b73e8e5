"""Shares of an update from outputs: claim 49, against SciPy on whole models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import witness
from scipy.optimize import least_squares
from torch import Tensor
from torch.func import functional_call

import equiv
from equiv.model.batches import numbered
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.testing.models import transformer
from equiv.theory import Judged, Verdict
from equiv.theory.claims import claim_49_shares_from_outputs as claim

IDS = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(1))


def judged(model: Any, update: equiv.Update) -> Judged:
    return equiv.theory.run([49], model, update, IDS)[49]


def logits(model: Any, update: equiv.Update, shares: np.ndarray) -> Tensor:
    """Of the model with a share of every layer's update, less their mean."""
    own = dict(model.named_parameters())
    for name, delta in update.deltas.items():
        assert isinstance(delta, Tensor)
        layer = int(name.split(".layers.")[1][0])
        own[name] = own[name] + shares[layer] * delta
    with torch.no_grad(), witness.own_arithmetic():
        found = functional_call(model, own, (IDS,)).logits
    return found - found.mean(-1, keepdim=True)


def in_blocks(model: Any, size: float) -> equiv.Update:
    return equiv.Update.random(model, size, seed=0).restricted(layers=[0, 1])


@pytest.mark.claim(49)
def test_shares_are_those_that_scipy_finds() -> None:
    """Also where no shares explain the outputs, as after rounding."""
    model = transformer("llama")
    update = in_blocks(model, 0.1)
    applied = np.array([0.3, 1.2])
    noise = 0.01 * torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(2))
    seen = logits(model, update, applied) + noise.double()
    seen = seen - seen.mean(-1, keepdim=True)

    def left(shares: np.ndarray) -> np.ndarray:
        return (logits(model, update, shares) - seen).flatten().numpy()

    best = least_squares(left, [0.5, 0.5], xtol=1e-12, ftol=1e-12).x
    batches = numbered(from_inputs(model, IDS))
    with measured(model), staged(model, batches, torch.float64) as cut:
        outputs = claim.Outputs(cut, update, claim.parts_of(update))
        slopes = outputs.slopes([0.5, 0.5])
        once, repeated = claim.solved(outputs, slopes, seen.flatten())
        zero = outputs.at([0.2, 0.7])
    torch.testing.assert_close(
        zero, logits(model, update, np.array([0.2, 0.7])).flatten()
    )
    step = 1e-5
    for i in range(2):
        e = step * np.eye(2)[i]
        ahead, behind = (logits(model, update, 0.5 + s * e) for s in (1, -1))
        central = ((ahead - behind) / (2 * step)).flatten()
        torch.testing.assert_close(slopes[:, i], central, rtol=1e-6, atol=1e-8)
    far = np.abs(best - np.array(once)).max()
    assert np.abs(best - np.array(repeated)).max() < 0.1 * far
    assert np.abs(best - applied).max() < 0.05


@pytest.mark.claim(49)
def test_faults_are_told_apart() -> None:
    model = transformer("llama", dtype=torch.float32)
    found = judged(model, in_blocks(model, 0.1))
    assert found.verdict is Verdict.CONDITIONAL, found.says
    evidence = found.to_dict()["evidence"]
    shares = evidence["shares by fault, repeated"]
    assert max(abs(x) for x in shares["skipped"]) < 0.1
    assert max(abs(x + 1) for x in shares["flipped"]) < 0.1
    assert evidence["faulty parts"] == ["layer 0", "layer 1"]


@pytest.mark.claim(49)
def test_an_update_below_rounding_hides_fifteen_sixteenths() -> None:
    model = transformer("llama", dtype=torch.float32)
    found = judged(model, in_blocks(model, 0.02))
    conditions = found.to_dict()["conditions"]
    assert "15/16 is not told" in conditions or found.verdict is Verdict.FAILS


@pytest.mark.claim(49)
def test_dependent_shifts_are_not_identifiable() -> None:
    """Behind a block that does nothing, two biases are one."""
    model = transformer("gpt2")
    with torch.no_grad():
        for part in (model.transformer.h[1].attn, model.transformer.h[1].mlp):
            part.c_proj.weight.zero_()
    bias = torch.linspace(-1, 1, 16, dtype=torch.float64)
    names = [f"transformer.h.{n}.mlp.c_proj.bias" for n in (0, 1)]
    found = judged(model, equiv.Update.from_dict(dict.fromkeys(names, bias)))
    assert found.verdict is Verdict.INCONCLUSIVE and "dependent" in found.says
    assert found.to_dict()["conditions"]["condition number"] > 1e6
    nothing = {names[0]: bias, names[1]: 0 * bias}
    found = judged(model, equiv.Update.from_dict(nothing))
    assert found.verdict is Verdict.INCONCLUSIVE


BROKEN: list[tuple[str, Callable[[Any], Any]]] = [
    ("least_squares", lambda f: lambda *args: -f(*args)),
    ("least_squares", lambda f: lambda *args: f(*args).flip(0)),
    ("scaled", lambda f: lambda update, *_: update),
]


@pytest.mark.claim(49)
@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_it_fails_when_broken(
    name: str, broken: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, name, broken(getattr(claim, name)))
    model = transformer("llama", dtype=torch.float32)
    found = judged(model, in_blocks(model, 0.1))
    assert found.verdict is Verdict.FAILS, found.says
