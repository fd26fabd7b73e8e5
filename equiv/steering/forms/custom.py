"""A user's own form: any module or function h → shift."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.steering.forms.form import Steering


@dataclass(frozen=True)
class Custom(Steering):
    """Any callable h → shift, times a strength.

    Its size is its own `num_parameters`, or the number of its parameters if it is a
    module; anything else has to be wrapped in something that knows its size.

    Example:
        >>> steering = Custom(nn.Linear(3, 3, bias=False))
        >>> steering.num_parameters, steering(torch.zeros(2, 3)).shape
        (9, torch.Size([2, 3]))
    """

    function: Callable[[Tensor], Tensor]
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(
                f"Expected a callable h → shift, got {type(self.function).__name__}."
            )
        if self._size() is None:
            raise ArgumentError(
                f"Expected {type(self.function).__name__} to have `num_parameters`, "
                "the number of its parameters, or to be a module."
            )

    def _size(self) -> int | None:
        found: Any = getattr(self.function, "num_parameters", None)
        found = found() if callable(found) else found
        if found is None and isinstance(self.function, nn.Module):
            found = sum(p.numel() for p in self.function.parameters())
        return found

    def __call__(self, h: Tensor) -> Tensor:
        """Strength times the function's shift."""
        shift = self.function(h)
        return shift if self.strength == 1 else shift * self.strength

    @property
    def num_parameters(self) -> int:
        """What the function says of itself."""
        return self._size() or 0

    def scaled(self, strength: float) -> "Custom":
        """The same function, its strength times `strength`."""
        return Custom(self.function, self.strength * strength)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """A copy of a module there; any other function is left as it is."""
        if not isinstance(self.function, nn.Module):
            return self
        return type(self)(copy.deepcopy(self.function).to(device, dtype), self.strength)
