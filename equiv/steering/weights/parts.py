"""The affine part of a form, where that is all there is.

    shift = up (down h) + scale ⊙ h + bias

Every form that is affine in what it reads is these parts, in float64; one that is
missing is zero. A low-rank MLP is affine if its activation is the identity, and
constant if one of its projections is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.errors import ArgumentError, NoExactFormError
from equiv.model.sites import SiteKey
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import ACTIVATIONS, LowRankMLP
from equiv.steering.forms.oracle import Offset, Overwrite
from equiv.steering.forms.vector import Vector

_EXACT = "Vector, Affine, LoReFT, Heads, or LowRankMLP with activation identity"


@dataclass(frozen=True)
class Parts:
    """shift = up (down h) + scale ⊙ h + bias; a part that is `None` is zero.

    Example:
        >>> Parts(scale=torch.ones(2), bias=torch.zeros(2)).without_zeros()
        Parts(up=None, down=None, scale=tensor([1., 1.]), bias=None)
    """

    up: Tensor | None = None  # [e, r]
    down: Tensor | None = None  # [r, d]
    scale: Tensor | None = None  # [d]
    bias: Tensor | None = None  # [e]

    @property
    def is_fixed(self) -> bool:
        """Whether the shift is the same whatever h is."""
        return self.up is None and self.scale is None

    @property
    def is_nothing(self) -> bool:
        """Whether there is no shift at all."""
        return self.is_fixed and self.bias is None

    @property
    def transposed(self) -> "Parts":
        """The transpose of the linear part."""
        up, down = self.up, self.down
        if up is None or down is None:
            return Parts(scale=self.scale)
        return Parts(up=down.T, down=up.T, scale=self.scale)

    def linear(self, x: Tensor) -> Tensor:
        """What is added for one activation [d], less the bias."""
        scaled = None if self.scale is None else self.scale * x
        if self.up is None or self.down is None:
            return torch.zeros_like(x) if scaled is None else scaled
        found = self.up @ (self.down @ x)
        return found if scaled is None else found + scaled

    def without_zeros(self) -> "Parts":
        """The same with `None` for what is zero everywhere."""
        low = _nonzero(self.up) is not None and _nonzero(self.down) is not None
        return Parts(
            self.up if low else None,
            self.down if low else None,
            _nonzero(self.scale),
            _nonzero(self.bias),
        )


def parts_of(
    steering: Callable[[Tensor], object],
    key: SiteKey,
    device: torch.device,
    *,
    reads: int,
    writes: int,
) -> Parts:
    """What a steer adds, in float64.

    Args:
        steering: The steer.
        key: Its layer and site, for messages.
        device: Where the parts are to be.
        reads: Width of the site that it reads.
        writes: Width of the site that it writes.

    Raises:
        NoExactFormError: If it is not affine in what it reads.
        ArgumentError: If it has other widths, or entries that are not finite.
    """
    raw = _parts(steering)
    if isinstance(raw, str):
        raise no_weight_edit(key, raw)
    parts = Parts(
        *(
            None if t is None else t.detach().to(device, torch.float64)
            for t in (raw.up, raw.down, raw.scale, raw.bias)
        )
    )
    _check(parts, key, reads, writes)
    return parts.without_zeros()


def no_weight_edit(key: SiteKey, reason: str) -> NoExactFormError:
    """The refusal of a steer, with its reason."""
    return NoExactFormError(f"The steering at {key!r} is no weight edit: {reason}.")


def _parts(steering: Callable[[Tensor], object]) -> Parts | str:
    """The parts, or why there are none; only of the very classes."""
    if type(steering) is Vector:
        return Parts(bias=steering.vector)
    if type(steering) is LoReFT:
        return _parts(steering.affine())
    if type(steering) is Affine:
        return Parts(steering.up, steering.down, bias=steering.bias)
    if type(steering) is Heads:
        scale, offset = steering.parts()
        return Parts(scale=scale, bias=offset)
    if isinstance(steering, LowRankMLP) and type(steering) is LowRankMLP:
        return _parts_of_mlp(steering)
    kind = type(steering).__name__
    if type(steering) in (Overwrite, Offset):
        return f"an {kind} gives every token a shift of its own"
    return f"{kind} may be any function; expected {_EXACT}"


def _parts_of_mlp(steering: LowRankMLP) -> Parts | str:
    up, down = steering.up.detach().double(), steering.down.detach().double()
    inner = 0 if steering.inner is None else steering.inner.detach().double()
    bias = 0 if steering.bias is None else steering.bias.detach().double()
    if steering.activation == "identity":
        return Parts(up, down, bias=up @ (up.new_zeros(up.shape[1]) + inner) + bias)
    if up.any() and down.any():
        return (
            f"a LowRankMLP with activation {steering.activation} is not affine in what "
            "it reads"
        )
    constant = ACTIVATIONS[steering.activation](up.new_zeros(up.shape[1]) + inner)
    return Parts(bias=up @ constant + bias)


def _check(parts: Parts, key: SiteKey, reads: int, writes: int) -> None:
    shapes = {
        "up": (writes, None),
        "down": (None, reads),
        "scale": (reads,),
        "bias": (writes,),
    }
    for name, shape in shapes.items():
        part = getattr(parts, name)
        if part is None:
            continue
        same = len(shape) == part.ndim and all(
            want in (None, have) for want, have in zip(shape, part.shape, strict=True)
        )
        if not same or (name == "scale" and reads != writes):
            raise ArgumentError(
                f"Expected the steering at {key!r} to read width {reads} and write "
                f"width {writes}, got `{name}` of shape {tuple(part.shape)}."
            )
        if not bool(torch.isfinite(part).all()):
            raise ArgumentError(
                f"The steering at {key!r} has NaN or infinite entries in `{name}`."
            )


def _nonzero(part: Tensor | None) -> Tensor | None:
    return part if part is not None and bool(part.any()) else None
