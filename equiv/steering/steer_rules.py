"""Which weight differences are steers, and at which site: one block at a time.

Symbols as in `weight_rules`: p = W z + b a last projection, ΔW and Δb its differences.

- ΔW z + Δb is added to p: a steer that reads z and writes what the half adds to the
  stream. Behind a norm it has to come through z: A z + k with W A = ΔW and W k = Δb,
  where W reaches them.
- A bias Δv of the values moves every head's output by its own part of it, since the
  weights of attention sum to 1: z becomes z + c, with c = Δv once per query head. Then
  (W + ΔW)(z + c) + b + Δb = p + ΔW z + (W + ΔW) c + Δb.
- Layers W that read u with ΔW = W M and Δb = W v for one M and one v: M u + v.
- A LayerNorm γ ⊙ n + β that ends the sum of a stream: Δγ/γ ⊙ (h − β) + Δβ, by entry.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equiv.errors import NoExactFormError
from equiv.model.families import Architecture
from equiv.steering.affine import Affine
from equiv.steering.deltas import as_dense, transposed
from equiv.steering.forms import Steering
from equiv.steering.halves import Half, Layer, halves_of, layer_at
from equiv.steering.heads import Heads
from equiv.steering.solving import (
    in_factors,
    noise_of,
    reading,
    reading_fixed,
    stacked,
)
from equiv.steering.vector import Vector
from equiv.update.low_rank import Delta, LowRank, norm_of

# Path of the last projection → path of the layer that makes the values, and which of
# how many parts of its output they are.
_VALUES = {
    "self_attn.o_proj": ("self_attn.v_proj", 0, 1),
    "attn.c_proj": ("attn.c_attn", 2, 3),
    "attention.output.dense": ("attention.self.value", 0, 1),
}


class Differences:
    """The differences in one block, each to be taken by the rule that explains it.

    Attributes:
        left: Path of the parameter, from the block → difference; not taken yet.
    """

    def __init__(
        self, model: nn.Module, prefix: str, deltas: Mapping[str, Delta]
    ) -> None:
        self.model, self.prefix = model, prefix
        start = f"{prefix}."
        self.left = {
            name.removeprefix(start): delta
            for name, delta in deltas.items()
            if name.startswith(start)
        }

    def changes(self, path: str) -> bool:
        """Whether a layer's weight or bias is among what is left."""
        return f"{path}.weight" in self.left or f"{path}.bias" in self.left

    def layer(self, path: str) -> Layer:
        """A layer of the block."""
        return layer_at(self.model, f"{self.prefix}.{path}")

    def take_weight(self, path: str) -> Delta | None:
        """The difference of a layer's weight, [out, in], or [d] of a LayerNorm."""
        delta = self.left.pop(f"{path}.weight", None)
        if delta is None or norm_of(delta) == 0:
            return None
        return transposed(delta) if self.layer(path).is_conv1d else delta

    def take_bias(self, path: str) -> Tensor | None:
        """The difference of a layer's bias."""
        delta = self.left.pop(f"{path}.bias", None)
        found = None if delta is None else as_dense(delta)
        return found if found is not None and bool(found.any()) else None


def steers_of_block(known: Architecture, own: Differences) -> dict[str, Steering]:
    """Site → steer, of what the rules take from a block's differences.

    Raises:
        NoExactFormError: If a difference would have to be a steer, and is none.
    """
    attention, mlp = halves_of(known)
    found: dict[str, Steering] = {}
    moved = _moved_heads(own, attention)
    for half, heads in ((attention, moved), (mlp, None)):
        if half is mlp:
            found |= _readers(own, known)
        found |= _half(own, half, heads, behind_norm=known.norms_writes)
        if half.norm is not None and own.changes(half.norm):
            found |= _norm(own, half.norm, half.stream)
    return found


def _half(
    own: Differences, half: Half, heads: Tensor | None, *, behind_norm: bool
) -> dict[str, Steering]:
    """The steer of one half's last projection, and of its heads' c."""
    if not own.changes(half.projection) and heads is None:
        return {}
    layer = own.layer(half.projection)
    delta, bias = own.take_weight(half.projection), own.take_bias(half.projection)
    if behind_norm:
        return _given(half, *_through(layer, half, delta, bias), heads)
    if heads is not None:
        weight = layer.weight if delta is None else layer.weight + as_dense(delta)
        bias = _sum(bias, weight @ heads)
    if delta is not None:
        factors = in_factors(delta, noise_of(delta, layer.weight, layer.dtype))
        steer = Affine(factors.right, factors.left, bias)
        return {f"{half.given}->{half.written}": steer}
    return {} if bias is None else {half.written: Vector(bias)}


def _through(
    layer: Layer, half: Half, delta: Delta | None, bias: Tensor | None
) -> tuple[LowRank | None, Tensor | None]:
    """(A, k) with W A = ΔW and W k = Δb."""
    factors = fixed = None
    if delta is not None:
        noise = noise_of(delta, layer.weight, layer.dtype)
        factors, share = reading(layer.weight, in_factors(delta, noise), noise)
        _check_reached(share, f"{layer.name}.weight", half)
    if bias is not None:
        noise = noise_of(bias, _bias_of(layer), layer.dtype)
        fixed, share = reading_fixed(layer.weight, bias, noise)
        _check_reached(share, f"{layer.name}.bias", half)
    return factors, fixed


def _given(
    half: Half, factors: LowRank | None, fixed: Tensor | None, heads: Tensor | None
) -> dict[str, Steering]:
    """The steer A z + k + c + A c of what a projection is given."""
    total = _sum(fixed, heads)
    if factors is not None:
        if heads is not None:
            total = _sum(total, factors.left @ (factors.right @ heads))
        return {half.given: Affine(factors.right, factors.left, total)}
    return {} if total is None else {half.given: Vector(total)}


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum; `None` is zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _check_reached(share: float, name: str, half: Half) -> None:
    if share:
        raise no_steering(
            name,
            f"a norm follows, so it would have to come through {half.given}, and "
            f"{share:.2g} of it is out of the projection's reach from there",
        )


def _moved_heads(own: Differences, half: Half) -> Tensor | None:
    """By how much a bias of the values moves what the heads give."""
    path, part, parts = _VALUES[half.projection]
    name = f"{path}.bias"
    if name not in own.left:
        return None
    whole = as_dense(own.left[name])
    pieces = whole.tensor_split(parts)
    if any(bool(p.any()) for i, p in enumerate(pieces) if i != part):
        raise no_steering(
            f"{own.prefix}.{name}",
            "its query or key part changes what the heads attend to",
        )
    values = pieces[part]
    del own.left[name]
    if not bool(values.any()):
        return None
    width = own.layer(half.projection).weight.shape[1]
    if len(values) == width:
        return values
    # Grouped queries: each head of the values serves several neighbouring ones.
    attention = own.model.get_submodule(f"{own.prefix}.{path.rpartition('.')[0]}")
    size = int(attention.head_dim)  # type: ignore[arg-type]
    grouped = values.view(-1, size).repeat_interleave(width // len(values), 0)
    return grouped.flatten()


def _readers(own: Differences, known: Architecture) -> dict[str, Steering]:
    """The steer of the MLP's input that does what its readers' differences do."""
    paths = known.mlp_readers
    if not any(own.changes(path) for path in paths):
        return {}
    layers = [own.layer(path) for path in paths]
    weights = [layer.weight for layer in layers]
    deltas = [own.take_weight(path) for path in paths]
    biases = [own.take_bias(path) for path in paths]
    weight, delta = torch.cat(weights), stacked(deltas, weights)
    factors = fixed = None
    if delta is not None:
        noise = noise_of(delta, weight, layers[0].dtype)
        factors, share = reading(weight, in_factors(delta, noise), noise)
        _check_common(share, layers, "linear map of")
    if any(bias is not None for bias in biases):
        before = [_bias_of(layer) for layer in layers]
        wanted = torch.cat(
            [
                torch.zeros_like(old) if bias is None else bias
                for bias, old in zip(biases, before, strict=True)
            ]
        )
        noise = noise_of(wanted, torch.cat(before), layers[0].dtype)
        fixed, share = reading_fixed(weight, wanted, noise)
        _check_common(share, layers, "vector at")
    if factors is not None:
        return {"mlp_in": Affine(factors.right, factors.left, fixed)}
    return {} if fixed is None else {"mlp_in": Vector(fixed)}


def _check_common(share: float, layers: list[Layer], what: str) -> None:
    if share:
        names = " and ".join(f"`{layer.name}`" for layer in layers)
        raise NoExactFormError(
            f"The update of {names} has no exact steering form: no one {what} mlp_in, "
            f"which they read, does what it does; the best leaves {share:.2g} of it."
        )


def _norm(own: Differences, path: str, stream: str) -> dict[str, Steering]:
    """The steer of a stream that does what its LayerNorm's differences do."""
    layer = own.layer(path)
    gain, delta, bias = layer.weight, own.take_weight(path), own.take_bias(path)
    if delta is None:
        return {} if bias is None else {stream: Vector(bias)}
    change = as_dense(delta)
    if bool(((gain == 0) & (change != 0)).any()):
        raise no_steering(
            f"{layer.name}.weight", "where it is zero, nothing is left to be scaled"
        )
    scale = torch.where(change == 0, 0.0, change / gain)
    offset = -scale * _bias_of(layer)
    offset = offset if bias is None else offset + bias
    return {stream: Heads(offset=offset[None], scale=scale[None])}


def _bias_of(layer: Layer) -> Tensor:
    """The layer's bias; zeros where it has none."""
    bias = layer.bias
    return layer.weight.new_zeros(len(layer.weight)) if bias is None else bias


def no_steering(name: str, reason: str) -> NoExactFormError:
    """The refusal of a parameter's difference, with its reason."""
    return NoExactFormError(
        f"The update of `{name}` has no exact steering form: {reason}."
    )
