"""What a form of steering is: any map h → shift that knows how large it is.

The forms have a file each: `vector`, `affine` (linear where it has no bias), `loreft`,
`mlp`, `heads`, `oracle`, and `custom` for a user's own.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

FORMS = ("vector", "affine")  # fitted by `equiv.check` unless asked otherwise


class Steering(ABC):
    """Any map h → shift; `steering(h)` is what is added at the site.

    `h` has shape [*batch, d], the width of what is read; the shift [*batch, e], the
    width of where it is written (the same, unless a steer reads another site than it
    writes), in the dtype and on the device of `h`. Forms are frozen dataclasses of
    tensors, and every map computes in the dtype of `h`.
    """

    @abstractmethod
    def __call__(self, h: Tensor) -> Tensor:
        """The shift for activations `h` [*batch, d]."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """How many numbers the map has."""

    @abstractmethod
    def scaled(self, strength: float) -> "Steering":
        """The same map, `strength` times as strong."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """The same map with its floating tensors on a device, in a dtype."""
        if not dataclasses.is_dataclass(self):
            return self
        moved = {
            field.name: value.to(device, dtype)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
            and value.is_floating_point()
        }
        return dataclasses.replace(self, **moved)


def like(h: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors in the dtype and on the device of `h`; a part that is `None` is zero.

    Example:
        >>> like(torch.zeros(2, dtype=torch.float64), torch.ones(1), None)
        (tensor([1.], dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    return tuple(
        [h.new_zeros(()) if part is None else moved(h, part) for part in parts]
    )


def moved(h: Tensor, part: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of `h`; itself where it is that."""
    if part.dtype == h.dtype and part.device == h.device:
        return part  # in a running model even a cast of nothing takes time
    return part.to(h.device, h.dtype)
