"""Which tokens an update sends to other experts, against routing done by hand."""

import copy
from typing import Any

import pytest
import torch
import witness
from hypothesis import given
from hypothesis import strategies as st

import equiv
from equiv.model.families import find_blocks
from equiv.model.routing import chosen_experts, flipped, flipped_shares, routers
from equiv.testing.models import transformer

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
F64 = torch.float64


def by_hand(model: Any, layer: int, mask: torch.Tensor | None = None) -> list[set[int]]:
    """The experts of each token, from the MLP's input and the gate's own weights."""
    mlp = model.model.layers[layer].mlp
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=mask)
    handle.remove()
    gate = getattr(mlp, "gate", None) or mlp.router
    scores = seen[0].flatten(0, 1) @ gate.weight.T + getattr(gate, "bias", 0.0)
    if model.config.model_type == "deepseek_v3":  # the best group of two, by its sum
        scores = scores.sigmoid()
        groups = scores.view(len(scores), 2, 2).sum(-1).argmax(-1)
        keep = torch.arange(4)[None] // 2 == groups[:, None]
        scores = scores.masked_fill(~keep, -1.0)
    return [set(row.tolist()) for row in scores.topk(2).indices]


def drawn(model: Any, size: float) -> dict[str, torch.Tensor]:
    return witness.dense(equiv.Update.random(model, size, seed=0))


def tuned(model: Any, update: dict[str, torch.Tensor]) -> Any:
    made = copy.deepcopy(model)
    for name, delta in update.items():
        made.get_parameter(name).data += delta
    return made


@pytest.mark.parametrize("family", MIXTURES)
def test_shares_are_those_counted_by_hand(family: str) -> None:
    model = transformer(family, seed=1)
    update = drawn(model, 0.15)
    found = flipped_shares(model, update, IDS, dtype=F64)
    layers = [i for i in (0, 1) if hasattr(model.model.layers[i].mlp, "experts")]
    assert list(found) == layers
    other = tuned(model, update)
    for layer in layers:
        pairs = zip(by_hand(model, layer), by_hand(other, layer), strict=True)
        share = sum(a != b for a, b in pairs) / IDS.numel()
        assert found[layer] == pytest.approx(share, abs=1e-12)
    assert max(found.values()) > 0


def test_tokens_under_the_mask_are_not_counted() -> None:
    model = transformer("mixtral", seed=2)
    update = drawn(model, 0.2)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    call = {"input_ids": IDS, "attention_mask": mask}
    found = flipped_shares(model, update, call, dtype=F64)
    runs = [by_hand(m, 1, mask) for m in (model, tuned(model, update))]
    keep = mask.bool().flatten().tolist()
    counted = [a != b for a, b, k in zip(*runs, keep, strict=True) if k]
    assert 0 < sum(counted) / len(counted) == pytest.approx(found[1], abs=1e-12)


def test_what_leaves_the_choice_alone_flips_nothing() -> None:
    """A gate times two chooses as before; its negative chooses the others."""
    model = transformer("mixtral", seed=3)
    name = "model.layers.1.mlp.gate.weight"
    gate = model.get_parameter(name).detach()
    assert flipped_shares(model, {name: gate}, IDS, dtype=F64) == {0: 0.0, 1: 0.0}
    opposite = flipped_shares(model, {name: -2 * gate}, IDS, dtype=F64)
    assert opposite == {0: 0.0, 1: 1.0}  # two of four, and the other two


def test_small_updates_flip_less() -> None:
    model = transformer("qwen3_moe", seed=4)
    update = drawn(model, 1.0)
    shares = [
        sum(
            flipped_shares(
                model, {n: t * d for n, d in update.items()}, IDS, dtype=F64
            ).values()
        )
        for t in (1e-6, 0.05, 1.0)
    ]
    assert shares[0] == 0 < shares[1] < shares[2]


def test_a_dense_model_has_no_routers() -> None:
    model = transformer("llama")
    update = drawn(model, 0.1)
    assert flipped_shares(model, update, IDS) == {}
    with pytest.raises(equiv.UnsupportedModelError, match="known family"):
        flipped_shares(torch.nn.Linear(2, 2), {}, torch.ones(2, 2))


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
    update = drawn(model, 0.1)
    flipped_shares(model, update, IDS)
    assert torch.equal(model(input_ids=IDS).logits, before)
    blocks = find_blocks(model)
    assert blocks is not None
    with pytest.raises(RuntimeError, match="mine"), chosen_experts(routers(blocks)):
        raise RuntimeError("mine")
    assert not any(m._forward_hooks for m in model.modules())
