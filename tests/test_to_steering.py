"""A weight update as steering: exact where it is one, refused where it is none."""

import copy
from collections.abc import Callable
from typing import Any

import exact
import pytest
import torch
import witness
from exact import F64, NORMED, steered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv.testing.models import FAMILIES, transformer
from equiv.testing.strategies import seeds
from equiv.update.low_rank import Delta, LowRank

BIASED: Any = {"attention_bias": True, "mlp_bias": True}
# Family → module path of each part of a block, from the block.
_LLAMA = {
    "attention": "self_attn.o_proj",
    "mlp": "mlp.down_proj",
    "readers": ("mlp.gate_proj", "mlp.up_proj"),
    "values": "self_attn.v_proj",
}
PARTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", *NORMED), _LLAMA),
    "gpt2": {
        "attention": "attn.c_proj",
        "mlp": "mlp.c_proj",
        "readers": ("mlp.c_fc",),
        "values": "attn.c_attn",
    },
    "bert": {
        "attention": "attention.output.dense",
        "mlp": "output.dense",
        "readers": ("intermediate.dense",),
        "values": "attention.self.value",
        "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
    },
}


def tuned_logits(model: Any, deltas: dict[str, Delta]) -> Tensor:
    update = equiv.Update.from_dict(deltas)
    call = {"input_ids": exact.IDS}
    return witness.tuned_activations(model, update, call)["logits"]


def prefix(family: str, layer: int) -> str:
    return f"{witness.PLACES[family][0]}.{layer}"


def generator(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(*shape, generator=g, dtype=F64)


def low_rank(shape: torch.Size, rank: int, draw: Callable[..., Tensor]) -> LowRank:
    return LowRank(draw(shape[0], rank), draw(rank, shape[1]))


def of_part(
    model: Any, layer: int, part: str, rank: int, seed: int
) -> dict[str, Delta]:
    """Differences of one part of a block that are steering, all biases it has."""
    family, draw = model.config.model_type, generator(seed)
    own, start = dict(model.named_parameters()), prefix(family, layer)
    paths = PARTS[family][part]
    found: dict[str, Delta] = {}
    if part in ("attention", "mlp"):
        name = f"{start}.{paths}"
        low = low_rank(own[f"{name}.weight"].shape, rank, draw)
        found[f"{name}.weight"] = low if seed % 2 else low.dense()
        if f"{name}.bias" in own:
            found[f"{name}.bias"] = draw(16)
    if part == "values" and f"{start}.{paths}.bias" in own:
        bias = draw(*own[f"{start}.{paths}.bias"].shape)
        if family == "gpt2":
            bias[: 2 * 16] = 0
        found[f"{start}.{paths}.bias"] = bias
    if part == "readers":
        down, up, v = draw(rank, 16), draw(16, rank), draw(16)
        for path in paths:
            weight = own[f"{start}.{path}.weight"].detach()
            linear = weight.T if family == "gpt2" else weight
            low = LowRank(linear @ up, down)
            if family == "gpt2":
                low = LowRank(low.right.T, low.left.T)
            found[f"{start}.{path}.weight"] = low if seed % 2 else low.dense()
            if f"{start}.{path}.bias" in own:
                found[f"{start}.{path}.bias"] = linear @ v
    if part == "norms":
        for path in paths:
            found[f"{start}.{path}.bias"] = draw(16)
            if seed % 2:
                found[f"{start}.{path}.weight"] = draw(16)
    return found


@st.composite
def updates(source: Any) -> tuple[str, Any, dict[str, Delta], int]:
    family, seed = source(st.sampled_from(FAMILIES)), source(seeds())
    model = transformer(family, seed=seed % 100, **(BIASED if seed % 3 else {}))
    found: dict[str, Delta] = {}
    rank = source(st.integers(1, 3))
    for number in range(source(st.integers(1, 5))):
        part = source(st.sampled_from(sorted(PARTS[family])))
        layer = source(st.integers(0, 1))
        found |= of_part(model, layer, part, rank, seed + number)
    return family, model, found, rank


@given(drawn=updates())
@settings(max_examples=80 * witness.SWEEP)
def test_the_steering_is_the_update(drawn: tuple[str, Any, Any, int]) -> None:
    """Any parts together; grouped queries, transposed weights, biases, norms."""
    _, model, deltas, rank = drawn
    if not deltas:
        return
    steering = equiv.to_steering(equiv.Update.from_dict(deltas), model)
    exact.close(steered(model, steering), tuned_logits(model, deltas))
    for steer in steering.values():
        if isinstance(steer, equiv.Affine):
            assert steer.rank == rank  # dense differences too


@given(drawn=updates())
@settings(max_examples=40 * witness.SWEEP)
def test_there_and_back(drawn: tuple[str, Any, Any, int]) -> None:
    """Update → steering → update, and steering → update → steering."""
    family, model, deltas, _ = drawn
    if not deltas:
        return
    steering = equiv.to_steering(deltas, model)
    edit = equiv.to_weights(steering, model)
    again = equiv.to_steering(edit, model)
    expected = tuned_logits(model, deltas)
    exact.close(steered(model, again), expected)
    exact.close(exact.logits(edit.apply(model)), expected)
    if not any(PARTS[family]["values"] in name for name in deltas):
        found = witness.dense(equiv.Update.from_dict(edit.deltas))
        for name, delta in witness.dense(equiv.Update.from_dict(deltas)).items():
            size = float(delta.norm())
            assert float((found.pop(name) - delta).norm()) <= 1e-9 * size, name
        assert not any(float(rest.norm()) > 1e-9 for rest in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_steering_or_is_refused(family: str) -> None:
    """A difference of each parameter alone, against a table of what is steering."""
    model = transformer(family, seed=1, **BIASED)
    parts = PARTS[family]
    last = [parts["attention"], parts["mlp"]]
    exact_ones = [f"{path}.{kind}" for path in last for kind in ("weight", "bias")]
    exact_ones += [
        f"{path}.{k}" for path in parts.get("norms", ()) for k in ("weight", "bias")
    ]
    exact_ones.append(f"{parts['values']}.bias")
    draw, met = generator(3), set()
    for name, parameter in model.named_parameters():
        delta = draw(*parameter.shape)
        path = name.removeprefix(prefix(family, 0) + ".").removeprefix(
            prefix(family, 1) + "."
        )
        if path == "attn.c_attn.bias":
            delta[:32] = 0
        if path not in exact_ones:
            words = (
                rf"The update of `{name}` has no exact|gate_proj` and .*up_proj|c_fc|in"
            )
            with pytest.raises(equiv.NoExactFormError, match=words):
                equiv.to_steering({name: delta}, model)
            continue
        met.add(path)
        steering = equiv.to_steering({name: delta}, model)
        exact.close(steered(model, steering), tuned_logits(model, {name: delta}))
    everywhere = set(dict(model.named_parameters()))
    assert met == {p for p in exact_ones if f"{prefix(family, 1)}.{p}" in everywhere}


# ---- what it looks like


def test_factors_stay_factors() -> None:
    model = transformer("llama", seed=2)
    draw = generator(0)
    down, up = draw(3, 24), draw(16, 3)
    name = "model.layers.0.mlp.down_proj.weight"
    found = equiv.to_steering({name: LowRank(up, down)}, model)
    assert list(found) == [(0, "mlp_hidden->mlp_out")]
    steer = found[0, "mlp_hidden->mlp_out"]
    assert isinstance(steer, equiv.Affine)
    assert steer.down is down and steer.up is up and steer.bias is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_difference_of_full_rank_is_one_matrix(family: str) -> None:
    model = transformer(family, seed=3)
    name = f"{prefix(family, 1)}.{PARTS[family]['mlp']}.weight"
    delta = generator(1)(*model.get_parameter(name).shape)
    found = equiv.to_steering({name: delta}, model)
    steer = found[1, "mlp_hidden->mlp_out"]
    assert isinstance(steer, equiv.Affine) and steer.rank == 16
    assert steer.num_parameters == 16 * 24
    linear = delta.T if family == "gpt2" else delta
    assert torch.equal(steer.up @ steer.down, linear)


def test_a_bias_of_the_values_once_per_query_head() -> None:
    """Claim 43: an attention output vector, W_o applied to the bias of its group."""
    model = transformer("llama", seed=4, **BIASED)  # two query heads, one of values
    v = generator(2)(8)
    found = equiv.to_steering({"model.layers.0.self_attn.v_proj.bias": v}, model)
    steer = found[0, "attn_out"]
    assert isinstance(steer, equiv.Vector)
    weight = model.model.layers[0].self_attn.o_proj.weight
    witness.close(steer.vector, weight @ torch.cat([v, v]))
    four: Any = {**BIASED, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformer("llama", seed=4, **four)
    v = generator(2)(16)
    deltas: dict[str, Delta] = {"model.layers.0.self_attn.v_proj.bias": v}
    found = equiv.to_steering(deltas, model)
    exact.close(steered(model, found), tuned_logits(model, deltas))
    steer = found[0, "attn_out"]
    assert isinstance(steer, equiv.Vector)
    heads = torch.cat([v[:8], v[:8], v[8:], v[8:]])
    witness.close(steer.vector, model.model.layers[0].self_attn.o_proj.weight @ heads)


def test_a_bias_that_the_base_does_not_have_is_a_vector() -> None:
    model = transformer("llama", seed=5)
    v = generator(0)(16)
    found = equiv.to_steering({"model.layers.1.mlp.down_proj.bias": v}, model)
    assert list(found) == [(1, "mlp_out")]
    tuned = equiv.to_weights(found, model).apply(model)
    for source in (tuned, equiv.to_weights(found, model)):
        again = equiv.to_steering(source, model)
        assert list(again) == [(1, "mlp_out")]
        steer = again[1, "mlp_out"]
        assert isinstance(steer, equiv.Vector) and torch.equal(steer.vector, v)


def test_it_says_where_it_comes_from() -> None:
    model = transformer("gpt2", seed=6)
    update = equiv.Update.from_dict(
        {"transformer.h.0.mlp.c_proj.bias": torch.ones(16)}, source="by hand"
    )
    found = equiv.to_steering(update, model)
    origin = found.about["update"]
    assert isinstance(origin, dict) and origin["source"] == "by hand"
    assert found.positions == "all"


# ---- what rounding allows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tuned_model_in_half_precision_is_steering_to_its_rounding(
    dtype: torch.dtype,
) -> None:
    """Merged weights are rounded; the rank and the common map are still found."""
    model = transformer("llama", seed=7, dtype=dtype)
    draw = generator(5)
    steering = {
        (0, "mlp_in"): equiv.Affine(draw(2, 16), draw(16, 2)),
        (1, "mlp_hidden->mlp_out"): equiv.Affine(draw(3, 24), draw(16, 3)),
    }
    tuned = equiv.to_weights(steering, model).apply(model)
    found = equiv.to_steering(tuned, model)
    assert {key: steer.rank for key, steer in found.items()} == {  # type: ignore[attr-defined]
        (0, "mlp_in"): 2,
        (1, "mlp_hidden->mlp_out"): 3,
    }
    wide = copy.deepcopy(model).double()
    expected = steered(wide, steering)
    eps = torch.finfo(dtype).eps
    # Each entry of the weights was rounded, by eps/2 at most, and what comes of it
    # grows by the condition of the solve and on the way: 2⁷ times, measured 2⁰…2³.
    off = float((steered(wide, found) - expected).norm() / expected.norm())
    assert off <= 2**7 * eps / 2


def test_two_maps_are_no_common_map() -> None:
    model = transformer("llama", seed=8)
    draw = generator(6)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    own = dict(model.named_parameters())
    maps = {name: own[name].detach() @ draw(16, 2) for name in (gate, up)}
    down = draw(2, 16)
    wrong: list[dict[str, Delta]] = [
        {name: LowRank(left, down) for name, left in maps.items()},
        {name: left @ down for name, left in maps.items()},
        {gate: LowRank(maps[gate], down)},  # the other reader is left as it is
        {gate: LowRank(draw(24, 2), down), up: LowRank(draw(24, 2), draw(2, 16))},
    ]
    words = (
        r"gate_proj` and `model.layers.0.mlp.up_proj` has no exact.*no one linear map"
    )
    for deltas in wrong:
        with pytest.raises(equiv.NoExactFormError, match=words):
            equiv.to_steering(deltas, model)
    biased = transformer("llama", seed=8, **BIASED)
    name = "model.layers.0.mlp.up_proj.bias"
    with pytest.raises(
        equiv.NoExactFormError, match=r"no one vector at.*leaves 0\.\d+ of"
    ):
        equiv.to_steering({name: draw(24)}, biased)


@pytest.mark.parametrize("family", NORMED)
def test_behind_a_norm_only_what_the_projection_reaches(family: str) -> None:
    model = transformer(family, seed=9)
    projection = model.model.layers[0].mlp.down_proj
    projection.weight.data[3] = 0  # nothing that it is given comes out there
    name, draw = "model.layers.0.mlp.down_proj.weight", generator(7)
    delta = low_rank(projection.weight.shape, 2, draw)
    with pytest.raises(
        equiv.NoExactFormError, match=r"a norm follows.*through mlp_hidden"
    ):
        equiv.to_steering({name: delta}, model)
    with pytest.raises(
        equiv.NoExactFormError, match=r"down_proj.bias.*out of the projec"
    ):
        equiv.to_steering({name.replace("weight", "bias"): draw(16)}, model)
    inside = LowRank(delta.left.clone(), delta.right)
    inside.left[3] = 0
    found = equiv.to_steering({name: inside}, model)
    assert list(found) == [(0, "mlp_hidden")]
    exact.close(steered(model, found), tuned_logits(model, {name: inside}))


# ---- refusals

REFUSED = [
    (
        "llama",
        "model.layers.0.self_attn.q_proj.weight",
        "before attention mixes the tok",
    ),
    (
        "llama",
        "model.layers.1.self_attn.v_proj.weight",
        "before attention mixes the tok",
    ),
    (
        "qwen2",
        "model.layers.1.self_attn.k_proj.bias",
        "a steer is given one token at a",
    ),
    (
        "llama",
        "model.layers.0.input_layernorm.weight",
        "of the norms only those that en",
    ),
    ("olmo2", "model.layers.0.post_feedforward_layernorm.weight", "of the norms only"),
    ("gpt2", "transformer.h.0.ln_2.bias", "of the norms only those that end the sum"),
    ("gpt2", "transformer.h.0.attn.c_attn.bias", "query or key part changes what the"),
    (
        "llama",
        "model.embed_tokens.weight",
        "outside the blocks, and so before or after",
    ),
    ("llama", "lm_head.weight", "outside the blocks, and so before or after all sites"),
    (
        "bert",
        "bert.embeddings.LayerNorm.bias",
        "outside the blocks, and so before or a",
    ),
]


@pytest.mark.parametrize(("family", "name", "words"), REFUSED)
def test_a_refusal_names_the_parameter_and_the_reason(
    family: str, name: str, words: str
) -> None:
    model = transformer(family, seed=10)
    start = prefix(family, 1)
    fine = f"{start}.{PARTS[family]['mlp']}.weight"
    own, draw = dict(model.named_parameters()), generator(8)
    deltas = {n: draw(*own[n].shape) for n in (fine, name)}
    with pytest.raises(
        equiv.NoExactFormError, match=rf"of `{name}` has no exact.*{words}"
    ):
        equiv.to_steering(deltas, model)


def test_a_gain_of_zero_cannot_be_scaled() -> None:
    model = transformer("bert", seed=11)
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.weight.data[2] = 0
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    with pytest.raises(equiv.NoExactFormError, match="nothing is left to be scaled"):
        equiv.to_steering({name: torch.ones(16)}, model)
    delta = torch.full((16,), -0.5, dtype=F64)
    delta[2] = 0
    found = equiv.to_steering({name: delta}, model)
    exact.close(steered(model, found), tuned_logits(model, {name: delta}))


def test_wrong_calls_are_refused() -> None:
    model = transformer("llama", seed=12)
    with pytest.raises(equiv.UnsupportedModelError, match="of a known family"):
        equiv.to_steering({"weight": torch.ones(2, 2)}, torch.nn.Linear(2, 2))
    with pytest.raises(equiv.UpdateMismatchError, match=r"does not have.*Did you mean"):
        equiv.to_steering({"model.layers.0.mlp.down.weight": torch.ones(16, 24)}, model)
    with pytest.raises(
        equiv.UpdateMismatchError, match=r"of shape \(24, 16\); the model"
    ):
        equiv.to_steering(
            {"model.layers.0.mlp.down_proj.weight": torch.ones(24, 16)}, model
        )
    with pytest.raises(
        equiv.UpdateMismatchError, match=r"of shape \(3,\).* expects \(16,"
    ):
        equiv.to_steering({"model.layers.0.mlp.down_proj.bias": torch.ones(3)}, model)
    with pytest.raises(equiv.UpdateError, match="Expected `delta_w`"):
        equiv.to_steering(3, model)
    with pytest.raises(equiv.UpdateError, match="same object"):
        equiv.to_steering(model, model)
    shared = transformer("llama", seed=12)
    layers = shared.model.layers
    layers[0].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with pytest.raises(equiv.UnsupportedModelError, match="shares its parameters with"):
        equiv.to_steering(
            {"model.layers.0.mlp.down_proj.weight": torch.ones(16, 24)}, shared
        )
