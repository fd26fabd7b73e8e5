"""Steers folded into the layer that they stand before or behind: the formulas.

Symbols, for a last projection p = W z + b: z what it is given, p what comes out. A
steer that reads x adds A x + c. A steer reads its site before what is added there, and
after what is added before it in the block. So, with A₀, c₀ what is written to z (read
there), A₁, c₁ what reads p and A₂, c₂ what reads z, both added to p:

    p' = W (z + A₀ z + c₀) + b  =  (W + W A₀) z + (b + W c₀)
    out = p' + A₁ p' + c₁ + A₂ z + c₂
        = (W + W A₀ + A₁ (W + W A₀) + A₂) z + b + W c₀ + A₁ (b + W c₀) + c₁ + c₂

Layers W that read u + A u + c become W + W A with biases b + W c. A LayerNorm
γ ⊙ n + β that is followed by h + s ⊙ h + c becomes γ + s ⊙ γ and β + s ⊙ β + c.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from equiv.model.sites import Site
from equiv.steering.weights.deltas import as_dense, of_reader, of_writer, total
from equiv.steering.weights.halves import Half, Layer
from equiv.steering.weights.parts import Parts
from equiv.update.low_rank import Delta

Placed = Mapping[Site, Parts]


def into_projection(
    layer: Layer, half: Half, own: Placed
) -> tuple[Delta | None, Tensor]:
    """(ΔW, Δb) of a last projection, of what is added before and behind it."""
    weight, bias = layer.weight, layer.bias
    inside = {s: parts for s, parts in own.items() if s.write == half.given}
    behind = {s: parts for s, parts in own.items() if s.write != half.given}
    moved = total(of_reader(weight, parts) for parts in inside.values())
    offset = weight @ with_biases(weight.new_zeros(layer.shape[1]), inside.values())
    # What the steers behind the projection read: p' = effective z + constant.
    effective = weight if moved is None else weight + as_dense(moved)
    constant = offset if bias is None else bias + offset
    terms, shift = [moved], offset
    for site, parts in behind.items():
        if site.read == half.written:
            terms.append(of_writer(effective, parts))
            shift = shift + parts.linear(constant)
        elif not parts.is_fixed:
            terms.append(of_reader(torch.eye(len(offset)).to(weight), parts))
    return total(terms), with_biases(shift, behind.values())


def into_reader(layer: Layer, steers: Iterable[Parts]) -> tuple[Delta | None, Tensor]:
    """(ΔW, Δb) of a layer, of what is added to its input."""
    weight, steers = layer.weight, list(steers)
    zero = weight.new_zeros(layer.shape[1])
    delta = total(of_reader(weight, parts) for parts in steers)
    return delta, weight @ with_biases(zero, steers)


def into_norm(layer: Layer, steers: Iterable[Parts]) -> tuple[Delta | None, Tensor]:
    """(Δγ, Δβ) of a LayerNorm, of what is added to its output entry by entry."""
    gain, steers = layer.weight, list(steers)
    scale = torch.zeros_like(gain)
    for parts in steers:
        scale = scale if parts.scale is None else scale + parts.scale
    shift = scale * (0 if layer.bias is None else layer.bias)
    return (scale * gain if bool(scale.any()) else None), with_biases(shift, steers)


def with_biases(start: Tensor, steers: Iterable[Parts]) -> Tensor:
    """What is there already, and the biases of some steers."""
    for parts in steers:
        start = start if parts.bias is None else start + parts.bias
    return start
