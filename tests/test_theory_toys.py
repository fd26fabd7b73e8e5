"""Toys and norms are what they say, by independent witnesses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import equiv
from equiv.model.precision import KeepFloat64
from equiv.testing.models import transformer
from equiv.theory.norms import as_norm
from equiv.theory.setting import setting
from equiv.theory.toy_blocks import HEAD, Block, adding, draw_block, run, traced
from equiv.theory.toys import Draw, derivative, glu

WIDTH, TOKENS = 8, 6


def as_llama(blocks: list[Block]) -> LlamaModel:
    """Transformers' Llama with the toy's weights."""
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=len(blocks),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        rms_norm_eps=0.0,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        use_cache=False,
    )
    model = LlamaModel(config).double().eval()
    with torch.no_grad():
        for layer, block in zip(model.layers, blocks, strict=True):
            for name in ("query", "key", "value", "output"):
                linear = layer.get_submodule(f"self_attn.{name[0]}_proj")
                linear.get_parameter("weight").copy_(getattr(block.attention, name))
                bias = getattr(block.attention, f"{name}_bias", None)
                linear.get_parameter("bias").copy_(
                    torch.tensor(0.0) if bias is None else bias
                )
            for name in ("gate", "up", "down"):
                linear = layer.get_submodule(f"mlp.{name}_proj")
                linear.get_parameter("weight").copy_(getattr(block.mlp, name))
                linear.get_parameter("bias").copy_(getattr(block.mlp, f"{name}_bias"))
    return model


def test_toy_blocks_are_llamas() -> None:
    draw = Draw(3)
    blocks = [draw_block(draw, WIDTH) for _ in range(3)]
    h = draw.normal(TOKENS, WIDTH)
    model: Any = as_llama(blocks)
    # Transformers computes these in float32.
    model.rotary_emb.inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
    seen: dict[str, Tensor] = {}

    def note(site: str, value: Any) -> None:
        seen[site] = (value[0] if isinstance(value, tuple) else value)[0]

    layer: Any = model.layers[1]
    layer.self_attn.register_forward_hook(lambda m, i, out: note("attn_out", out))
    layer.mlp.register_forward_pre_hook(lambda m, i: note("mlp_in", i))
    layer.mlp.register_forward_hook(lambda m, i, out: note("mlp_out", out))
    layer.register_forward_hook(lambda m, i, out: note("block_out", out))
    with torch.no_grad(), KeepFloat64():
        model(inputs_embeds=h[None])
    assert len(seen) == 4
    found = traced(blocks, h)
    for site, value in seen.items():
        torch.testing.assert_close(found[1, site], value, rtol=1e-12, atol=1e-12)


def test_derivatives_are_central_differences() -> None:
    draw = Draw(0)
    w, update = draw.glu(WIDTH, 12, biases=True), draw.glu(WIDTH, 12, biases=True)
    u, step = draw.normal(TOKENS, WIDTH), 1e-5
    ahead, behind = (glu(w.plus(update, s), u) for s in (step, -step))
    found = derivative(lambda moved: glu(moved, u), w, update)
    # Truncation is step² ≈ 1e-10, rounding 1e-16/step ≈ 1e-11.
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=0, atol=1e-8)


def test_steering_a_toy_adds_where_it_says() -> None:
    draw = Draw(1)
    blocks = [draw_block(draw, WIDTH) for _ in range(2)]
    h, v = draw.normal(TOKENS, WIDTH), draw.normal(WIDTH)
    plain, steered = traced(blocks, h), traced(blocks, h, adding({(1, "mlp_out"): v}))
    for key, value in plain.items():
        moved = steered[key] - value
        expected = v if key in ((1, "mlp_out"), (1, "block_out")) else torch.zeros(())
        torch.testing.assert_close(moved, expected.expand_as(moved).double())
    assert torch.equal(run(blocks, h), plain[1, "block_out"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_fisher_is_the_change_of_logits(family: str) -> None:
    """Against plain hooks and differences of logits, on batches of two lengths."""
    model = transformer(family, dtype=torch.float64)
    update = equiv.Update.random(model, 1e-4, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(3, 32, shape, generator=generator) for shape in ((2, 9), (3, 5))
    ]
    given = [{"input_ids": batch} for batch in ids]
    s = setting("", model, update, given, None, as_norm("fisher"), 0)
    change = s.shifts[0, "block_out"].first_order
    found = s.squared(0, "block_out", change)
    expected = []
    for rows, batch in zip(change.split([2, 3]), ids, strict=True):
        step = 1e-4 / rows.norm()
        logits = [
            hooked_logits(model, batch, scale * rows[:, : batch.shape[1]])
            for scale in (step, -step)
        ]
        moved = (logits[0] - logits[1]) / (2 * step)
        p = hooked_logits(model, batch, torch.zeros(())).softmax(-1)
        variance = (p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2
        expected.append(variance.flatten())
    # The difference's own error is 1e-8 of the change; squares double it.
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=0)
    assert s.share(0, "block_out", 2 * change, change) == pytest.approx(2)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_fisher_needs_logits_of_the_tokens(family: str) -> None:
    model = transformer(family)
    update = equiv.Update.random(model, 1e-3, seed=0)
    s = setting("", model, update, None, None, as_norm("fisher"), 0)
    shift = s.shifts[0, "block_out"]
    with pytest.raises(equiv.UnsupportedModelError, match="euclidean"):
        s.squared(0, "block_out", shift.exact)


def hooked_logits(model: Any, ids: Tensor, change: Tensor) -> Tensor:
    """Logits with something added to the first block's output by a plain hook."""
    inner = model.model if hasattr(model, "model") else model.transformer
    block = inner.layers[0] if hasattr(inner, "layers") else inner.h[0]

    def add(module: Any, args: Any, out: Any) -> Any:
        return out + change if isinstance(out, Tensor) else (out[0] + change, *out[1:])

    handle = block.register_forward_hook(add)
    try:
        with torch.no_grad(), KeepFloat64():
            return model(ids).logits
    finally:
        handle.remove()
