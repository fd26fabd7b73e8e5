"""Steering whose numbers can be trained: parameters out, steering of them back in.

A LoReFT's rotation has to stay orthonormal, so what is trained is a matrix whose rows
are made orthonormal at every use. A module is trained as a copy; every other form in
its own tensors.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.model.sites import SiteKey
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.form import Steering
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.vector import Vector

_FORMS = (Vector, Affine, LoReFT, LowRankMLP, Heads)
# Root mean square that stands for that of a tensor of zeros, which has none.
_UNIT = 1e-2


@dataclass(frozen=True)
class Trainable:
    """One steer and the tensors that are trained in its place.

    Attributes:
        steering: The steer as it was; of a module, the copy that is trained.
        parameters: By name; they require gradients.
    """

    steering: Steering
    parameters: Mapping[str, Tensor]

    def current(self) -> Steering:
        """The steer made of the parameters, with gradients."""
        if isinstance(self.steering, Custom):
            return self.steering
        fields = dict(self.parameters)
        if isinstance(self.steering, LoReFT):
            # As the affine map it is: a LoReFT looks at its rotation when it is made.
            rotation = orthonormal(fields["rotation"])
            return Affine(
                fields["weight"] - rotation, rotation.T, rotation.T @ fields["bias"]
            )
        return dataclasses.replace(self.steering, **fields)  # pyright: ignore

    @torch.no_grad()
    def frozen(self) -> Steering:
        """The same as a steer of its own, without gradients."""
        if isinstance(self.steering, Custom):
            module = copy.deepcopy(self.steering.function)
            assert isinstance(module, nn.Module)
            return Custom(module.requires_grad_(False), self.steering.strength)
        fields = {name: part.detach().clone() for name, part in self.parameters.items()}
        if isinstance(self.steering, LoReFT):
            fields["rotation"] = orthonormal(fields["rotation"])
        return dataclasses.replace(self.steering, **fields)  # pyright: ignore


class Numbers:
    """All parameters of some steers as one vector, each tensor in units of its size.

    The vector is what the parameters have moved from where they were.
    """

    def __init__(self, parts: Iterable[Trainable]) -> None:
        self.tensors = [t for part in parts for t in part.parameters.values()]
        self.start = [t.detach().clone() for t in self.tensors]
        self.units = [
            float(t.square().mean().sqrt()) or _UNIT for t in self.start if t.numel()
        ]

    def zero(self) -> np.ndarray:
        """Where they were."""
        return np.zeros(sum(t.numel() for t in self.tensors))

    @torch.no_grad()
    def set(self, point: np.ndarray) -> None:
        """Move the parameters, and drop their gradients."""
        moved = torch.from_numpy(point.copy()).split([t.numel() for t in self.tensors])
        for tensor, start, unit, own in zip(
            self.tensors, self.start, self.units, moved, strict=True
        ):
            tensor.copy_(start + unit * own.reshape(start.shape).to(start))
            tensor.grad = None

    def gradient(self) -> np.ndarray:
        """The gradients that are left on the parameters, in the same units."""
        return np.concatenate(
            [
                (unit * (torch.zeros_like(t) if t.grad is None else t.grad))
                .double()
                .cpu()
                .numpy()
                .ravel()
                for t, unit in zip(self.tensors, self.units, strict=True)
            ]
        )


def orthonormal(rows: Tensor) -> Tensor:
    """Rows [r, d] made orthonormal one after the other; such rows stay as they are."""
    q, r = torch.linalg.qr(rows.T)
    return (q * r.diagonal().sign()).T  # QR leaves the signs open


def as_trainable(key: SiteKey, steering: object, dtype: torch.dtype) -> Trainable:
    """A steer with parameters of its own; the one that is given is left alone.

    Args:
        key: Its layer and site, for messages.
        steering: The steer.
        dtype: Of the parameters.

    Raises:
        ArgumentError: If it has none.
    """
    if isinstance(steering, Custom) and isinstance(steering.function, nn.Module):
        module = copy.deepcopy(steering.function).to(dtype)
        own = dict(module.named_parameters())
        # A module that was fitted has its gradients off; then all of it is trained.
        moving = {n: p for n, p in own.items() if p.requires_grad} or own
        if moving:
            for part in moving.values():
                part.requires_grad_(True)
            return Trainable(Custom(module, steering.strength), moving)
    elif isinstance(steering, _FORMS):
        fields = {
            f.name: getattr(steering, f.name) for f in dataclasses.fields(steering)
        }
        return Trainable(
            steering,
            {
                name: value.detach().to(dtype).clone().requires_grad_(True)
                for name, value in fields.items()
                if isinstance(value, Tensor)
            },
        )
    raise ArgumentError(
        f"Expected steering with parameters to train at {key!r}, got "
        f"{type(steering).__name__}. Wrap a module of yours in `equiv.Custom`."
    )
