"""Every family's sites are where `sites.py` says, on real modules."""

import copy

import pytest
import torch
import witness
from torch import nn

import equiv
from equiv.model.families import FAMILIES as KNOWN
from equiv.steering.forms import Vector
from equiv.testing.models import FAMILIES, transformer

SITES = ("attn_out", "mlp_in", "mlp_out", "block_out")
IDS = torch.tensor([[3, 9, 4, 11, 5]])


def test_every_known_family_has_a_model_here() -> None:
    assert sorted(KNOWN) == sorted(FAMILIES)


def run(model: nn.Module) -> dict:
    return witness.activations(model, witness.parameters(model), {"input_ids": IDS})


def block_input(model: nn.Module, layer: int) -> torch.Tensor:
    path, _ = witness.PLACES[model.config.model_type]  # type: ignore[union-attr]
    block = model.get_submodule(path)[layer]  # type: ignore[index]
    seen = []
    handle = block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    run(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_residual_stream_adds_up(family: str) -> None:
    """`attn_out` and `mlp_out` are what is added, `block_out` is what comes of it."""
    model = transformer(family, seed=1)
    shifts = equiv.shifts(
        model, equiv.Update.random(model, 0.1, seed=0), IDS, dtype=torch.float64
    )
    path, _ = witness.PLACES[family]
    for layer, block in enumerate(model.get_submodule(path)):
        x = block_input(model, layer)
        at = {site: shifts[layer, site].base for site in SITES}
        if family == "bert":
            middle = block.attention.output.LayerNorm(x + at["attn_out"])
            out = block.output.LayerNorm(middle + at["mlp_out"])
            assert_close(at["mlp_in"], middle)
            assert_close(block.output.dense(block.intermediate(middle)), at["mlp_out"])
        else:
            norm = block.ln_2 if family == "gpt2" else block.post_attention_layernorm
            middle = x + at["attn_out"]
            out = middle + at["mlp_out"]
            assert_close(at["mlp_in"], norm(middle))
            assert_close(block.mlp(at["mlp_in"]), at["mlp_out"])
        assert_close(at["block_out"], out)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # 1e-6, not 1e-10: outside the library the families' norms round to float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_known_vector_lands_at_its_site(family: str, site: str) -> None:
    model = transformer(family, seed=2)
    before = run(model)
    v = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    with equiv.steer(model, {(1, site): Vector(v)}):
        # Hooks added later run later: these see the steered activations.
        after = run(model)
    seen_at = "block_out" if site == "block_out" else site
    if family != "bert" or site in ("mlp_in", "block_out"):
        assert_close(after[1, seen_at] - before[1, seen_at], v.expand(1, 5, 16))
    for site_below in SITES:  # nothing below the site moved
        assert torch.equal(after[0, site_below], before[0, site_below])
    if site in ("attn_out", "mlp_out") and family != "bert":
        # What is added at a residual write arrives in the stream after it.
        skip = (after[1, "block_out"] - before[1, "block_out"]) - (
            after[1, "mlp_out"] - before[1, "mlp_out"]
        )
        expected = v.expand(1, 5, 16) if site == "attn_out" else torch.zeros(1, 5, 16)
        assert_close(skip, expected.double())
    assert float((after["logits"] - before["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "bert"])
@torch.no_grad()
def test_steering_with_the_exact_shift_is_the_tuned_model(family: str) -> None:
    """The steer h → tuned h at the last block_out leaves only the head to differ."""
    model = transformer(family, seed=3)
    update = equiv.Update.random(model, 0.1, seed=0).restricted(layers=[0, 1])
    tuned = copy.deepcopy(model)
    for name, delta in witness.dense(update).items():
        tuned.get_parameter(name).data += delta
    s = equiv.shifts(model, update, IDS, dtype=torch.float64)[1, "block_out"]

    class Exact(Vector):
        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return s.exact

    with equiv.steer(model, {(1, "block_out"): Exact(torch.zeros(1))}):
        steered = model(input_ids=IDS).logits
    expected = tuned(input_ids=IDS).logits
    assert float((model(input_ids=IDS).logits - expected).abs().max()) > 1e-2
    assert_close(steered, expected)


@torch.no_grad()
def test_steering_leaves_nothing_behind() -> None:
    model = transformer("llama", seed=4)
    before = model(input_ids=IDS).logits
    steering = {(0, site): Vector(torch.ones(16)) for site in SITES}
    with pytest.raises(RuntimeError, match="mine"), equiv.steer(model, steering):
        assert not torch.equal(model(input_ids=IDS).logits, before)
        raise RuntimeError("mine")
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_steering_refuses_what_is_not_there() -> None:
    model = transformer("llama", seed=4)
    for key in [(7, "block_out"), (0, "resid"), (-1, "mlp_in")]:
        with (
            pytest.raises(equiv.SiteError, match="Expected a"),
            equiv.steer(model, {key: Vector(torch.ones(16))}),
        ):
            pass
        # The first, valid entry is taken off again when the second is refused.
        with (
            pytest.raises(equiv.SiteError),
            equiv.steer(
                model,
                {(0, "mlp_in"): Vector(torch.ones(16)), key: Vector(torch.ones(16))},
            ),
        ):
            pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_steering_under_generation() -> None:
    """Every token is steered, prompt and generated, with the cache as without it."""
    model = transformer("llama", seed=5)
    generator = torch.Generator().manual_seed(1)
    steering = {(0, "block_out"): Vector(3 * torch.randn(16, generator=generator))}
    call = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False}
    call["attention_mask"] = torch.ones_like(IDS)
    plain = model.generate(**call, pad_token_id=0)
    with equiv.steer(model, steering):
        cached = model.generate(**call, pad_token_id=0)
        again = model.generate(**call, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, again)
    assert not torch.equal(cached, plain)
