"""Vectors for lm-eval's model type `steered`: one `.pt` file.

    lm-eval --model steered --model_args pretrained=MODEL,steer_path=vectors.pt …

The file maps a module of the model's backbone ("layers.2", "h.2.mlp") to a vector that
is added to its output for every token, rounded to the model's dtype. On import, `clamp`
is a LoReFT: it sets what the output has along one direction u to a value c,

    h + u (c − u·(h − b)),    so R = u, W = 0 and the bias is c + u·b.

lm-eval unpickles without asking; here nothing but tensors and plain values is read.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiv.arguments import as_number
from equiv.errors import ArgumentError, FileFormatError
from equiv.model.families import FAMILIES
from equiv.model.sites import SiteKey
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
)
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.writing import write_bytes

HOLDS = "fixed vectors at attn_out, mlp_out and block_out"
_SITES = ("attn_out", "mlp_out", "block_out")


def write(steering: object, path: str | Path, *, family: str | None = None) -> None:
    """Write fixed vectors for lm-eval.

    Args:
        steering: Fixed vectors at attn_out, mlp_out or block_out. Rounded to float32.
        path: The file; lm-eval asks for the ending .pt or .pth.
        family: The model's Hugging Face type, which tells the modules' names.

    Raises:
        ArgumentError: If the format cannot hold the steering, or the ending is another.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ArgumentError(f"Expected a path that ends in .pt or .pth, got {path}.")
    chosen = for_all_tokens(steering, "lm-eval")
    known = family_of(chosen, family)
    content: dict[str, dict[str, Any]] = {}
    for key, steer in one_per_place(chosen, "lm-eval").items():
        if not isinstance(steer, Vector) or key[1] not in _SITES:
            raise refusal("lm-eval", HOLDS, key, steer, weights=True)
        content[_module(known, *key)] = {
            "steering_vector": float32(steer.vector, key),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,  # `add` refuses any
            "head_index": None,
        }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read(path: str | Path, *, family: str | None = None) -> SteeringSet:
    """Read vectors that were made for lm-eval.

    Args:
        path: The file.
        family: The model's Hugging Face type; needed where a module inside a block is
            steered, since only in some families it adds its output to the stream.

    Returns:
        Vectors for `add`, times their coefficient; LoReFTs for `clamp`.

    Raises:
        FileFormatError: If the file is damaged, would have to run code, or steers what
            is no site, or single heads.
        ArgumentError: If a family is needed and not given.
    """
    path = Path(path)
    content = read_tensors(path)
    if not isinstance(content, Mapping) or not content:
        raise FileFormatError(f"{path} is no file for lm-eval: it maps no modules.")
    entries: dict[SiteKey, Steering] = {}
    for module, said in content.items():
        if not isinstance(module, str) or not isinstance(said, Mapping):
            raise FileFormatError(f"{path} is no file for lm-eval: {module!r}.")
        key = _key(module, family, path)
        if key in entries:
            raise FileFormatError(f"{path} steers {key!r} twice.")
        entries[key] = _steer(said, module, path)
    return SteeringSet(entries, about=origin("lm_eval", family))


def _steer(said: Mapping[str, Any], module: str, path: Path) -> Steering:
    what = f"`steering_vector` of {module}"
    vector = said.get("steering_vector")
    if isinstance(vector, Tensor) and vector.ndim == 2 and len(vector) == 1:
        vector = vector[0]
    vector = checked(vector, 1, what, path)
    if said.get("head_index") is not None:
        raise FileFormatError(
            f"{path} steers head {said['head_index']} of {module}, in an activation "
            "with an axis for heads, which no site here has."
        )
    try:
        strength = as_number("coefficient", said.get("steering_coefficient", 1.0))
    except ArgumentError as error:
        raise FileFormatError(f"{path}, {module}: {error}") from None
    bias, action = said.get("bias"), said.get("action")
    if action == "add" and bias is None:
        return Vector(vector * strength)
    if action != "clamp":
        raise FileFormatError(
            f"Expected {module} in {path} to `add` without a bias, or to `clamp`, got "
            f"{action!r}."
        )
    direction = vector / torch.linalg.vector_norm(vector)
    value = direction.new_tensor([strength])
    if bias is not None:
        value = value + direction @ checked(bias, 1, f"`bias` of {module}", path)
    return LoReFT(direction[None], torch.zeros_like(direction[None]), value)


def _module(family: str | None, layer: int, site: str) -> str:
    """The module whose output a site is, from the model's backbone."""
    known = architecture_of(family, "lm-eval names sites by the model's modules")
    inside = {"block_out": "", "attn_out": known.attn_out, "mlp_out": known.mlp_out}
    return f"{known.blocks}.{layer}.{inside[site]}".rstrip(".")


def _key(module: str, family: str | None, path: Path) -> SiteKey:
    """The site whose activation is a module's output."""
    roots = "|".join({re.escape(known.blocks) for known in FAMILIES.values()})
    found = re.fullmatch(rf"(?:{roots})\.([0-9]{{1,9}})(?:\.(.+))?", module)
    if found is None:
        raise FileFormatError(
            f"{path} steers {module!r}, which is no block nor in one."
        )
    layer = int(found[1])
    if found[2] is None:
        return layer, "block_out"
    why = f"{path} steers {module}, which is a site in some families only"
    architecture_of(family, why)
    for site in _SITES:
        if _module(family, layer, site) == module:
            return layer, site
    raise FileFormatError(
        f"{path} steers {module!r}; in {family} the sites are "
        f"{', '.join(_module(family, layer, site) for site in _SITES)}."
    )
