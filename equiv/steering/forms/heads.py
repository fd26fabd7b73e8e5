"""Per-head offset and scale, as LoFiT and JoLA train them; at `attn_heads`.

Symbols, per head: z its output before the output projection [head_dim], s and v its
scale and offset [head_dim], g₁ and g₂ its gates (1 where there are none):

    z  →  (1 + g₁ s) ⊙ z + g₂ v        shift = g₁ s ⊙ z + g₂ v
"""

from dataclasses import dataclass

from torch import Tensor

from equiv.errors import ArgumentError
from equiv.steering.forms.form import Steering, like


@dataclass(frozen=True)
class Heads(Steering):
    """Offset and scale per head: shift = g₁ s ⊙ z + g₂ v.

    A LoFiT has no gates and either part or both; a JoLA has both gates, as their
    value (after the hard-concrete squashing), not as the logarithm that is trained.

    Example:
        >>> import torch
        >>> offset = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> steering = Heads(offset=offset)  # two heads of two
        >>> steering(torch.zeros(4)), steering.num_parameters
        (tensor([1., 1., 0., 0.]), 2)
    """

    offset: Tensor | None = None  # [heads, head_dim]
    scale: Tensor | None = None  # [heads, head_dim]
    gate_offset: Tensor | None = None  # [heads]
    gate_scale: Tensor | None = None  # [heads]

    def __post_init__(self) -> None:
        shapes = {p.shape for p in (self.offset, self.scale) if p is not None}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ArgumentError(
                "Expected `offset`, `scale` or both, of one shape [heads, head_dim], "
                f"got {[tuple(shape) for shape in shapes]}."
            )
        for name, part in (("offset", self.offset), ("scale", self.scale)):
            gate = getattr(self, f"gate_{name}")
            heads = next(iter(shapes))[0]
            if gate is not None and (part is None or gate.shape != (heads,)):
                raise ArgumentError(
                    f"Expected `gate_{name}` of shape ({heads},) beside `{name}`, got "
                    f"{tuple(gate.shape)}."
                )

    def __call__(self, h: Tensor) -> Tensor:
        """The shift of all heads, [*batch, heads · head_dim]."""
        scale, offset = like(h, *self.parts())
        return h * scale + offset.expand_as(h)

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Effective (scale, offset), each [heads · head_dim], gates applied."""
        scale, offset = (
            None
            if part is None
            else (part if gate is None else part * gate[:, None]).flatten()
            for part, gate in (
                (self.scale, self.gate_scale),
                (self.offset, self.gate_offset),
            )
        )
        return scale, offset

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        part = self.offset if self.offset is not None else self.scale
        assert part is not None
        return part.shape[0]

    @property
    def num_parameters(self) -> int:
        """Numbers of the heads that are steered, and their gates.

        A head whose offset and scale are zero is not steered and counts nothing.
        """
        counted = 0
        for part, gate in (
            (self.scale, self.gate_scale),
            (self.offset, self.gate_offset),
        ):
            if part is not None:
                steered = len(part) if part.is_meta else int(part.any(1).sum())
                counted += steered * (part.shape[1] + (gate is not None))
        return counted

    def scaled(self, strength: float) -> "Heads":
        """Offset and scale times `strength`."""
        return Heads(
            None if self.offset is None else self.offset * strength,
            None if self.scale is None else self.scale * strength,
            self.gate_offset,
            self.gate_scale,
        )
