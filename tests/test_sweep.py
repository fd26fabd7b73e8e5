"""A sweep is its candidates one by one, with what lies below them run once."""

from typing import Any

import pytest
import torch
from steered import random, unchanged
from torch import Tensor, nn

import equiv
from equiv import Affine, ArgumentError, LowRankMLP, Vector
from equiv.testing.models import transformer

FAMILIES = (
    "llama",
    "gpt2",
    "bert",
    "olmo2",
    "gemma2",
    "gpt_neox",
    "falcon",
    "t5",
    "bart",
)
IDS = torch.tensor([[3, 9, 4, 11, 5], [0, 0, 7, 8, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def candidates(site: str, layer: int = 1) -> list[Any]:
    vectors = [{(layer, site): Vector(random(16, seed=n))} for n in range(3)]
    thin = [
        {(layer, site): Affine(random(r, 16, seed=r), random(16, r))} for r in (1, 2)
    ]
    other = {(layer, site): LowRankMLP(random(2, 16), random(16, 2))}
    return [*vectors, *thin, other, {}]


def inputs(family: str) -> dict[str, Tensor]:
    # Padding on the left makes Gemma-2's eager attention NaN, steered or not.
    given = {"input_ids": IDS}
    given |= {} if family == "gemma2" else {"attention_mask": MASK}
    return {**given, "decoder_input_ids": IDS} if family in ("t5", "bart") else given


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_sweep_is_its_candidates_one_by_one(family: str) -> None:
    """In float64, so that a larger batch's other sums are some 10⁻¹⁴."""
    model = transformer(family, dtype=torch.float64)
    batch = inputs(family)
    for tried, positions in (
        (candidates("block_out"), None),
        (candidates("attn_out"), "last 2"),
        ([*candidates("block_out", 0), *candidates("mlp_out")], MASK.bool()),
    ):
        if positions is not None and family in ("t5", "bart"):
            positions = None
        with unchanged(model):
            found = equiv.sweep(model, tried, batch, positions=positions)
        assert found.shape[:2] == (len(tried), 2)
        for number, steering in enumerate(tried):
            with equiv.steer(model, steering, positions=positions):
                out = model(**batch)
            alone = out.logits if hasattr(out, "logits") else out.last_hidden_state
            torch.testing.assert_close(found[number], alone, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[0], found[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("layer", "site", "rows"),
    [(0, "mlp_in", [14, 14]), (0, "block_out", [2, 14]), (1, "mlp_in", [2, 14])],
)
@torch.no_grad()
def test_what_lies_below_runs_once(layer: int, site: str, rows: list[int]) -> None:
    """Rows that each block's MLP has seen: 2 of the batch, 14 of the candidates."""
    model, seen = transformer("llama"), {0: 0, 1: 0}
    handles = [
        block.mlp.register_forward_hook(
            lambda _m, _a, out, n=n: seen.__setitem__(n, seen[n] + len(out))
        )
        for n, block in enumerate(model.model.layers)
    ]
    equiv.sweep(model, candidates(site, layer), inputs("llama"))
    assert [seen[0], seen[1]] == rows
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_a_module_without_blocks_is_swept_too() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), random(3, 16)
    tried = candidates("0", 0)
    found = equiv.sweep(net, tried, x)
    for number, steering in enumerate(tried):
        with equiv.steer(net, steering):
            torch.testing.assert_close(found[number], net(x))


def test_gradients_reach_the_candidates() -> None:
    model = transformer("llama", dtype=torch.float64)
    v = random(16).double().requires_grad_()
    tried = [{(1, "block_out"): Vector(v)}, {(1, "block_out"): Vector(2 * v)}]
    total = equiv.sweep(model, tried, inputs("llama")).square().sum()
    total.backward(retain_graph=True)
    found, v.grad = v.grad, None
    losses = []
    for steering in tried:
        with equiv.steer(model, steering):
            losses.append(model(**inputs("llama")).logits.square().sum())
    torch.stack(losses).sum().backward()
    assert found is not None and v.grad is not None
    torch.testing.assert_close(found, v.grad)


def test_wrong_calls_say_what_to_do() -> None:
    model = transformer("llama")
    with pytest.raises(ArgumentError, match="a sequence of one steering or more"):
        equiv.sweep(model, [], {"input_ids": IDS})
    with pytest.raises(ArgumentError, match="without `past_key_values`"):
        equiv.sweep(
            model, candidates("mlp_out"), {"input_ids": IDS, "past_key_values": 1}
        )
    with pytest.raises(ArgumentError, match="with tensors"):
        equiv.sweep(model, candidates("mlp_out"), {})
