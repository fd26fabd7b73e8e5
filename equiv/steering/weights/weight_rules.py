"""Which steers are weight edits, and of which layers: one block at a time.

What is added where a plain block adds to its stream may as well be added to what its
last projections give. Behind a norm it may not, whatever it is: only what the
projections are given can be steered by weights there. The formulas are in `folding`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from equiv.model.families import Architecture, Blocks
from equiv.model.sites import Site, check_flow
from equiv.steering.weights.folding import (
    Placed,
    into_norm,
    into_projection,
    into_reader,
)
from equiv.steering.weights.halves import (
    Facts,
    Half,
    Layer,
    halves_of,
    layer_at,
    reads_stream,
    widths_of,
)
from equiv.steering.weights.parts import Parts, no_weight_edit, parts_of
from equiv.update.low_rank import Delta


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
        reads, writes = widths[site.read], widths[site.write]
        parts = parts_of(steering, (index, key), device, reads=reads, writes=writes)
        if parts.is_nothing:
            continue
        if reason := refusal(site, parts, known):
            raise no_weight_edit((index, key), reason)
        placed[site] = parts
    named = {key: type(steering).__name__ for key, steering in steers.items()}
    placed = _seen_by_mlp(placed, index)
    yield from _edits(model, f"{blocks.path}.{index}", known, placed, named)


def refusal(site: Site, parts: Parts, known: Architecture) -> str | None:
    """Why a steer is no weight edit; `None` if it is one."""
    if site.write == "mlp_in":
        allowed = ("resid_mid", "mlp_in") if reads_stream(known) else ("mlp_in",)
        return _unless_it_reads(allowed, site, parts)
    half = next(
        h for h in halves_of(known) if site.write in (h.given, h.written, h.stream)
    )
    if site.write == half.given:
        return _unless_it_reads((half.given,), site, parts)
    if known.norms_writes:
        return (
            f"a norm stands between `{half.projection}` and the stream, and what is "
            f"added behind it is no edit of the projection; steer {half.given} instead"
        )
    if half.norm is None or site.write != half.stream:
        return _unless_it_reads((half.given, half.written), site, parts)
    if parts.is_fixed or (parts.up is None and site.read == half.stream):
        return None
    return (
        f"`{half.norm}`, which makes {half.stream}, can only shift its output and "
        "scale it entry by entry (Vector, Heads)"
    )


def _unless_it_reads(allowed: tuple[str, ...], site: Site, parts: Parts) -> str | None:
    if parts.is_fixed or site.read in allowed:
        return None
    return (
        f"it depends on {site.read}, and what weights add at {site.write} depends on "
        f"{' or '.join(allowed)} only, or is a fixed vector"
    )


def _seen_by_mlp(placed: Placed, index: int) -> dict[Site, Parts]:
    """Steers that read the stream before the MLP, as functions of the MLP's input.

    Where the MLP reads the stream itself, its input is u = r + c, with c what is
    written to the stream that was r: A r + k = A u + k − A c.
    """
    written = [parts for site, parts in placed.items() if site.write == "resid_mid"]
    found: dict[Site, Parts] = {}
    for site, parts in placed.items():
        found[site] = parts
        if (site.read, site.write) != ("resid_mid", "mlp_in") or parts.is_fixed:
            continue
        for other in written:
            if not other.is_fixed or other.bias is None:
                reason = "it reads resid_mid, which another steer scales; read mlp_in"
                raise no_weight_edit((index, site.key), reason)
            less = parts.linear(other.bias)
            bias = -less if parts.bias is None else parts.bias - less
            parts = dataclasses.replace(parts, bias=bias)
        found[site] = parts
    return found


def _edits(
    model: nn.Module,
    prefix: str,
    known: Architecture,
    placed: Placed,
    named: Mapping[str, str],
) -> Iterator[Edited]:
    attention, mlp = halves_of(known)
    yield from _half_edits(model, prefix, attention, placed, named)
    into = _where(placed, "mlp_in")
    for path in known.mlp_readers if into else ():
        layer = layer_at(model, f"{prefix}.{path}")
        yield _edited(layer, *into_reader(layer, into.values()), into, named)
    yield from _half_edits(model, prefix, mlp, placed, named)


def _half_edits(
    model: nn.Module,
    prefix: str,
    half: Half,
    placed: Placed,
    named: Mapping[str, str],
) -> Iterator[Edited]:
    own = _where(placed, half.given, half.written)
    stream = _where(placed, half.stream)
    if half.norm is None:
        own |= stream
    if own:
        layer = layer_at(model, f"{prefix}.{half.projection}")
        yield _edited(layer, *into_projection(layer, half, own), own, named)
    if half.norm is not None and stream:
        layer = layer_at(model, f"{prefix}.{half.norm}")
        yield _edited(layer, *into_norm(layer, stream.values()), stream, named)


def _where(placed: Placed, *written: str) -> dict[Site, Parts]:
    return {site: parts for site, parts in placed.items() if site.write in written}


def _edited(
    layer: Layer,
    weight: Delta | None,
    bias: Tensor,
    steers: Placed,
    named: Mapping[str, str],
) -> Edited:
    words = tuple(f"{named[site.key]} at {site.key}" for site in steers)
    return Edited(layer.facts, weight, bias if bool(bias.any()) else None, words)
