"""What the formats of other tools share: what they can hold, and how they are read."""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiv.errors import ArgumentError, FileFormatError
from equiv.model.families import FAMILIES, Architecture
from equiv.model.sites import Site, SiteKey
from equiv.steering.applying.positions import Positions
from equiv.steering.files.contents import read_bytes
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.steering_set import SteeringSet, as_set
from equiv.steering.forms.vector import Vector

_ZIP = b"PK\x03\x04"
# Width d and rank r of the tensors of a form.
_AXES = {
    "vector": "d",
    "down": "rd",
    "up": "dr",
    "inner": "r",
    "bias": "d",
    "rotation": "rd",
    "weight": "rd",
}


def for_all_tokens(steering: object, tool: str) -> SteeringSet:
    """Steering as a set, if it is for every token.

    Raises:
        ArgumentError: If it is not, or empty.
    """
    chosen = as_set(steering)
    if not Positions.parse(chosen.positions).everything:
        raise ArgumentError(
            f"A file of {tool} does not say which tokens are steered, so steering of "
            f"{chosen.positions!r} cannot be kept in one. `dataclasses.replace("
            'steering, positions="all")` steers all, if that is meant.'
        )
    if not chosen:
        raise ArgumentError("Expected steering with at least one steer, got none.")
    return chosen


def family_of(steering: SteeringSet, family: str | None) -> str | None:
    """The model's family as it was given, or else as the steering says."""
    base = steering.about.get("base")
    said = base.get("family") if isinstance(base, Mapping) else None
    return family if family is not None else said


def architecture_of(family: str | None, why: str) -> Architecture:
    """How the blocks of a family are built.

    Raises:
        ArgumentError: If no family is given, or it is not known; `why` says what it is
            needed for.
    """
    if family not in FAMILIES:
        got = "none" if family is None else repr(family)
        raise ArgumentError(
            f"{why}: pass `family`, one of {', '.join(sorted(FAMILIES))}; got {got}."
        )
    return FAMILIES[family]


def stream_vectors(
    steering: SteeringSet, tool: str, family: str | None
) -> dict[int, Tensor]:
    """Layer → the fixed vector that is added to the block's output, in float64.

    A vector at mlp_out is added to the same stream, unless a norm comes after it.

    Raises:
        ArgumentError: If a steer is something else, or of another width.
    """
    found: dict[int, Tensor] = {}
    for key, steer in steering.items():
        layer, site = key[0], site_of(key, steer)
        if not isinstance(steer, Vector) or site not in ("block_out", "mlp_out"):
            raise refusal(
                tool, "fixed vectors at block_out only", key, steer, weights=True
            )
        if site == "mlp_out" and not _adds_plainly(family):
            raise ArgumentError(
                f"{tool} holds fixed vectors at block_out only, and in {family} a norm "
                f"comes after mlp_out: the vector at {key!r} is none at block_out."
            )
        vector = steer.vector.detach().double().cpu()
        if any(vector.shape != other.shape for other in found.values()):
            raise ArgumentError(
                f"Expected vectors of one width, got another at {key!r}."
            )
        found[layer] = found[layer] + vector if layer in found else vector
    return found


def site_of(key: SiteKey, steer: object) -> str:
    """The site of a steer; of a vector, which reads nothing, where it writes."""
    return Site(key[1]).write if isinstance(steer, Vector) else key[1]


def one_per_place(steering: SteeringSet, tool: str) -> dict[SiteKey, Steering]:
    """(layer, site) → steer, a vector's site being where it writes.

    Raises:
        ArgumentError: If two come to stand at one place.
    """
    found: dict[SiteKey, Steering] = {}
    for key, steer in steering.items():
        place = key[0], site_of(key, steer)
        if place in found:
            raise ArgumentError(
                f"{tool} has one steer per place, and two are for {place!r}. Write "
                "vectors of one place as their sum."
            )
        found[place] = steer
    return found


def _adds_plainly(family: str | None) -> bool:
    why = "Whether a vector at mlp_out is one at block_out depends on the model"
    return architecture_of(family, why).plain_add


def refusal(
    tool: str, holds: str, key: SiteKey, steer: object, *, weights: bool = False
) -> ArgumentError:
    """What is said of a steer that a format cannot hold."""
    way = "`equiv.save` keeps every form"
    if weights:
        way += "; `equiv.to_weights(steering, model)` makes weights where there are any"
    kind = type(steer).__name__
    return ArgumentError(f"{tool} holds {holds}; {key!r} is a `{kind}`. {way}.")


def as_affine(steer: Steering) -> Affine | None:
    """The affine map that a steer is, exactly; `None` if it is none of low rank.

    Example:
        >>> mlp = LowRankMLP(torch.eye(1), torch.eye(1), inner=torch.ones(1),
        ...                  activation="identity")
        >>> as_affine(mlp)(torch.ones(1))
        tensor([2.])
    """
    if isinstance(steer, Affine):
        return steer
    if isinstance(steer, LoReFT):
        return steer.to("cpu", torch.float64).affine()
    if not isinstance(steer, LowRankMLP) or steer.activation != "identity":
        return None
    inner, bias = steer.inner, steer.bias
    if inner is not None:
        moved = steer.up.double() @ inner.double()
        bias = moved if bias is None else moved + bias.double()
    return Affine(steer.down, steer.up, bias)


def as_loreft(steer: Steering) -> LoReFT | None:
    """The LoReFT that a steer is, exactly; `None` if it is none."""
    if isinstance(steer, LoReFT):
        return steer
    affine = as_affine(steer)
    if affine is None or affine.down.shape[1] != affine.up.shape[0]:
        return None
    return LoReFT.from_affine(affine)


def float32(tensor: Tensor, key: object) -> Tensor:
    """A tensor as other tools read it: float32, on the CPU, a copy.

    Raises:
        ArgumentError: If it holds what is not finite in float32.
    """
    made = tensor.detach().to("cpu", torch.float32).contiguous().clone()
    if not bool(torch.isfinite(made).all()):
        raise ArgumentError(
            f"The steering at {key!r} has numbers that are not finite in float32."
        )
    return made


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileFormatError: If it is none.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not JSON: {error}.") from None


def read_tensors(path: Path) -> Any:
    """What a file of `torch.save` or safetensors holds: tensors and plain values.

    Raises:
        FileFormatError: If it is none, is damaged, or would have to run code.
    """
    data = read_bytes(path)
    if path.suffix == ".safetensors":
        return _of_safetensors(data, path)
    if not data.startswith(_ZIP):
        raise FileFormatError(
            f"{path} is no file of torch.save (PyTorch 1.6 or later)."
        )
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own unpickler says it in many ways
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise FileFormatError(
                f"{path} holds more than tensors and plain values: loading it would "
                "run code, which is never done. Save its tensors by themselves."
            ) from None
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise FileFormatError(
            f"{path} is no whole file of torch.save: {said}"
        ) from None


def _of_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file: {error}."
        ) from None


def checked(value: object, ndim: int, what: str, path: Path) -> Tensor:
    """A floating tensor with so many axes.

    Raises:
        FileFormatError: If it is none.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == ndim:
        return value.detach()
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise FileFormatError(
        f"Expected {what} in {path} to be floating numbers of {ndim} axes, got {got}."
    )


def usable(steer: Steering, where: str, path: Path) -> Steering:
    """The steer, if its tensors fit each other and it writes what it reads.

    Raises:
        FileFormatError: If not.
    """
    sizes: dict[str, int] = {}
    for name, value in vars(steer).items():
        if not isinstance(value, Tensor):
            continue
        axes = "r" if name == "bias" and isinstance(steer, LoReFT) else _AXES[name]
        expected = tuple(
            sizes.setdefault(axis, size)
            for axis, size in zip(axes, value.shape, strict=True)
        )
        if tuple(value.shape) != expected:
            raise FileFormatError(
                f"The tensors of {where} in {path} do not fit: expected {name} of "
                f"shape {expected}, got {tuple(value.shape)}."
            )
    return steer


def origin(format: str, family: str | None, **fields: object) -> dict[str, object]:
    """What is known of steering that was read."""
    base = {} if family is None else {"base": {"family": family}}
    return {**base, "format": format, **fields}
