"""What pyreft's interventions compute, from their state dicts.

Symbols: R [d, r] with orthonormal columns (here the *transpose* of a LoReFT's), W
[r, d], b [r], s [r], P [r, d], p [r]; φ the activation; h a row.

    LoReFT     h + (φ(h Wᵀ + b) − h R) Rᵀ       weight, bias, rotate_layer
    DiReFT     h + φ(h Wᵀ + b) Rᵀ               learned_source.weight, .bias, rotation
    ConsReFT   h + (s − h R) Rᵀ                 learned_source, rotation
    LobiReFT   h + s Rᵀ                         learned_source, rotation
    NoReFT     h + (φ(h Wᵀ + b) − h Pᵀ − p) P   learned_source.…, proj_layer.…
    NodiReFT   h + φ(h Wᵀ + b) P                the same; p is not used
    Addition   h + v                            source_representation
    Bias       h + v                            bias

A rotation is `rotate_layer` itself, or PyTorch's orthogonal parametrisation of it:
`…weight.original` is then not R but what R is made from, together with `…0.base`.
EasySteer's pyreft writes W and b without `learned_source.` and R itself, for all.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError, FileFormatError
from equiv.steering.formats.common import checked
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.vector import Vector

INTERVENTIONS = tuple(
    f"{name}Intervention"
    for name in (
        "Loreft",
        "Direft",
        "Consreft",
        "Lobireft",
        "Noreft",
        "Nodireft",
        "Addition",
        "Bias",
    )
)
_ORIGINAL = "rotate_layer.parametrizations.weight.original"
_BASE = "rotate_layer.parametrizations.weight.0.base"
# How far a rotation may be from orthonormal, in roundings of its dtype.
_ROUNDINGS = 64


def steer_from(
    kind: str, state: Mapping[str, Any], activation: str, path: Path
) -> Steering:
    """The steer that an intervention is.

    Args:
        kind: The class, one of `INTERVENTIONS`.
        state: Its state dict.
        activation: φ.
        path: Where it is from, for messages.

    Raises:
        FileFormatError: If a tensor is missing or does not fit, the class is unknown,
            or no form here computes the same.
    """
    parts = _Parts(state, path)
    if kind not in INTERVENTIONS:
        raise FileFormatError(
            f"{path} is a {kind}; expected one of {', '.join(INTERVENTIONS)}."
        )
    if kind in ("AdditionIntervention", "BiasIntervention"):
        name = "bias" if kind.startswith("Bias") else "source_representation"
        return Vector(parts.vector(name))
    if kind == "LobireftIntervention":
        return Vector(parts.times(parts.rotation(), parts.vector("learned_source")))
    if kind == "ConsreftIntervention":
        rows, source = parts.rotation().T, parts.vector("learned_source")
        return parts.loreft(rows, torch.zeros_like(rows), source)
    if (
        kind in ("LoreftIntervention", "NoreftIntervention")
        and activation != "identity"
    ):
        raise FileFormatError(
            f"{path} is a {kind} with {activation}: the part that is taken out of h "
            "passes no activation, and what is put in does. No form here is the sum."
        )
    weight, bias = parts.source()
    if kind == "LoreftIntervention":
        return parts.loreft(parts.rotation().T, weight, bias)
    if kind == "DireftIntervention":
        return LowRankMLP(weight, parts.rotation(), bias, activation=activation)
    project = checked(state.get("proj_layer.weight"), 2, "proj_layer.weight", path)
    if kind == "NodireftIntervention":
        return LowRankMLP(weight, project.T, bias, activation=activation)
    taken = parts.vector("proj_layer.bias") if "proj_layer.bias" in state else bias * 0
    parts.check_fit(weight, project)
    parts.check_fit(bias, taken)
    return Affine(weight - project, project.T, parts.times(project.T, bias - taken))


class _Parts:
    """The tensors of a state dict, checked when they are asked for."""

    def __init__(self, state: Mapping[str, Any], path: Path) -> None:
        self.state, self.path = state, path

    def vector(self, name: str) -> Tensor:
        """A vector; pyvene also keeps one as a single row."""
        value = self.state.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) == 1:
            value = value[0]
        return checked(value, 1, f"`{name}`", self.path)

    def source(self) -> tuple[Tensor, Tensor]:
        """W and b."""
        prefix = "learned_source." if "learned_source.weight" in self.state else ""
        name = f"{prefix}weight"
        weight = checked(self.state.get(name), 2, f"`{name}`", self.path)
        return weight, self.vector(f"{prefix}bias")

    def rotation(self) -> Tensor:
        """R [d, r]."""
        if "rotate_layer" in self.state:
            return checked(self.state["rotate_layer"], 2, "`rotate_layer`", self.path)
        original, base = (
            checked(self.state.get(name), 2, f"`{name}`", self.path)
            for name in (_ORIGINAL, _BASE)
        )
        return rebuilt(original, base, self.path)

    def loreft(self, rows: Tensor, weight: Tensor, bias: Tensor) -> LoReFT:
        """A LoReFT, with a warning if its rotation is no better than bfloat16's."""
        try:
            made = LoReFT(rows, weight, bias)
        except (ArgumentError, RuntimeError) as error:
            raise FileFormatError(f"{self.path} is no LoReFT: {error}") from None
        gram = rows.double() @ rows.double().T
        off = float((gram - torch.eye(len(gram))).abs().max())
        if off > _ROUNDINGS * torch.finfo(rows.dtype).eps:
            warnings.warn(
                f"The rotation in {self.path} is up to {off:.1g} from orthonormal: it "
                "may have been rounded.",
                stacklevel=4,
            )
        return made

    def check_fit(self, one: Tensor, other: Tensor) -> None:
        """Refuse two tensors of different shapes."""
        if one.shape != other.shape:
            raise FileFormatError(
                f"The tensors of {self.path} do not fit: {tuple(one.shape)} and "
                f"{tuple(other.shape)}."
            )

    def times(self, matrix: Tensor, vector: Tensor) -> Tensor:
        """Their product in float64, in the dtype of the vector."""
        self.check_fit(matrix[0], vector)
        return (matrix.double() @ vector.double()).to(vector.dtype)


def rebuilt(original: Tensor, base: Tensor, path: Path) -> Tensor:
    """R from PyTorch's orthogonal parametrisation, by PyTorch itself, in float64.

    Raises:
        FileFormatError: If the two do not fit.
    """
    d, r = original.shape
    if base.shape not in ((d, d), (d, r)) or r > d:
        raise FileFormatError(
            f"The rotation in {path} is damaged: {tuple(original.shape)} beside a base "
            f"of {tuple(base.shape)}."
        )
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(torch.eye(d, r, dtype=torch.float64))
    nn.utils.parametrizations.orthogonal(holder)
    rotation = holder.parametrizations.weight
    with torch.no_grad():
        rotation.original.copy_(original)
        rotation[0].base = base.double()
        return holder.weight.detach().to(original.dtype)
