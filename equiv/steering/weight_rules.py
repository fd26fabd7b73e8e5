"""Which steers are weight edits, and of what: the rules, one block at a time.

Symbols, for a last projection p = W z + b: z what it is given, p what comes out. A
steer that reads x adds A x + c. A steer reads its site before what is added there, and
after what is added before it in the block. So, with A₀, c₀ what is written to z (read
there), A₁, c₁ what reads p and A₂, c₂ what reads z, both added to p:

    p' = W (z + A₀ z + c₀) + b  =  (W + W A₀) z + (b + W c₀)
    out = p' + A₁ p' + c₁ + A₂ z + c₂
        = (W + W A₀ + A₁ (W + W A₀) + A₂) z + b + W c₀ + A₁ (b + W c₀) + c₁ + c₂

Layers W that read u + A u + c become W + W A with biases b + W c. A LayerNorm
γ ⊙ n + β that is followed by h + s ⊙ h + c becomes γ + s ⊙ γ and β + s ⊙ β + c.

What is added where a plain block adds to its stream may as well be added to p. Behind a
norm it may not, whatever it is: only z and u can be steered by weights there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiv.model.families import Architecture, Blocks
from equiv.model.sites import Site, check_flow
from equiv.steering.deltas import as_dense, of_reader, of_writer, total
from equiv.steering.halves import Facts, Half, Layer, halves_of, layer_at, widths_of
from equiv.steering.parts import Parts, no_weight_edit, parts_of
from equiv.update.low_rank import Delta

Placed = Mapping[Site, Parts]


@dataclass(frozen=True)
class Edited:
    """What is added to the weight and bias of one layer.

    Attributes:
        layer: The layer as it was in the base.
        weight: What is added to its weight, as a matrix [out, in], or [d] of a
            LayerNorm; `None` for nothing.
        bias: What is added to its bias [out]; `None` for nothing.
        steers: What does it, in a few words each.
    """

    layer: Facts
    weight: Delta | None
    bias: Tensor | None
    steers: tuple[str, ...]


def edits_of_block(
    model: nn.Module,
    blocks: Blocks,
    index: int,
    steers: Mapping[str, Callable[[Tensor], object]],
) -> Iterator[Edited]:
    """What one block's steers are as edits of its layers.

    Args:
        model: The model.
        blocks: Its blocks.
        index: Which of them.
        steers: Site → steer.

    Raises:
        NoExactFormError: If a steer is no weight edit.
        SiteError: If a site does not exist, or is written before it is read.
        ArgumentError: If a steer has other widths than its sites.
        UnsupportedModelError: If a layer that would be edited is of no known kind, or
            shares its weight.
    """
    known, widths = blocks.architecture, widths_of(model, blocks, index)
    device = next(blocks.block(index).parameters()).device
    placed: dict[Site, Parts] = {}
    for key, steering in steers.items():
        site = Site(key)
        check_flow(site)
        parts = parts_of(
            steering,
            (index, key),
            device,
            reads=widths[site.read],
            writes=widths[site.write],
        )
        if parts.is_nothing:
            continue
        if reason := refusal(site, parts, known):
            raise no_weight_edit((index, key), reason)
        placed[site] = parts
    named = {str(site.key): type(steers[site.key]).__name__ for site in placed}
    yield from _edits(model, f"{blocks.path}.{index}", known, placed, named)


def refusal(site: Site, parts: Parts, known: Architecture) -> str | None:
    """Why a steer is no weight edit; `None` if it is one."""
    if site.write == "mlp_in":
        same, given = site.read == "mlp_in", "mlp_in"
        return None if same or parts.is_fixed else _reads(site, (given,))
    half = next(
        h for h in halves_of(known) if site.write in (h.given, h.written, h.stream)
    )
    if site.write == half.given:
        fits = parts.is_fixed or site.read == half.given
        return None if fits else _reads(site, (half.given,))
    if known.norms_writes:
        return (
            f"a norm stands between `{half.projection}` and the stream, and no weight "
            f"after that norm; steer {half.given} instead"
        )
    if half.norm is not None and site.write == half.stream:
        by_entry = parts.up is None and site.read == half.stream
        if parts.is_fixed or by_entry:
            return None
        return (
            f"`{half.norm}`, which makes {half.stream}, can only shift its output and "
            "scale it entry by entry (Vector, Heads)"
        )
    fits = parts.is_fixed or site.read in (half.given, half.written)
    return None if fits else _reads(site, (half.given, half.written))


def _reads(site: Site, allowed: tuple[str, ...]) -> str:
    return (
        f"it depends on {site.read}, and what weights add at {site.write} depends on "
        f"{' or '.join(allowed)} only, or is a fixed vector"
    )


def _edits(
    model: nn.Module,
    prefix: str,
    known: Architecture,
    placed: Placed,
    named: Mapping[str, str],
) -> Iterator[Edited]:
    attention, mlp = halves_of(known)
    yield from _half_edits(model, prefix, attention, placed, named)
    into = _where(placed, ("mlp_in",))
    for path in known.mlp_readers if into else ():
        layer = layer_at(model, f"{prefix}.{path}")
        yield _edited(layer, *_of_reader(layer, into), into, named)
    yield from _half_edits(model, prefix, mlp, placed, named)


def _half_edits(
    model: nn.Module,
    prefix: str,
    half: Half,
    placed: Placed,
    named: Mapping[str, str],
) -> Iterator[Edited]:
    sites = [half.given, half.written]
    if half.norm is None:
        sites.append(half.stream)
    own = _where(placed, sites)
    if own:
        layer = layer_at(model, f"{prefix}.{half.projection}")
        yield _edited(layer, *_of_projection(layer, half, own), own, named)
    behind = {} if half.norm is None else _where(placed, (half.stream,))
    if behind:
        layer = layer_at(model, f"{prefix}.{half.norm}")
        yield _edited(layer, *_of_norm(layer, behind), behind, named)


def _where(placed: Placed, written: tuple[str, ...] | list[str]) -> dict[Site, Parts]:
    return {site: parts for site, parts in placed.items() if site.write in written}


def _of_projection(
    layer: Layer, half: Half, own: Placed
) -> tuple[Delta | None, Tensor]:
    """(ΔW, Δb) of a last projection."""
    weight, bias = layer.weight, layer.bias
    inside = _where(own, (half.given,))
    moved = total(of_reader(weight, parts) for parts in inside.values())
    offset = weight @ _sum_of_biases(inside.values(), weight.new_zeros(weight.shape[1]))
    # What the steers behind the projection read: p' = effective z + constant.
    effective = weight if moved is None else weight + as_dense(moved)
    constant = offset if bias is None else bias + offset
    terms, shift = [moved], offset
    behind = {site: parts for site, parts in own.items() if site not in inside}
    for site, parts in behind.items():
        if site.read == half.written:
            terms.append(of_writer(effective, parts))
            shift = shift + _applied(parts, constant)
        elif not parts.is_fixed:
            terms.append(of_reader(torch.eye(len(offset)).to(weight), parts))
    return total(terms), _sum_of_biases(behind.values(), shift)


def _of_reader(layer: Layer, into: Placed) -> tuple[Delta | None, Tensor]:
    """(ΔW, Δb) of a layer that reads what is steered."""
    weight = layer.weight
    delta = total(of_reader(weight, parts) for parts in into.values())
    zero = weight.new_zeros(weight.shape[1])
    return delta, weight @ _sum_of_biases(into.values(), zero)


def _of_norm(layer: Layer, behind: Placed) -> tuple[Delta | None, Tensor]:
    """(Δγ, Δβ) of a LayerNorm whose output is steered."""
    gain = layer.weight
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias
    scale = torch.zeros_like(gain)
    for parts in behind.values():
        scale = scale if parts.scale is None else scale + parts.scale
    shift = _sum_of_biases(behind.values(), scale * bias)
    return (scale * gain if bool(scale.any()) else None), shift


def _applied(parts: Parts, x: Tensor) -> Tensor:
    """A x for one activation."""
    found = torch.zeros_like(x) if parts.scale is None else parts.scale * x
    if parts.up is None or parts.down is None:
        return found
    return parts.up @ (parts.down @ x) + found


def _sum_of_biases(steers: Iterable[Parts], start: Tensor) -> Tensor:
    for parts in steers:
        start = start if parts.bias is None else start + parts.bias
    return start


def _edited(
    layer: Layer,
    weight: Delta | None,
    bias: Tensor,
    steers: Placed,
    named: Mapping[str, str],
) -> Edited:
    words = tuple(f"{named[site.key]} at {site.key}" for site in steers)
    return Edited(layer.facts, weight, bias if bool(bias.any()) else None, words)
