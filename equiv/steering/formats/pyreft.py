"""Folders of pyreft and pyvene: `config.json`, and a file per intervention.

`intkey_KEY.bin` is a state dict of torch.save, and KEY says where it acts, in one of
four spellings:

    layer_3_comp_block_output_unit_pos_nunit_1#0     comp_model_layers[3]_output_unit_…
    layer.3.comp.block_output.unit.pos.nunit.1#0     comp.model.layers[3].output.unit.…

Which class it is stands in the config only; `reft_states` says what each one computes.

- pyreft loads W and b into bfloat16, whatever the file holds. Its forward then wants
  one dtype: `for i in reft.interventions.values(): i.float()`. That does not undo the
  rounding, and since W is R plus what the map does, it is large where the map is small:
  `write` says how large.
- The activation (`act_fn`) is not in the folder, and neither are the positions: pyreft
  is told them at each forward.
- `mlp_output` and `attention_output` are the modules' outputs: in Gemma-2 and OLMo-2
  these are not what is added to the stream.
- A checkpoint of `ReftTrainer` (`checkpoint-N/intervenable_model`) has no config.json.
"""

import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from equiv.arguments import as_choice
from equiv.errors import ArgumentError, FileFormatError
from equiv.model.sites import SiteKey
from equiv.steering.formats.common import (
    architecture_of,
    as_loreft,
    family_of,
    float32,
    for_all_tokens,
    one_per_place,
    origin,
    read_json,
    read_tensors,
    refusal,
    usable,
)
from equiv.steering.formats.reft_states import INTERVENTIONS, steer_from
from equiv.steering.forms.form import Steering
from equiv.steering.forms.mlp import ACTIVATIONS
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.writing import write_folder

HOLDS = "fixed vectors, affine maps and LoReFTs at " + (
    "mlp_in, attn_out, mlp_out and block_out"
)
COMPONENTS = {
    "block_output": "block_out",
    "mlp_output": "mlp_out",
    "attention_output": "attn_out",
    "mlp_input": "mlp_in",
}
# The classes that are written: as pyreft 0.1 and pyvene 0.1 name them.
_LOREFT = "<class 'pyreft.interventions.LoreftIntervention'>"
_ADDITION = "<class 'pyvene.models.interventions.AdditionIntervention'>"
_ENDS = {
    "output": "block_out",
    "mlp_output": "mlp_out",
    "self_attn_output": "attn_out",
    "attn_output": "attn_out",
    "mlp_input": "mlp_in",
}
# The modules whose outputs pyvene calls `mlp_output` and `attention_output`.
_MODULES = {"mlp_out": ("mlp",), "attn_out": ("self_attn", "attn")}
_KEY = re.compile(
    r"(?:layer[._](?P<layer>[0-9]{1,9})[._])?comp[._](?P<component>.+)"
    r"[._]unit[._](?P<unit>.+)[._]nunit[._](?P<count>[0-9]+)#(?P<number>[0-9]+)"
)
_PATH = re.compile(r".*(?:layers|h)\[([0-9]{1,9})\][._](.+)")


def write(steering: object, path: str | Path, *, family: str | None = None) -> None:
    """Write a folder that `pyreft.ReftModel.load` reads.

    Args:
        steering: Fixed vectors, affine maps and LoReFTs; an affine map is written as
            the LoReFT that it is. Rounded to float32.
        path: The folder, new or empty.
        family: The model's Hugging Face type; for sites other than block_out.

    Raises:
        ArgumentError: If the format cannot hold the steering.
    """
    chosen = for_all_tokens(steering, "pyreft")
    known = family_of(chosen, family)
    states: dict[str, dict[str, Tensor]] = {}
    rows: list[list[object]] = []
    for key, steer in one_per_place(chosen, "pyreft").items():
        component = _component(key[1], known)
        states[f"layer_{key[0]}_comp_{component}_unit_pos_nunit_1#0"] = _state(
            steer, key
        )
        rows.append([key[0], component, "pos", 1, *[None] * 10])
    for row, state in zip(rows, states.values(), strict=True):
        if _is_vector(state):
            row[12] = True  # pyvene's sign that the state dict holds the source
        else:
            row[4] = len(state["weight"])
    _warn_of_rounding(states)
    files = {f"intkey_{key}.bin": _pickled(state) for key, state in states.items()}
    files["config.json"] = json.dumps(_config(rows, states), indent=2).encode()
    write_folder(Path(path), files)


def read(
    path: str | Path,
    *,
    family: str | None = None,
    activation: str = "identity",
    intervention: str | None = None,
) -> SteeringSet:
    """Read a folder of pyreft or pyvene; what is not in it is given.

    Args:
        path: The folder.
        family: The model's Hugging Face type; for places inside a block.
        activation: What was passed to pyreft as `act_fn`.
        intervention: The class, such as "LoreftIntervention"; for folders without a
            config.json.

    Returns:
        Vectors, affine maps, LoReFTs and low-rank MLPs, for all tokens.

    Raises:
        FileFormatError: If the folder is no such thing, a file is damaged or would
            have to run code, or it holds what is no form here.
        ArgumentError: If an argument is outside its set, or one is needed.
    """
    path = Path(path)
    as_choice("activation", activation, tuple(ACTIVATIONS))
    files = sorted(path.glob("intkey_*.bin"))
    if not files:
        raise FileFormatError(f"{path} is no folder of pyreft: no intkey_….bin in it.")
    classes = _classes(path, intervention)
    entries: dict[SiteKey, Steering] = {}
    for file in files:
        name = file.name.removeprefix("intkey_").removesuffix(".bin")
        key = _site_key(name, family, file)
        if key in entries:
            raise FileFormatError(
                f"{path} has two interventions at {key!r}, for different positions "
                "that pyreft is told at each forward. A steering set has one per site: "
                "move one of the files into a folder of its own."
            )
        kind = classes.get(name, classes.get(""))
        if kind is None:
            raise FileFormatError(
                f"{path / 'config.json'} does not say what {name} is."
            )
        state = read_tensors(file)
        if not isinstance(state, Mapping):
            raise FileFormatError(f"{file} holds no state dict.")
        steer = steer_from(kind, state, activation, file)
        entries[key] = usable(steer, name, path)
    about = origin("pyreft", family, activation=activation)
    return SteeringSet(entries, about=about)


def _component(site: str, family: str | None) -> str:
    """Pyvene's word for a site."""
    found = [word for word, known in COMPONENTS.items() if known == site]
    if not found:
        raise ArgumentError(
            f"pyreft has no word for {site}; it has {', '.join(COMPONENTS.values())}. "
            "`equiv.save` keeps every site."
        )
    _check_write(site, family, f"pyreft's {found[0]} is the output of a module")
    return found[0]


def _check_write(site: str, family: str | None, what: str) -> None:
    """Refuse a module's output in a family where it is not what is added."""
    if site not in _MODULES:
        return
    known = architecture_of(family, f"{what}, which is a site in some families")
    if getattr(known, site) not in _MODULES[site]:
        raise ArgumentError(
            f"{what}; in {family} that is not what is added to the stream, so it is no "
            "site. Use block_out."
        )


def _state(steer: Steering, key: SiteKey) -> dict[str, Tensor]:
    """The state dict of a steer."""
    if isinstance(steer, Vector):
        return {"source_representation": float32(steer.vector, key)}
    made = as_loreft(steer)
    if made is None:
        raise refusal("pyreft", HOLDS, key, steer)
    return {
        "weight": float32(made.weight, key),
        "bias": float32(made.bias, key),
        "rotate_layer": float32(made.rotation.T, key),
    }


def _is_vector(state: Mapping[str, Tensor]) -> bool:
    return "source_representation" in state


def _warn_of_rounding(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Say how far the maps are from what pyreft will load."""
    worst = max((_moved(s) for s in states.values() if not _is_vector(s)), default=0.0)
    if worst:
        warnings.warn(
            "pyreft loads W and b of a LoReFT rounded to bfloat16, which moves the map "
            f"by up to {worst:.1g} of its size.",
            stacklevel=3,
        )


def _moved(state: Mapping[str, Tensor]) -> float:
    """How far rounding W and b to bfloat16 moves the map, relative to its size."""
    map_ = torch.cat(
        [state["weight"] - state["rotate_layer"].T, state["bias"][:, None]], 1
    )
    exact = torch.cat([state["weight"], state["bias"][:, None]], 1)
    moved = float((exact.bfloat16().float() - exact).norm())
    return moved and moved / max(float(map_.norm()), torch.finfo(torch.float32).tiny)


def _pickled(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _config(
    rows: list[list[object]], states: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, object]:
    """`config.json`, with the fields that pyvene's loader asks for."""
    widths = [next(iter(s.values())).shape[-1] for s in states.values()]
    kinds = [_ADDITION if _is_vector(s) else _LOREFT for s in states.values()]
    return {
        "intervention_constant_sources": [True] * len(rows),
        "intervention_dimensions": widths,
        "intervention_types": kinds,
        "mode": "parallel",
        "representations": rows,
        "sorted_keys": list(states),
    }


def _classes(path: Path, intervention: str | None) -> dict[str, str]:
    """Key → class of the intervention; the key "" stands for all."""
    if intervention is not None:
        return {"": as_choice("intervention", intervention, INTERVENTIONS)}
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ArgumentError(
            f"{path} has no config.json, as checkpoints of ReftTrainer have none: pass "
            f"`intervention`, one of {', '.join(INTERVENTIONS)}."
        )
    config = read_json(config_path)
    said = config.get("intervention_types") if isinstance(config, dict) else None
    if not isinstance(said, list):
        raise FileFormatError(f"{config_path} has no list of `intervention_types`.")
    names = [str(kind).strip("<>'").rpartition(".")[2] for kind in said]
    keys = config.get("sorted_keys")
    if isinstance(keys, list) and len(keys) == len(names):
        return {str(key): name for key, name in zip(keys, names, strict=True)}
    if len(set(names)) == 1:
        return {"": names[0]}
    raise FileFormatError(f"{config_path} does not say which key is of which class.")


def _site_key(name: str, family: str | None, path: Path) -> SiteKey:
    """(layer, site) of a key, in any of its spellings."""
    found = _KEY.fullmatch(name)
    if found is None:
        raise FileFormatError(f"{path} has no key of pyreft: {name!r}.")
    if found["unit"] != "pos" or found["count"] != "1":
        raise FileFormatError(
            f"{path} acts on {found['count']} units of {found['unit']!r}; expected one "
            "of 'pos', a token at a time."
        )
    component, layer = found["component"], found["layer"]
    if layer is not None:
        site = COMPONENTS.get(component)
        if component == "block_input" and int(layer) > 0:
            layer, site = str(int(layer) - 1), "block_out"
    else:
        inside = _PATH.fullmatch(component)
        layer = inside[1] if inside else None
        site = _ENDS.get(inside[2].replace(".", "_")) if inside else None
    if layer is None or site is None:
        raise FileFormatError(
            f"{path} acts on {component!r}; the sites here that pyreft has are "
            f"{', '.join(COMPONENTS)}."
        )
    _check_write(site, family, f"{component} of {path} is the output of a module")
    return int(layer), site
