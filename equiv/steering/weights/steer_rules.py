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

import torch
from torch import Tensor

from equiv.errors import NoExactFormError
from equiv.model.families import Architecture
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.vector import Vector
from equiv.steering.weights.deltas import as_dense
from equiv.steering.weights.differences import Difference, Differences
from equiv.steering.weights.halves import Half, halves_of
from equiv.steering.weights.solving import (
    in_factors,
    noise_of,
    reading,
    reading_fixed,
    stacked,
)
from equiv.update.low_rank import LowRank

# Path of the last projection → path of the layer that makes the values, and which of
# how many parts of its output they are.
_VALUES = {
    "self_attn.o_proj": ("self_attn.v_proj", 0, 1),
    "attn.c_proj": ("attn.c_attn", 2, 3),
    "attention.output.dense": ("attention.self.value", 0, 1),
}


def covered(known: Architecture) -> set[str]:
    """The parameters that a rule is for, by their paths from the block."""
    halves = halves_of(known)
    layers = [*known.mlp_readers, *(half.projection for half in halves)]
    layers += [half.norm for half in halves if half.norm is not None]
    found = {f"{path}.{kind}" for path in layers for kind in ("weight", "bias")}
    values = [_VALUES[h.projection][0] for h in halves if h.projection in _VALUES]
    return found | {f"{path}.bias" for path in values}


def steers_of_block(known: Architecture, own: Differences) -> dict[str, Steering]:
    """Site → steer, of the differences in one block that are `covered`.

    Raises:
        NoExactFormError: If one is no steer.
        UnsupportedModelError: If its layer is no plain one, or shares its weight.
    """
    attention, mlp = halves_of(known)
    moved = _moved_heads(own, attention)
    found: dict[str, Steering] = {}
    if moved is not None or own.changes(attention.projection):
        found |= _half(own, attention, moved, known)
    if any(own.changes(path) for path in known.mlp_readers):
        found |= _readers([own.at(path) for path in known.mlp_readers])
    if own.changes(mlp.projection):
        found |= _half(own, mlp, None, known)
    for half in (attention, mlp):
        if half.norm is not None and own.changes(half.norm):
            found |= _norm(own.at(half.norm), half.stream)
    return found


def _half(
    own: Differences, half: Half, heads: Tensor | None, known: Architecture
) -> dict[str, Steering]:
    """The steer of a half's last projection, and of c, what moves its heads."""
    change = own.at(half.projection)
    if known.norms_writes:
        return _given(half, *_through(change, half), heads)
    weight, bias = change.layer.weight, change.bias
    if change.weight is None:
        if heads is not None:
            bias = _sum(bias, weight @ heads)
        return {} if bias is None else {half.written: Vector(bias)}
    if heads is not None:
        bias = _sum(bias, (weight + as_dense(change.weight)) @ heads)
    noise = noise_of(change.weight, weight, change.layer.dtype)
    factors = in_factors(change.weight, noise)
    steer = Affine(factors.right, factors.left, bias)
    return {f"{half.given}->{half.written}": steer}


def _through(change: Difference, half: Half) -> tuple[LowRank | None, Tensor | None]:
    """(A, k) with W A = ΔW and W k = Δb."""
    name, dtype, weight = change.layer.name, change.layer.dtype, change.layer.weight
    factors = fixed = None
    if change.weight is not None:
        noise = noise_of(change.weight, weight, dtype)
        factors, share = reading(weight, in_factors(change.weight, noise), noise)
        _check_reached(share, f"{name}.weight", half)
    if change.bias is not None:
        noise = noise_of(change.bias, change.biases[0], dtype)
        fixed, share = reading_fixed(weight, change.bias, noise)
        _check_reached(share, f"{name}.bias", half)
    return factors, fixed


def _given(
    half: Half, factors: LowRank | None, fixed: Tensor | None, heads: Tensor | None
) -> dict[str, Steering]:
    """The steer A z + k + c + A c of what a projection is given."""
    total = _sum(fixed, heads)
    if factors is None:
        return {} if total is None else {half.given: Vector(total)}
    if heads is not None:
        total = _sum(total, factors.left @ (factors.right @ heads))
    return {half.given: Affine(factors.right, factors.left, total)}


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
    """C, by how much a bias of the values moves what the heads give."""
    if half.projection not in _VALUES:
        return None
    path, part, parts = _VALUES[half.projection]
    bias = own.bias(path)
    if bias is None:
        return None
    pieces = bias.tensor_split(parts)
    if any(bool(p.any()) for i, p in enumerate(pieces) if i != part):
        raise no_steering(
            f"{own.prefix}.{path}.bias",
            "its query or key part changes what the heads attend to",
        )
    values = pieces[part]
    width = own.at(half.projection).layer.shape[1]
    if len(values) == width:
        return values
    # Grouped queries: each head of the values serves several neighbouring ones.
    attention = own.model.get_submodule(f"{own.prefix}.{path.rpartition('.')[0]}")
    size = int(attention.head_dim)  # type: ignore[arg-type]
    grouped = values.view(-1, size).repeat_interleave(width // len(values), 0)
    return grouped.flatten()


def _readers(changes: list[Difference]) -> dict[str, Steering]:
    """The steer of the MLP's input that does what its readers' differences do."""
    weights = [change.layer.weight for change in changes]
    dtype = changes[0].layer.dtype
    weight, delta = torch.cat(weights), stacked([c.weight for c in changes], weights)
    factors = fixed = None
    if delta is not None:
        noise = noise_of(delta, weight, dtype)
        factors, share = reading(weight, in_factors(delta, noise), noise)
        _check_common(share, changes, "linear map of")
    if any(change.bias is not None for change in changes):
        before, wanted = (
            torch.cat(biases)
            for biases in zip(*(change.biases for change in changes), strict=True)
        )
        noise = noise_of(wanted, before, dtype)
        fixed, share = reading_fixed(weight, wanted, noise)
        _check_common(share, changes, "vector at")
    if factors is not None:
        return {"mlp_in": Affine(factors.right, factors.left, fixed)}
    return {} if fixed is None else {"mlp_in": Vector(fixed)}


def _check_common(share: float, changes: list[Difference], what: str) -> None:
    if share:
        names = " and ".join(f"`{change.layer.name}`" for change in changes)
        raise NoExactFormError(
            f"The update of {names} has no exact steering form: no one {what} mlp_in, "
            f"which they read, does what it does; the best leaves {share:.2g} of it."
        )


def _norm(change: Difference, stream: str) -> dict[str, Steering]:
    """The steer of a stream that does what its LayerNorm's difference does."""
    if change.weight is None:
        return {} if change.bias is None else {stream: Vector(change.bias)}
    gain, delta = change.layer.weight, as_dense(change.weight)
    if bool(((gain == 0) & (delta != 0)).any()):
        raise no_steering(
            f"{change.layer.name}.weight",
            "where it is zero, nothing is left to be scaled",
        )
    scale = torch.where(delta == 0, 0.0, delta / gain)
    before, bias = change.biases
    return {stream: Heads(offset=(bias - scale * before)[None], scale=scale[None])}


def no_steering(name: str, reason: str) -> NoExactFormError:
    """The refusal of a parameter's difference, with its reason."""
    return NoExactFormError(
        f"The update of `{name}` has no exact steering form: {reason}."
    )
