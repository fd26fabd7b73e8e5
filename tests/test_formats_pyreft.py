"""Folders of pyreft, against folders and formulas written down by hand."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    KEY,
    Bomb,
    D,
    H,
    R,
    affine,
    drawn,
    loreft,
    mlp,
    pickled,
    same_map,
    vector,
)
from torch import Tensor, nn
from torch.nn import functional

import equiv
from equiv.steering.formats import (
    pyreft,
    reft_states,
)


def bfloat16_safe(steer: equiv.LoReFT) -> equiv.LoReFT:
    return dataclasses.replace(
        steer,
        weight=steer.weight.bfloat16().float(),
        bias=steer.bias.bfloat16().float(),
    )


def test_a_pyreft_folder_is_as_pyreft_expects(tmp_path: Path) -> None:
    chosen = bfloat16_safe(loreft())
    steering = {(3, "block_out"): chosen, (4, "mlp_out"): vector()}
    pyreft.write(steering, tmp_path / "a", family="llama")
    keys = [
        "layer_3_comp_block_output_unit_pos_nunit_1#0",
        "layer_4_comp_mlp_output_unit_pos_nunit_1#0",
    ]
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {"config.json", *(f"intkey_{key}.bin" for key in keys)}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    none = [None] * 7
    assert config == {
        "intervention_constant_sources": [True, True],
        "intervention_dimensions": [D, D],
        "intervention_types": [
            "<class 'pyreft.interventions.LoreftIntervention'>",
            "<class 'pyvene.models.interventions.AdditionIntervention'>",
        ],
        "mode": "parallel",
        "representations": [
            [3, "block_output", "pos", 1, R, *none, None, None],
            [4, "mlp_output", "pos", 1, None, *none, True, None],
        ],
        "sorted_keys": keys,
    }
    first, second = (
        torch.load(tmp_path / "a" / f"intkey_{key}.bin", weights_only=True)
        for key in keys
    )
    assert torch.equal(first["weight"], chosen.weight)
    assert torch.equal(first["bias"], chosen.bias)
    assert torch.equal(first["rotate_layer"], chosen.rotation.T)
    assert torch.equal(second["source_representation"], vector().vector)


def test_affine_maps_come_back_as_the_same_maps(tmp_path: Path) -> None:
    steering = {(1, "block_out"): affine(), (2, "mlp_in"): affine(5, bias=False)}
    linear = equiv.LowRankMLP(
        drawn(R, D), drawn(D, R), drawn(R), drawn(D), activation="identity"
    )
    steering = {**steering, (3, "attn_out"): linear}
    with pytest.warns(UserWarning, match="bfloat16"):
        pyreft.write(steering, tmp_path / "a", family="llama")
    found = pyreft.read(tmp_path / "a", family="llama")
    for key, steer in steering.items():
        assert isinstance(found[key], equiv.LoReFT)
        same_map(found[key], steer(H))


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_rounding_of_pyreft_is_told(size: float, tmp_path: Path) -> None:
    """W is R plus the map, so a small map loses more of itself."""
    base = loreft()
    small = dataclasses.replace(
        base, weight=base.rotation + size * drawn(R, D), bias=size * base.bias
    )
    with pytest.warns(UserWarning, match="by up to") as caught:
        pyreft.write({(1, "block_out"): small}, tmp_path / "a")
    told = float(str(caught[0].message).split("up to ")[1].split(" of")[0])
    exact = torch.cat([small.weight - small.rotation, small.bias[:, None]], 1)
    rounded = bfloat16_safe(small)
    moved = torch.cat([rounded.weight - rounded.rotation, rounded.bias[:, None]], 1)
    assert told == pytest.approx(float((moved - exact).norm() / exact.norm()), rel=0.5)
    assert told > (0.1 if size < 1 else 1e-4)


SPELLINGS = {
    "layer_3_comp_block_output_unit_pos_nunit_1#0": (3, "block_out"),
    "layer.3.comp.block_output.unit.pos.nunit.1#0": (3, "block_out"),
    "layer_3_comp_mlp_output_unit_pos_nunit_1#0": (3, "mlp_out"),
    "layer.3.comp.attention_output.unit.pos.nunit.1#0": (3, "attn_out"),
    "layer_3_comp_mlp_input_unit_pos_nunit_1#2": (3, "mlp_in"),
    "layer_3_comp_block_input_unit_pos_nunit_1#0": (2, "block_out"),
    "comp_base_model_model_model_layers[2]_output_unit_pos_nunit_1#0": (2, "block_out"),
    "comp.base_model.model.model.layers[2].output.unit.pos.nunit.1#0": (2, "block_out"),
    "comp_model_layers[12]_mlp_output_unit_pos_nunit_1#0": (12, "mlp_out"),
    "comp.model.layers[2].self_attn.output.unit.pos.nunit.1#0": (2, "attn_out"),
    "comp_transformer_h[2]_attn_output_unit_pos_nunit_1#0": (2, "attn_out"),
    "comp_model_layers[2]_mlp_input_unit_pos_nunit_1#0": (2, "mlp_in"),
}
ELSEWHERE = {
    "layer_3_comp_head_query_output_unit_h.pos_nunit_1#0": "units of 'h.pos'",
    "layer_3_comp_block_output_unit_pos_nunit_2#0": "acts on 2 units",
    "layer_3_comp_mlp_activation_unit_pos_nunit_1#0": "'mlp_activation'",
    "layer_0_comp_block_input_unit_pos_nunit_1#0": "'block_input'",
    "comp_model_layers[2]_self_attn_q_proj_output_unit_pos_nunit_1#0": "q_proj",
    "comp_lm_head_output_unit_pos_nunit_1#0": "'lm_head_output'",
    "something": "no key of pyreft",
}


def reft_folder(path: Path, states: Mapping[str, Any], kinds: Any = "Loreft") -> Path:
    """A folder by hand."""
    path.mkdir()
    for key, state in states.items():
        (path / f"intkey_{key}.bin").write_bytes(pickled(state))
    kinds = [kinds] * len(states) if isinstance(kinds, str) else kinds
    config = {
        "intervention_types": [
            f"<class 'pyreft.interventions.{kind}Intervention'>" for kind in kinds
        ],
        "sorted_keys": list(states),
        "representations": [[0, "block_output", "pos", 1, 77]] * len(states),
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def state_of(steer: equiv.LoReFT) -> dict[str, Tensor]:
    return {
        "weight": steer.weight,
        "bias": steer.bias,
        "rotate_layer": steer.rotation.T.contiguous(),
    }


@pytest.mark.parametrize("key", SPELLINGS)
def test_every_spelling_of_a_key_is_read(key: str, tmp_path: Path) -> None:
    path = reft_folder(tmp_path / "a", {key: state_of(loreft())})
    found = pyreft.read(path, family="llama")
    assert list(found) == [SPELLINGS[key]]
    read = found[SPELLINGS[key]]
    assert isinstance(read, equiv.LoReFT)
    assert read.rank == R  # from the tensors, not the 77 of the config
    assert torch.equal(read.rotation, loreft().rotation)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_other_places_are_refused(key: str, tmp_path: Path) -> None:
    path = reft_folder(tmp_path / "a", {key: state_of(loreft())})
    with pytest.raises(equiv.FileFormatError, match=ELSEWHERE[key]):
        pyreft.read(path, family="llama")


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "bert"])
def test_outputs_before_a_norm_are_no_sites(family: str, tmp_path: Path) -> None:
    steering = {(1, "mlp_out"): vector()}
    with pytest.raises(
        equiv.ArgumentError, match=f"in {family} that is not what is added"
    ):
        pyreft.write(steering, tmp_path / "a", family=family)
    with pytest.raises(equiv.ArgumentError, match="site in some families: pass"):
        pyreft.write(steering, tmp_path / "a")
    pyreft.write(steering, tmp_path / "a", family="llama")
    with pytest.raises(
        equiv.ArgumentError, match=f"in {family} that is not what is added"
    ):
        pyreft.read(tmp_path / "a", family=family)
    with pytest.raises(equiv.ArgumentError, match="site in some families: pass"):
        pyreft.read(tmp_path / "a")


class Rotation(nn.Module):
    """What pyreft parametrises: a weight [d, r] with orthonormal columns."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(d, r)))


def trained_rotation(d: int, r: int) -> tuple[Tensor, dict[str, Tensor]]:
    """R after some steps, and the state dict that it is saved as."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = nn.utils.parametrizations.orthogonal(Rotation(d, r))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3)
    aim = drawn(d, r)
    for _ in range(5):
        optimiser.zero_grad()
        (module.weight * aim).sum().backward()
        optimiser.step()
    state = {f"rotate_layer.{name}": t for name, t in module.state_dict().items()}
    return module.weight.detach(), state


def rotation_by_hand(state: Mapping[str, Tensor]) -> Tensor:
    """The formula of the parametrisation, for fewer columns than rows."""
    x = state["rotate_layer.parametrizations.weight.original"]
    base = state["rotate_layer.parametrizations.weight.0.base"]
    a = x.tril(-1)
    tau = 2 / (1 + (a * a).sum(0))
    return base @ (torch.linalg.householder_product(a, tau) * x.diagonal().int())


def test_a_rotation_is_made_from_its_parts() -> None:
    rotation, state = trained_rotation(D, R)
    original, base = state.values()
    assert float((original - rotation).abs().max()) > 0.1  # it is not R itself
    torch.testing.assert_close(rotation_by_hand(state), rotation)
    torch.testing.assert_close(reft_states.rebuilt(original, base, Path("a")), rotation)
    square, state = trained_rotation(3, 3)  # another parametrisation
    original, base = state.values()
    torch.testing.assert_close(reft_states.rebuilt(original, base, Path("a")), square)


def interventions() -> dict[str, tuple[dict[str, Tensor], str, Tensor]]:
    """Class (and activation) → state dict, activation, what is added to H by hand."""
    w, b, p, c = drawn(R, D, seed=1), drawn(R, seed=2), drawn(R, D, seed=3), drawn(R)
    rotation, made = trained_rotation(D, R)
    put = H @ w.T + b
    source = {"learned_source.weight": w, "learned_source.bias": b}
    project = {"proj_layer.weight": p}
    silu = functional.silu
    return {
        "Loreft": (
            {"weight": w, "bias": b, "rotate_layer": rotation},
            "identity",
            (put - H @ rotation) @ rotation.T,
        ),
        "Direft": ({**source, **made}, "identity", put @ rotation.T),
        "Direft silu": ({**source, **made}, "silu", silu(put) @ rotation.T),
        "Direft of EasySteer": (
            {"weight": w, "bias": b, "rotate_layer": rotation},
            "identity",
            put @ rotation.T,
        ),
        "Consreft": (
            {"learned_source": c, **made},
            "identity",
            (c - H @ rotation) @ rotation.T,
        ),
        "Lobireft": (
            {"learned_source": c, **made},
            "identity",
            (c @ rotation.T).expand_as(H),
        ),
        "Noreft": ({**source, **project}, "identity", (put - H @ p.T) @ p),
        "Noreft biased": (
            {**source, **project, "proj_layer.bias": c},
            "identity",
            (put - H @ p.T - c) @ p,
        ),
        "Nodireft": ({**source, **project}, "identity", put @ p),
        "Nodireft silu": (
            {**source, **project, "proj_layer.bias": c},  # which it does not use
            "silu",
            silu(put) @ p,
        ),
        "Addition": ({"source_representation": drawn(1, D)}, "identity", drawn(1, D)),
        "Bias": ({"bias": drawn(D)}, "identity", drawn(D)),
    }


@pytest.mark.parametrize("case", interventions())
def test_every_intervention_of_pyreft(case: str, tmp_path: Path) -> None:
    state, activation, expected = interventions()[case]
    kind = case.split()[0]
    path = reft_folder(tmp_path / "a", {KEY: state}, kind)
    found = pyreft.read(path, activation=activation)[3, "block_out"]
    same_map(found, expected.expand_as(H))
    if kind == "Nodireft" and activation == "silu":  # the paper's adapter
        assert isinstance(found, equiv.LowRankMLP)
        assert torch.equal(found.down, state["learned_source.weight"])
        assert torch.equal(found.up, state["proj_layer.weight"].T)


def test_a_checkpoint_without_a_config_needs_the_class(tmp_path: Path) -> None:
    path = reft_folder(tmp_path / "a", {KEY: state_of(loreft())})
    (path / "config.json").unlink()
    with pytest.raises(equiv.ArgumentError, match=r"ReftTrainer.*`intervention`"):
        pyreft.read(path)
    found = pyreft.read(path, intervention="LoreftIntervention")
    assert isinstance(found[3, "block_out"], equiv.LoReFT)
    with pytest.raises(equiv.ArgumentError, match="`intervention` in Loreft"):
        pyreft.read(path, intervention="SigmoidMaskIntervention")


def test_a_rotation_that_is_none_is_refused_and_a_rounded_one_told(
    tmp_path: Path,
) -> None:

    state = state_of(loreft())
    reft_folder(tmp_path / "a", {KEY: {**state, "rotate_layer": drawn(D, R)}})
    with pytest.raises(equiv.FileFormatError, match=r"no LoReFT.*from the identity"):
        pyreft.read(tmp_path / "a")
    rounded = state["rotate_layer"].bfloat16()
    reft_folder(tmp_path / "b", {KEY: {**state, "rotate_layer": rounded.float()}})
    with pytest.warns(UserWarning, match="from orthonormal"):
        pyreft.read(tmp_path / "b")
    reft_folder(tmp_path / "c", {KEY: {**state, "rotate_layer": rounded}})
    pyreft.read(tmp_path / "c")  # in bfloat16 that is what it can be


BROKEN_REFT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (lambda s: [s], "no state dict"),
    "missing": (lambda s: {"weight": s["weight"]}, "`bias`.*got NoneType"),
    "axes": (lambda s: {**s, "weight": s["bias"]}, "`weight`.*2 axes"),
    "integers": (lambda s: {**s, "bias": s["bias"].int()}, "`bias`.*floating"),
    "shapes": (lambda s: {**s, "weight": s["weight"][:1]}, "no LoReFT|do not fit"),
    "widths": (lambda s: {**s, "weight": s["weight"][:, :1]}, "no LoReFT|do not fit"),
    "code": (lambda s: {**s, "more": Bomb()}, "would run code"),
}


@pytest.mark.parametrize("case", BROKEN_REFT)
def test_broken_state_dicts_are_refused(case: str, tmp_path: Path) -> None:
    change, match = BROKEN_REFT[case]
    path = reft_folder(tmp_path / "a", {KEY: change(state_of(loreft()))})
    with pytest.raises(equiv.FileFormatError, match=match):
        pyreft.read(path)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    keys = [f"layer_3_comp_block_output_unit_pos_nunit_1#{n}" for n in (0, 1)]
    states = dict.fromkeys(keys, state_of(loreft()))
    with pytest.raises(equiv.FileFormatError, match="two interventions"):
        pyreft.read(reft_folder(tmp_path / "a", states))
    one = reft_folder(tmp_path / "b", {keys[0]: states[keys[0]]}, "Sigmoid")
    with pytest.raises(equiv.FileFormatError, match="is a SigmoidIntervention"):
        pyreft.read(one)
    for text, match in (
        ("{", "not JSON"),
        ("[]", "no list of `intervention_types`"),
        ('{"intervention_types": ["a.B", "a.C"]}', "of which class"),
        ('{"intervention_types": ["a.B"], "sorted_keys": ["x"]}', "does not say what"),
    ):
        (one / "config.json").write_text(text)
        with pytest.raises(equiv.FileFormatError, match=match):
            pyreft.read(one)
    with pytest.raises(equiv.FileFormatError, match="with silu"):
        pyreft.read(
            reft_folder(tmp_path / "c", {keys[0]: states[keys[0]]}), activation="silu"
        )
    data = (one / f"intkey_{keys[0]}.bin").read_bytes()
    (one / f"intkey_{keys[0]}.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(equiv.FileFormatError, match=r"no whole file of torch.save"):
        pyreft.read(one, intervention="LoreftIntervention")
    rotation, made = trained_rotation(D, R)
    made["rotate_layer.parametrizations.weight.0.base"] = rotation[:3]
    state = {"learned_source": drawn(R), **made}
    with pytest.raises(equiv.FileFormatError, match="is damaged"):
        pyreft.read(reft_folder(tmp_path / "d", {keys[0]: state}, "Lobireft"))


def test_a_folder_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = {(1, "block_out"): vector()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(equiv.ArgumentError, match="new or empty"):
        pyreft.write(steering, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    pyreft.write(steering, tmp_path / "empty")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        pyreft.write(steering, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_what_pyreft_cannot_hold(tmp_path: Path) -> None:
    cases = {("block_out", "silu"): "LowRankMLP", ("mlp_hidden", ""): "no word for"}
    for (site, activation), match in cases.items():
        steer = mlp(activation) if activation else vector()
        with pytest.raises(equiv.ArgumentError, match=match):
            pyreft.write({(1, site): steer}, tmp_path / "a", family="llama")
