"""Files for lm-eval, against plain hooks on the modules that they name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import IDS, Bomb, D, H, affine, drawn, pickled, vector

import equiv
from equiv.steering.formats import (
    lm_eval,
)
from equiv.testing.models import FAMILIES, transformer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "block_out"])
@torch.no_grad()
def test_lm_eval_hooks_the_module_that_the_site_is(
    family: str, site: str, tmp_path: Path
) -> None:
    """A plain hook on the module of that name, as lm-eval does it, steers the same."""
    model = transformer(family, seed=1)
    steering = {(1, site): equiv.Vector(drawn(16))}
    path = tmp_path / "a.pt"
    lm_eval.write(steering, path, family=family)
    content = torch.load(path, weights_only=True)
    ((module, said),) = content.items()
    assert said["action"] == "add" and said["bias"] is said["head_index"] is None
    added = said["steering_coefficient"] * said["steering_vector"]

    def hook(_m: Any, _a: Any, out: Any) -> Any:
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    with equiv.steer(model, steering):
        ours = model(IDS).logits
    handle = model.base_model.get_submodule(module).register_forward_hook(hook)
    theirs = model(IDS).logits
    handle.remove()
    assert torch.equal(ours, theirs) and not torch.equal(ours, model(IDS).logits)
    assert list(lm_eval.read(path, family=family)) == [(1, site)]


def test_clamping_is_read_as_a_loreft(tmp_path: Path) -> None:
    v, bias = drawn(D), drawn(D, seed=1)
    said = {"steering_vector": v[None], "steering_coefficient": 3, "action": "clamp"}
    unit = v / v.norm()
    for b in (None, bias):
        (tmp_path / "a.pt").write_bytes(pickled({"layers.2": {**said, "bias": b}}))
        found = lm_eval.read(tmp_path / "a.pt")[2, "block_out"]
        assert isinstance(found, equiv.LoReFT)
        out = H + found(H) - (0 if b is None else b)
        torch.testing.assert_close(out @ unit, torch.full((5,), 3.0))  # clamped
        away = torch.eye(D) - torch.outer(unit, unit)
        torch.testing.assert_close(found(H) @ away, torch.zeros(5, D))  # nothing else


def test_coefficients_are_multiplied_in(tmp_path: Path) -> None:
    said = {"steering_vector": drawn(1, D), "steering_coefficient": -2, "action": "add"}
    (tmp_path / "a.pt").write_bytes(pickled({"h.2": said}))
    found = lm_eval.read(tmp_path / "a.pt")[2, "block_out"]
    assert isinstance(found, equiv.Vector)
    assert torch.equal(found.vector, -2 * drawn(1, D)[0])


ADD = {"steering_vector": torch.ones(D), "action": "add"}
BROKEN_LM_EVAL: dict[str, tuple[Any, str]] = {
    "bias": ({"layers.1": {**ADD, "bias": torch.ones(D)}}, "without a bias"),
    "action": ({"layers.1": {**ADD, "action": "scale"}}, "'scale'"),
    "head": ({"layers.1": {**ADD, "head_index": 3}}, "head 3"),
    "vector": ({"layers.1": {"action": "add"}}, "steering_vector.*NoneType"),
    "matrix": ({"layers.1": {**ADD, "steering_vector": torch.ones(2, D)}}, "1 axes"),
    "coefficient": ({"layers.1": {**ADD, "steering_coefficient": "x"}}, "coefficient"),
    "module": ({"lm_head": ADD}, "no block nor in one"),
    "inside": ({"layers.1.mlp.act_fn": ADD}, "in llama the sites are"),
    "not said": ({"layers.1": torch.ones(D)}, "no file for lm-eval"),
    "list": ([ADD], "maps no modules"),
    "twice": ({"layers.1": ADD, "h.1": ADD}, "twice"),
    "code": ({"layers.1": {**ADD, "bias": Bomb()}}, "would run code"),
}


@pytest.mark.parametrize("case", BROKEN_LM_EVAL)
def test_broken_lm_eval_files_are_refused(case: str, tmp_path: Path) -> None:
    content, match = BROKEN_LM_EVAL[case]
    (tmp_path / "a.pt").write_bytes(pickled(content))
    with pytest.raises(equiv.FileFormatError, match=match):
        lm_eval.read(tmp_path / "a.pt", family="llama")


def test_lm_eval_names_modules_and_needs_the_family(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(equiv.ArgumentError, match="modules: pass `family`"):
        lm_eval.write({(1, "block_out"): vector()}, path)
    with pytest.raises(equiv.ArgumentError, match="got 'opt'"):
        lm_eval.write({(1, "block_out"): vector()}, path, family="opt")
    with pytest.raises(equiv.ArgumentError, match=r"\.pt or \.pth"):
        lm_eval.write({(1, "block_out"): vector()}, tmp_path / "a", family="llama")
    for site, steer in (("mlp_in", vector()), ("block_out", affine())):
        with pytest.raises(equiv.ArgumentError, match=r"lm-eval holds.*to_weights"):
            lm_eval.write({(1, site): steer}, path, family="llama")
    path.write_bytes(pickled({"layers.1.mlp": ADD}))
    with pytest.raises(equiv.ArgumentError, match="in some families only"):
        lm_eval.read(path)
