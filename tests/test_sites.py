"""Every family's sites are where `sites.py` says, on real modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import witness
from torch import nn

import equiv
from equiv.model.known_families import TABLE
from equiv.model.known_pairs import PAIRS
from equiv.model.sites import FLOW
from equiv.steering.forms.vector import Vector
from equiv.testing.models import EVERY_FAMILY, FAMILIES, transformer

SITES = tuple(site for site in FLOW if site != "cross_out")  # of one stack
IDS = torch.tensor([[3, 9, 4, 11, 5]])


def test_every_known_family_has_a_model_here() -> None:
    assert sorted(TABLE | PAIRS) == sorted(EVERY_FAMILY)


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
        model,
        equiv.Update.random(model, 0.1, seed=0),
        IDS,
        sites=SITES,
        dtype=torch.float64,
    )
    path, _ = witness.PLACES[family]
    for layer, block in enumerate(model.get_submodule(path)):
        x = block_input(model, layer)
        at = {site: shifts[layer, site].base for site in SITES}
        if family == "bert":
            middle = block.attention.output.LayerNorm(x + at["attn_out"])
            out = block.output.LayerNorm(middle + at["mlp_out"])
            assert_close(at["mlp_in"], middle)
            assert_close(block.intermediate(middle), at["mlp_hidden"])
            assert_close(block.output.dense(at["mlp_hidden"]), at["mlp_out"])
            assert_close(block.attention.output.dense(at["attn_heads"]), at["attn_out"])
        else:
            norm, attention, after, last = parts(family, block)
            middle = x + at["attn_out"]
            out = middle + at["mlp_out"]
            assert_close(at["mlp_in"], norm(middle))
            assert_close(after(block.mlp(at["mlp_in"])), at["mlp_out"])
            assert_close(after(last(at["mlp_hidden"])), at["mlp_out"])
            assert_close(attention(at["attn_heads"]), at["attn_out"])
        assert_close(at["resid_mid"], middle)
        assert_close(at["block_out"], out)


def parts(family: str, block: Any) -> tuple[Callable[..., Any], ...]:
    """(norm before the MLP, heads → attn_out, what follows the MLP, its last layer)."""

    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    if family == "gpt2":
        return block.ln_2, block.attn.c_proj, same, block.mlp.c_proj
    project, last = block.self_attn.o_proj, block.mlp.down_proj
    if family not in ("gemma2", "olmo2"):
        return block.post_attention_layernorm, project, same, last
    norm = block.pre_feedforward_layernorm if family == "gemma2" else same
    return (
        norm,
        lambda x: block.post_attention_layernorm(project(x)),
        block.post_feedforward_layernorm,
        last,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # 1e-6, not 1e-10: outside the library the families' norms round to float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_known_vector_lands_at_its_site(family: str, site: str) -> None:
    model = transformer(family, seed=2)
    before = run(model)
    width = before[1, site].shape[-1]
    v = torch.randn(width, generator=torch.Generator().manual_seed(0)).double()
    with equiv.steer(model, {(1, site): Vector(v)}):
        # Hooks added later run later: these see the steered activations.
        after = run(model)
    if family != "bert" or site not in ("attn_out", "mlp_out"):
        assert_close(after[1, site] - before[1, site], v.expand(1, 5, width))
    for site_below in SITES:  # nothing below the site moved
        assert torch.equal(after[0, site_below], before[0, site_below])
    if site in ("attn_out", "resid_mid", "mlp_out") and family != "bert":
        # What is added at a residual write arrives in the stream after it.
        skip = (after[1, "block_out"] - before[1, "block_out"]) - (
            after[1, "mlp_out"] - before[1, "mlp_out"]
        )
        expected = torch.zeros_like(v) if site == "mlp_out" else v
        assert_close(skip, expected.expand(1, 5, 16))
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
    widths = {"mlp_hidden": 24}
    steering = {(0, site): Vector(torch.ones(widths.get(site, 16))) for site in SITES}
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("read", "write"),
    [
        ("resid_mid", "block_out"),
        ("resid_mid", "resid_mid"),
        ("attn_heads", "attn_out"),
        ("mlp_hidden", "mlp_out"),
        ("mlp_in", "block_out"),
        ("attn_out", "resid_mid"),
    ],
)
@torch.no_grad()
def test_a_steer_reads_one_site_and_writes_another(
    family: str, read: str, write: str
) -> None:
    """Against the activations of an unsteered run, written down by plain hooks."""
    model = transformer(family, seed=5)
    before = run(model)
    d, e = (before[1, site].shape[-1] for site in (read, write))
    source = torch.Generator().manual_seed(1)
    weight = torch.randn(e, d, generator=source).double() / d**0.5
    site = equiv.Site(write, read=read)
    with equiv.steer(model, {(1, site): lambda x: torch.tanh(x @ weight.T)}):  # type: ignore[dict-item]
        after = run(model)
    expected = torch.tanh(before[1, read] @ weight.T)
    at = write
    if family == "bert" and write == "attn_out":
        at = "attn_heads"  # the witness reads before the hook: compare what comes of it
        assert torch.equal(after[1, at], before[1, at])
        expected_mid = model.bert.encoder.layer[1].attention.output.LayerNorm(
            before[1, "attn_out"] + expected + block_input(model, 1)
        )
        assert_close(after[1, "resid_mid"], expected_mid)
    elif family == "bert" and write == "mlp_out":
        expected_out = model.bert.encoder.layer[1].output.LayerNorm(
            before[1, "mlp_out"] + expected + before[1, "resid_mid"]
        )
        assert_close(after[1, "block_out"], expected_out)
    else:
        assert_close(after[1, at] - before[1, at], expected)
    assert float((after["logits"] - before["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "olmo2", "bert"])
@torch.no_grad()
def test_the_engine_steers_as_the_live_model_does(family: str) -> None:
    """`fit_sequential` runs steered streams by itself: its last layer must agree."""
    model = transformer(family, seed=6)
    update = equiv.Update.random(model, 0.1, seed=0)
    for site in ("resid_mid->block_out", "resid_mid", "attn_heads", "mlp_hidden"):
        fitted = equiv.fit_sequential(
            model, update, IDS, site=site, rank=2, dtype=torch.float64
        )
        assert set(fitted) == {(0, site), (1, site)}
        with equiv.steer(model, {(0, site): fitted[0, site]}):
            live = run(model)
        read, _, write = site.rpartition("->")
        read = read or write
        tuned = witness.tuned_activations(model, update, {"input_ids": IDS})
        target = "block_out" if write == "block_out" else write
        missing = (tuned[1, target] - live[1, target])[0]
        own = equiv.fit(live[1, read][0], missing, rank=2, first_position=True)
        x = live[1, read]
        torch.testing.assert_close(fitted[1, site](x), own(x), rtol=1e-4, atol=1e-4)


def test_flow_is_refused_backwards() -> None:
    model = transformer("llama")
    with (
        pytest.raises(equiv.SiteError, match="computes attn_out first"),
        equiv.steer(model, {(0, "block_out->attn_out"): Vector(torch.ones(16))}),
    ):
        pass


@torch.no_grad()
def test_names_of_transformerlens_are_known() -> None:
    model = transformer("llama", seed=7)
    v = Vector(torch.ones(16))
    with equiv.steer(model, {"blocks.1.hook_resid_mid": v}):  # type: ignore[dict-item]
        named = model(input_ids=IDS).logits
    with equiv.steer(model, {(1, "resid_mid"): v}):
        assert torch.equal(named, model(input_ids=IDS).logits)
