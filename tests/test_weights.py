"""Steering as a weight edit: exact where it is one, refused where it is none."""

import copy
from typing import Any

import exact
import pytest
import torch
import witness
from exact import F64, NORMED, block, changed, draw, logits, steered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equiv
from equiv.model.sites import FLOW
from equiv.testing.models import FAMILIES, transformer
from equiv.testing.strategies import seeds

FORMS = ("vector", "constant", *exact.LINEAR, "silu")
SITES = [site for site in FLOW if site != "cross_out"]
PAIRS = [(r, w) for i, r in enumerate(SITES) for w in SITES[i:]]


def key(layer: int, read: str, write: str) -> tuple[int, str]:
    return layer, equiv.Site(write, read=read).key


def fits(form: str, read: str, write: str) -> bool:
    """LoReFT and Heads write the width that they read."""
    same = exact.width(None, read) == exact.width(None, write)
    return same or form not in ("loreft", "heads")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_steer_is_exact_or_refused(family: str) -> None:
    """Every form at every pair of sites, against the table in `exact`."""
    model = transformer(family, seed=1)
    base, met = logits(model), set()
    for number, (read, write) in enumerate(PAIRS):
        for form in FORMS:
            if not fits(form, read, write):
                continue
            d, e = exact.width(model, read), exact.width(model, write)
            steering = {key(1, read, write): draw(form, d, e, 2, number)}
            if not exact.is_exact(family, form, read, write):
                with pytest.raises(equiv.NoExactFormError, match="is no weight edit: "):
                    equiv.to_weights(steering, model)
                continue
            expected = steered(model, steering)
            assert float((expected - base).abs().max()) > 1e-3
            exact.close(
                logits(equiv.to_weights(steering, model).apply(model)), expected
            )
            met.add(form)
    assert met == set(FORMS) - {"silu"}


@st.composite
def sets(source: Any, families: tuple[str, ...] = FAMILIES) -> tuple[str, int, dict]:
    """A family, a seed and several steers in both layers, most of them exact."""
    family, seed = source(st.sampled_from(families)), source(seeds())
    steering: dict[tuple[int, str], equiv.Steering] = {}
    allowed = [
        (form, read, write)
        for form in FORMS
        for read, write in PAIRS
        if fits(form, read, write) and exact.is_exact(family, form, read, write)
    ]
    for number in range(source(st.integers(1, 6))):
        form, read, write = source(st.sampled_from(allowed))
        d, e = exact.width(None, read), exact.width(None, write)
        rank = source(st.integers(1, 4))
        at = key(source(st.integers(0, 1)), read, write)
        steering[at] = draw(form, d, e, rank, seed + number)
    return family, seed, steering


def clash(steering: dict[Any, equiv.Steering], layer: int) -> bool:
    """What is read before it is scaled, in BERT: the one pair that is refused."""
    scaled = isinstance(steering.get((layer, "resid_mid")), equiv.Heads)
    reader = steering.get((layer, "resid_mid->mlp_in"))
    fixed = (type(None), equiv.Vector, equiv.LowRankMLP)
    linear = getattr(reader, "activation", "") == "identity"
    return scaled and (linear or not isinstance(reader, fixed))


@given(drawn=sets())
@settings(max_examples=100 * witness.SWEEP)
def test_steers_compose(drawn: tuple[str, int, dict]) -> None:
    """Any steers that are exact alone are exact together, in any order of sites."""
    family, seed, steering = drawn
    biased: Any = {"attention_bias": True, "mlp_bias": True} if seed % 2 else {}
    model = transformer(family, seed=seed % 100, **biased)
    if any(clash(steering, layer) for layer in (0, 1)):
        with pytest.raises(equiv.NoExactFormError, match="which another steer scales"):
            equiv.to_weights(steering, model)
        return
    edit = equiv.to_weights(steering, model)
    exact.close(logits(edit.apply(model)), steered(model, steering))


@given(drawn=sets(), extra=st.sampled_from(PAIRS), seed=seeds())
@settings(max_examples=40 * witness.SWEEP)
def test_one_steer_that_is_none_is_enough(
    drawn: tuple[str, int, dict], extra: tuple[str, str], seed: int
) -> None:
    family, _, steering = drawn
    d, e = (exact.width(None, site) for site in extra)
    at = key(0, *extra)
    wrong = {**steering, at: draw("silu", d, e, 2, seed)}
    with pytest.raises(equiv.NoExactFormError, match=rf"at \(0, '{at[1]}'\).*silu"):
        equiv.to_weights(wrong, transformer(family))


# ---- what is edited, by formulas written out


def test_a_map_of_the_mlps_input_is_an_edit_of_gate_and_up() -> None:
    """Claim 3: (W_g, W_u) → (W_g, W_u)(I + M), with biases W_g v and W_u v."""
    model = transformer("llama", seed=2, mlp_bias=True)
    steering = draw("affine", 16, 16, 3, 0)
    assert isinstance(steering, equiv.Affine) and steering.bias is not None
    edited = equiv.to_weights({(0, "mlp_in"): steering}, model).apply(model)
    m = torch.eye(16, dtype=F64) + steering.up @ steering.down
    for name in ("gate_proj", "up_proj"):
        old, new = (getattr(block(x, 0).mlp, name) for x in (model, edited))
        witness.close(new.weight, old.weight @ m)
        witness.close(new.bias, old.bias + old.weight @ steering.bias)
    assert changed(model, edited) == {
        f"model.layers.0.mlp.{name}.{part}"
        for name in ("gate_proj", "up_proj")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_loreft_after_the_mlp_needs_the_term_of_the_bias(family: str) -> None:
    """Claim 4: W → W + Rᵀ(V − R)W; the bias b becomes b + Rᵀ(V − R) b + Rᵀ c.

    The paper's formula has no term with b. On a model that has biases it is wrong.
    """
    biased: Any = {"mlp_bias": True} if family == "llama" else {}
    model = transformer(family, seed=3, **biased)
    steering = draw("loreft", 16, 16, 3, 1)
    assert isinstance(steering, equiv.LoReFT)
    edited = equiv.to_weights({(0, "mlp_out"): steering}, model).apply(model)
    inner = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense"}
    old, new = (block(x, 0).get_submodule(inner[family]) for x in (model, edited))
    turn = (lambda w: w.T) if family == "gpt2" else (lambda w: w)
    rotation = steering.rotation
    a = rotation.T @ (steering.weight - rotation)
    witness.close(turn(new.weight), turn(old.weight) + a @ turn(old.weight))
    witness.close(new.bias, old.bias + a @ old.bias + rotation.T @ steering.bias)
    difference = torch.linalg.matrix_rank(turn(new.weight - old.weight), atol=1e-10)
    assert int(difference) == 3
    expected = steered(model, {(0, "mlp_out"): steering})
    exact.close(logits(edited), expected)
    new.bias.data = old.bias.data + rotation.T @ steering.bias  # the paper's
    wrong = float(
        (logits(edited) - expected).norm() / (expected - logits(model)).norm()
    )
    assert wrong > 0.01


def test_offset_and_scale_of_a_head_are_edits_of_its_columns() -> None:
    """Claim 5: W⁽ʰ⁾ v in the bias, W⁽ʰ⁾ diag(1 + m) in the weight; no other head's."""
    model = transformer("llama", seed=4, attention_bias=True)
    g = torch.Generator().manual_seed(0)
    offset, scale = (torch.randn(2, 8, generator=g, dtype=F64) for _ in range(2))
    offset[0], scale[0] = 0, 0
    steering = {(1, "attn_heads"): equiv.Heads(offset, scale)}
    edited = equiv.to_weights(steering, model).apply(model)
    old, new = (block(x, 1).self_attn.o_proj for x in (model, edited))
    assert torch.equal(new.weight[:, :8], old.weight[:, :8])
    witness.close(new.weight[:, 8:], old.weight[:, 8:] @ torch.diag(1 + scale[1]))
    witness.close(new.bias, old.bias + old.weight[:, 8:] @ offset[1])


BIASES = {
    "llama": ("self_attn.o_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "attn.c_proj", "mlp.c_proj", "mlp.c_proj"),
    "bert": (
        "attention.output.dense",
        "attention.output.LayerNorm",
        "output.dense",
        "output.LayerNorm",
    ),
}


@pytest.mark.parametrize("family", BIASES)
def test_a_vector_is_one_bias(family: str) -> None:
    """Claim 5, and which bias it is."""
    model = transformer(family, seed=5)
    sites = ("attn_out", "resid_mid", "mlp_out", "block_out")
    path, _ = witness.PLACES[family]
    for site, module in zip(sites, BIASES[family], strict=True):
        v = draw("vector", 16, 16, 1, 7)
        assert isinstance(v, equiv.Vector)
        edited = equiv.to_weights({(1, site): v}, model).apply(model)
        name = f"{path}.1.{module}.bias"
        assert changed(model, edited) == {name}
        old = dict(model.named_parameters()).get(name, torch.zeros(16))
        witness.close(edited.get_parameter(name), old + v.vector)


@pytest.mark.parametrize("family", NORMED)
def test_behind_a_norm_a_vector_is_no_bias(family: str) -> None:
    """The other half of claim 5: the same vector as a bias does something else."""
    model = transformer(family, seed=6)
    v = draw("vector", 16, 16, 1, 3)
    assert isinstance(v, equiv.Vector)
    expected = steered(model, {(0, "mlp_out"): v})
    edited = copy.deepcopy(model)
    block(edited, 0).mlp.down_proj.bias = nn.Parameter(v.vector)
    assert float((logits(edited) - expected).abs().max()) > 0.01


# ---- refusals

AFFINE = draw("affine", 16, 16, 2, 0)
VECTOR = draw("vector", 16, 16, 1, 0)
WIDE = draw("linear", 16, 24, 2, 0)


class Other(equiv.Vector):
    """A child of a form may compute anything."""

    def __call__(self, h: Tensor) -> Tensor:
        return h.square()


OVERWRITE, OFFSET = equiv.Overwrite(torch.ones(16)), equiv.Offset(torch.ones(16))
SILU, CUSTOM = draw("silu", 16, 16, 2, 0), equiv.Custom(nn.Linear(16, 16))
REASONS: list[tuple[str, str, Any, str]] = [
    ("llama", "mlp_out", SILU, "activation silu is not affine in what it reads"),
    ("llama", "block_out", AFFINE, "on block_out.*mlp_hidden or mlp_out only, or"),
    ("llama", "resid_mid", AFFINE, "on resid_mid.*attn_heads or attn_out only, or"),
    ("llama", "resid_mid->mlp_in", AFFINE, "on resid_mid.*depends on mlp_in only"),
    ("gpt2", "attn_heads->mlp_out", AFFINE, "on attn_heads.*mlp_hidden or mlp_out"),
    ("gpt2", "attn_out->mlp_in", AFFINE, "on attn_out.*depends on mlp_in only, or"),
    ("gpt2", "mlp_in->mlp_hidden", WIDE, "on mlp_in.*depends on mlp_hidden only"),
    ("bert", "block_out", AFFINE, "`output.LayerNorm`, which makes block_out, can"),
    ("bert", "attn_out->resid_mid", AFFINE, r"`attention\.output\.LayerNorm`, whi"),
    ("gemma2", "mlp_out", VECTOR, "a norm stands between `mlp.down_proj` and the"),
    ("gemma2", "attn_out", AFFINE, "a norm stands between `self_attn.o_proj` and"),
    ("olmo2", "block_out", VECTOR, "no edit of the projection; steer mlp_hidden "),
    ("olmo2", "resid_mid", VECTOR, "no edit of the projection; steer attn_heads "),
    ("llama", "mlp_out", OVERWRITE, "an Overwrite gives every token a shift of it"),
    ("llama", "mlp_out", OFFSET, "an Offset gives every token a shift of its own"),
    ("llama", "mlp_out", CUSTOM, "Custom may be any function; expected Vector, Af"),
    ("llama", "mlp_out", Other(torch.ones(16)), "Other may be any function; expec"),
    ("llama", "mlp_out", torch.tanh, "may be any function; expected Vector, Affin"),
]


@pytest.mark.parametrize(("family", "site", "steering", "words"), REASONS)
def test_a_refusal_gives_the_reason(
    family: str, site: str, steering: Any, words: str
) -> None:
    start = rf"The steering at \(1, '{site}'\) is no weight edit: .*"
    with pytest.raises(equiv.NoExactFormError, match=start + words):
        equiv.to_weights(
            {(0, "mlp_in"): VECTOR, (1, site): steering}, transformer(family)
        )


def test_what_another_steer_scales_is_refused() -> None:
    """In BERT the MLP reads the stream: what it was before is not seen any more."""
    model = transformer("bert", seed=14)
    steering = {(0, "resid_mid->mlp_in"): AFFINE, (0, "resid_mid"): VECTOR}
    edited = equiv.to_weights(steering, model).apply(model)
    exact.close(logits(edited), steered(model, steering))
    steering[0, "resid_mid"] = draw("heads", 16, 16, 1, 0)
    with pytest.raises(equiv.NoExactFormError, match="which another steer scales; re"):
        equiv.to_weights(steering, model)


@pytest.mark.parametrize("positions", ["last", "prompt", "generated", "first 3"])
def test_positions_are_no_matter_of_weights(positions: str) -> None:
    model = transformer("llama")
    steering = equiv.SteeringSet({(0, "mlp_out"): VECTOR}, positions)
    with pytest.raises(equiv.NoExactFormError, match=f"for positions '{positions}'"):
        equiv.to_weights(steering, model)
    every = equiv.SteeringSet({(0, "mlp_out"): VECTOR}, "prompt + generated")
    exact.close(
        logits(equiv.to_weights(every, model).apply(model)), steered(model, every)
    )


def test_models_that_cannot_be_edited_are_refused() -> None:
    steering = {(0, "mlp_out"): VECTOR}
    with pytest.raises(
        equiv.UnsupportedModelError, match="of a known family, got a Lin"
    ):
        equiv.to_weights(steering, nn.Linear(16, 16))
    unknown = transformer("llama")
    unknown.config.model_type = "rwkv"
    with pytest.raises(equiv.UnsupportedModelError, match="divides its own"):
        equiv.to_weights(steering, unknown)
    shared = transformer("llama")
    shared.model.layers[0].mlp.down_proj.weight = shared.model.layers[
        1
    ].mlp.down_proj.weight
    with pytest.raises(equiv.UnsupportedModelError, match="shares its parameters with"):
        equiv.to_weights(steering, shared)
    odd = transformer("llama")
    odd.model.layers[0].mlp.down_proj = Twice(24, 16)
    with pytest.raises(equiv.UnsupportedModelError, match=r"plain Linear.*got a Twice"):
        equiv.to_weights(steering, odd)


class Twice(nn.Linear):
    """A child of a layer may use its weight in another way."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_wrong_calls_are_refused() -> None:
    model = transformer("llama")
    for site, wrong in [
        ("mlp_out", equiv.Vector(torch.ones(24))),
        ("mlp_out", equiv.Vector(torch.ones(1, 16))),
        ("mlp_out", WIDE),
        ("mlp_hidden", AFFINE),
        ("mlp_in->mlp_out", draw("linear", 24, 16, 2, 0)),
        ("mlp_hidden->mlp_out", draw("heads", 24, 24, 2, 0)),
    ]:
        words = r"at \(0, .* to read width \d+ and write width \d+, got `\w+` of shape"
        with pytest.raises(equiv.ArgumentError, match=words):
            equiv.to_weights({(0, site): wrong}, model)
    with pytest.raises(equiv.ArgumentError, match="NaN or infinite entries in `bias`"):
        equiv.to_weights(
            {(0, "mlp_out"): equiv.Vector(torch.full((16,), torch.nan))}, model
        )
    for at in [(7, "mlp_out"), (0, "nowhere"), (0, "block_out->attn_out")]:
        with pytest.raises(equiv.SiteError):
            equiv.to_weights({at: VECTOR}, model)
    with pytest.raises(equiv.ArgumentError, match="to be a mapping"):
        equiv.to_weights([VECTOR], model)  # type: ignore[arg-type]
