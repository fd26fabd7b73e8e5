"""Oracles: steering that knows the tuned model's own activations.

`Overwrite` sets the site to a target, so what steering did below is made up for;
applied at every layer it is exact. `Offset` adds the shift that was seen in the
unsteered model, whatever steering did below: at several layers at once the shifts of
earlier layers arrive a second time through the stream.
"""

from dataclasses import dataclass

from torch import Tensor

from equiv.steering.forms.form import Steering


@dataclass(frozen=True)
class Overwrite(Steering):
    """The sequential oracle: whatever h is, h + shift is `target`, per token.

    No parametrisation: it needs the tuned model's own activations.

    Example:
        >>> import torch
        >>> h = torch.tensor([1.0, 2.0])
        >>> h + Overwrite(torch.zeros(2))(h)
        tensor([0., 0.])
    """

    target: Tensor  # like h

    def __call__(self, h: Tensor) -> Tensor:
        """Target − h."""
        return self.target.to(h.device, h.dtype) - h

    @property
    def num_parameters(self) -> int:
        """Zero: nothing is fitted."""
        return 0

    def scaled(self, strength: float) -> "Overwrite":
        """Not defined for strengths other than 1."""
        if strength != 1:
            raise ValueError(f"Expected strength 1 for an overwrite, got {strength}.")
        return self


@dataclass(frozen=True)
class Offset(Steering):
    """The simultaneous oracle: per token, a shift that was measured elsewhere.

    Example:
        >>> import torch
        >>> Offset(torch.ones(3, 2))(torch.zeros(3, 2)).sum()
        tensor(6.)
    """

    offset: Tensor  # like the shift

    def __call__(self, h: Tensor) -> Tensor:
        """The offset, whatever h is."""
        return self.offset.to(h.device, h.dtype)

    @property
    def num_parameters(self) -> int:
        """Zero: nothing is fitted."""
        return 0

    def scaled(self, strength: float) -> "Offset":
        """The offset times `strength`."""
        return Offset(self.offset * strength)
