"""A steer on its way into a model: its tensors where the activations are."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.model.sites import SiteKey
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.form import Steering
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP

Place = tuple[torch.device, torch.dtype]


class Placed:
    """A steer that keeps a copy of its tensors for every device and dtype it meets.

    What requires a gradient is used as it is at every call, so that a steer can be
    trained while it is applied. Anything else is taken as it is when it is first used.
    """

    def __init__(self, steering: Callable[[Tensor], object], key: SiteKey) -> None:
        self.steering, self.key = steering, key
        # With the name of the device, which takes PyTorch longer than a sum.
        self.at: dict[Place, tuple[Callable[[Tensor], object], str]] = {}

    def __repr__(self) -> str:
        return f"the steering at {self.key!r}"

    def __call__(self, x: Tensor) -> object:
        """The shift for activations `x` [*batch, d], in their dtype, autocast or not.

        Raises:
            ArgumentError: If the steer cannot be applied to them.
        """
        place = (x.device, x.dtype)
        if place not in self.at:
            self.prepare(place)
        form, kind = self.at[place]
        try:
            if kind != "meta" and torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return form(x)
            return form(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ArgumentError(
                f"The steering at {self.key!r} cannot be applied to activations of "
                f"shape {tuple(x.shape)}: {str(error).rstrip('.')}."
            ) from error

    def prepare(self, place: Place) -> None:
        """Make the copy for a place."""
        self.at[place] = _placed(self.steering, place), place[0].type


def _placed(
    steering: Callable[[Tensor], object], place: Place
) -> Callable[[Tensor], object]:
    if not isinstance(steering, Steering):
        return steering
    tensors = list(_tensors(steering))
    if all((t.device, t.dtype) == place for t in tensors if t.is_floating_point()):
        there = steering
    elif any(t.requires_grad for t in tensors) and not isinstance(steering, Custom):
        there = steering  # forms follow the dtype of what they read by themselves
    else:
        # Tensors made in inference mode could not be used outside it later.
        with torch.inference_mode(False), torch.no_grad():
            there = steering.to(*place)
    if isinstance(there, LoReFT) and not any(t.requires_grad for t in tensors):
        return _folded(there)
    return there


def _folded(steering: LoReFT) -> LowRankMLP:
    """The same map with W − R formed once instead of in every call."""
    with torch.inference_mode(False), torch.no_grad():
        down = steering.weight - steering.rotation
    return LowRankMLP(
        down, steering.rotation.T, inner=steering.bias, activation="identity"
    )


def _tensors(steering: Steering) -> Iterator[Tensor]:
    """Tensors of a form, and of a module that it holds."""
    for value in vars(steering).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
