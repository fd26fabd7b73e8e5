"""Checkpoints of steerling, the code of the paper: low-rank adapters, fixed vectors.

    adapters.layerL_SITE.down.weight [r, d], .up.weight [d, r]     h + α U φ(D h)
    deltas.layerL_SITE [d]                                         h + v

They stand in a checkpoint of the whole model (`pytorch_model.bin`, the base's weights
under `base_model.`, which are left alone), or without `adapters.` in an
`adapter_steerer.pt`. α (1 unless changed), φ (SiLU unless changed) and which tokens are
steered are not in the file, only in the arguments of whoever made it.

SITE is `block`, `mlp` or `attn`. `mlp` hooks the MLP's module, `attn` the norm called
`post_attention_layernorm`. In a Llama that norm comes after the skip, so `attn` is the
MLP's input, not what attention writes; in a Gemma-2 or OLMo-2 it is what attention
writes, but there `mlp` comes before the norm that writes.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiv.arguments import as_choice, as_number
from equiv.errors import ArgumentError, FileFormatError
from equiv.model.sites import SiteKey
from equiv.steering.applying.positions import Positions
from equiv.steering.formats.common import (
    architecture_of,
    checked,
    family_of,
    float32,
    for_all_tokens,
    one_per_place,
    origin,
    read_tensors,
    refusal,
    usable,
)
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.mlp import ACTIVATIONS, LowRankMLP
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.writing import write_bytes

HOLDS = "fixed vectors, or low-rank MLPs without biases and of one activation"
_NORM = "post_attention_layernorm"
_ADAPTER = re.compile(r"(?:adapters\.)?layer([0-9]{1,9})_(\w+)\.(down|up)\.weight")
_DELTA = re.compile(r"(?:deltas\.)?layer([0-9]{1,9})_(\w+)")


def write(steering: object, path: str | Path, *, family: str | None = None) -> None:
    """Write steering as a checkpoint that `load_state_dict(…, strict=False)` takes.

    Args:
        steering: Fixed vectors alone, or low-rank MLPs without biases and of one
            activation; a linear map is one with the identity. Rounded to float32.
        path: The file, `pytorch_model.bin` for steerling's own scripts.
        family: The model's Hugging Face type; for sites other than block_out.

    Raises:
        ArgumentError: If the format cannot hold the steering.
    """
    chosen = for_all_tokens(steering, "steerling")
    known = family_of(chosen, family)
    tensors: dict[str, Tensor] = {}
    kinds = set()
    for key, steer in one_per_place(chosen, "steerling").items():
        name = f"layer{key[0]}_{_word(key[1], known)}"
        made = _adapter(steer)
        if isinstance(steer, Vector):
            kinds.add("vector")
            tensors[f"deltas.{name}"] = float32(steer.vector, key)
        elif made is not None:
            kinds.add(made.activation)
            tensors[f"adapters.{name}.down.weight"] = float32(made.down, key)
            tensors[f"adapters.{name}.up.weight"] = float32(made.up, key)
        else:
            raise refusal("steerling", HOLDS, key, steer)
    if len(kinds) > 1:
        raise ArgumentError(
            f"steerling holds {HOLDS}; the steering has {', '.join(sorted(kinds))}. "
            "`equiv.save` keeps every form."
        )
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_bytes(Path(path), buffer.getvalue())


def read(
    path: str | Path,
    *,
    family: str | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    positions: str = "all",
) -> SteeringSet:
    """Read the steering of a checkpoint; what is not in the file is given.

    Args:
        path: The file, of torch.save or safetensors.
        family: The model's Hugging Face type; for `mlp` and `attn`.
        activation: φ: "silu", "gelu", "relu", "tanh" or "identity".
        alpha: α.
        positions: Which tokens are steered; "last + generated" is steerling's "last".

    Raises:
        FileFormatError: If the file is damaged, would have to run code, or holds no
            steering.
        ArgumentError: If an argument is outside its set, or a family is needed.
    """
    path = Path(path)
    as_choice("activation", activation, tuple(ACTIVATIONS))
    Positions.parse(positions)
    strength = as_number("alpha", alpha)
    content = read_tensors(path)
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{path} is no checkpoint: it maps no names.")
    entries: dict[SiteKey, Steering] = {}
    for key, parts in _parts(content, family, path).items():
        where = f"the steering at {key!r}"
        if "vector" in parts:
            steer = Vector(checked(parts["vector"], 1, where, path))
        else:
            down, up = (
                checked(parts.get(name), 2, f"{name} of {where}", path)
                for name in ("down", "up")
            )
            steer = LowRankMLP(down, up * strength, activation=activation)
        entries[key] = usable(steer, where, path)
    if not entries:
        raise FileFormatError(f"{path} holds no steering of steerling.")
    return SteeringSet(entries, positions, origin("steerling", family))


def _parts(
    content: Mapping[Any, Any], family: str | None, path: Path
) -> dict[SiteKey, dict[str, Any]]:
    """(layer, site) → the tensors of a steer, by their names in the form."""
    found: dict[SiteKey, dict[str, Any]] = {}
    for name, value in content.items():
        if match := _ADAPTER.fullmatch(str(name)):
            part = match[3]
        elif match := _DELTA.fullmatch(str(name)):
            part = "vector"
        else:
            continue
        key = int(match[1]), _site(match[2], family, path)
        if part in found.setdefault(key, {}):
            raise FileFormatError(f"{path} has two `{part}` for {key!r}.")
        found[key][part] = value
    return found


def _adapter(steer: object) -> LowRankMLP | None:
    if isinstance(steer, Affine) and steer.bias is None:
        return LowRankMLP(steer.down, steer.up, activation="identity")
    if isinstance(steer, LowRankMLP) and steer.inner is None and steer.bias is None:
        return steer
    return None


def _words(family: str | None, why: str) -> dict[str, str]:
    """Steerling's words for sites → sites, in a family whose blocks have them."""
    known = architecture_of(family, why)
    words = {"block": "block_out"}
    if known.attn_out == _NORM:
        words["attn"] = "attn_out"
    elif known.resid_mid == (_NORM, "input"):
        words["attn"] = "mlp_in"
    if known.mlp_out == "mlp":
        words["mlp"] = "mlp_out"
    return words


def _site(word: str, family: str | None, path: Path) -> str:
    if word == "block":
        return "block_out"
    words = _words(
        family, f"What {path} calls {word!r} is a site in some families only"
    )
    if word not in words:
        raise FileFormatError(
            f"{path} steers {word!r}; in {family} that is no site. Expected "
            f"{', '.join(words)}."
        )
    return words[word]


def _word(site: str, family: str | None) -> str:
    if site == "block_out":
        return "block"
    words = _words(family, "What steerling calls a site depends on the model")
    found = [word for word, known in words.items() if known == site]
    if not found:
        raise ArgumentError(
            f"steerling has no word for {site} in {family}; it has "
            f"{', '.join(words.values())}. `equiv.save` keeps every site."
        )
    return found[0]
