"""The probe: steer each site with a known vector and see where it lands.

Symbols, in one block of a real model, on a few tokens
    x, y        what the block is given and gives
    a, c, r, m  what stands at attn_out, cross_out, resid_mid and mlp_out; c = 0 where
                a block does not attend to an encoder
    v           a random vector, as large as the stream

Claims; N₁, N₂ (and N₃) are the norms that end the sums in post-norm blocks
    r = x + a + c and y = r + m; in parallel blocks y = x + a + m; in post-norm blocks
    r = N₁(x + a), or N₂(N₁(x + a) + c) with c, and y = N₂(r + m), or N₃
    v at attn_out, cross_out, resid_mid or mlp_out arrives in the next of these sums as
    it is, and what the block computed before it stays
    mlp_in stands after the norm: doubling it changes m
    attn_heads decides a; mlp_in decides m, and so does mlp_hidden: with another x but
    the same tensor at the site, what comes of it is the same
    v at block_out arrives in y
    another output of the encoder changes c and leaves a

Only blocks of different make are probed, one of each: for a model of one kind of block
that is a dozen runs of a single block. They are made whenever a model of some class and
configuration is measured for the first time in a process.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import UnsupportedModelError
from equiv.model.architecture import Architecture
from equiv.model.batches import at_most
from equiv.model.blocks import Blocks, model_type
from equiv.model.memory import packed
from equiv.model.precision import arithmetic
from equiv.model.sites import Sites, Steer
from equiv.model.staged_model import Stage, StagedModel

TOKENS = 8
# Roundings of sums, relative to the stream; a wrong place is off by about 1.
_ROUNDINGS = 1e4
# A norm takes a doubled stream for the same, but for its ε; an MLP moves by about 1.
_SAME = 1e-2


@dataclass(frozen=True)
class Landing:
    """What became of one claim about a site.

    Attributes:
        layer: Index of the block.
        site: The site.
        claim: What has to hold.
        error: By how much it does not, relative to the stream.
        holds: Whether that is rounding.
    """

    layer: int
    site: str
    claim: str
    error: float
    holds: bool


def landings(cut: StagedModel) -> list[Landing]:
    """Every claim about every site that the blocks have, measured.

    Args:
        cut: A model cut into stages for the inputs to be probed with: its first batch.

    Example:
        >>> from equiv.model.families import find_blocks
        >>> from equiv.model.inputs import from_inputs
        >>> from equiv.testing.models import transformer
        >>> model = transformer("gpt2")
        >>> batches = from_inputs(model, torch.tensor([[1, 2, 3]]))
        >>> cut = StagedModel(model, find_blocks(model), batches, torch.float64)
        >>> found = landings(cut)
        >>> all(landing.holds for landing in found)
        True
        >>> found[1].claim
        "resid_mid = the block's input + attn_out"
    """
    assert cut.blocks is not None
    few = at_most(cut.batches[:1], TOKENS, seed=0)
    small = StagedModel(cut.model, cut.blocks, few, cut.dtype)
    with torch.no_grad(), arithmetic(cut.dtype):
        small.cut(())
        embedded: Tensor | None = None
        found: list[Landing] = []
        kinds = _kinds(cut.blocks)
        for stage in small.stages:
            if stage.name in ("embed", "bridge"):
                tensors = small.tensors(stage)
                embedded = small.run(stage, tensors, embedded, 0)[0]
            elif stage.name == "block" and stage.layer in kinds:
                assert embedded is not None
                found += _Probe(small, stage, embedded).landings()
        return found


def prove(cut: StagedModel) -> None:
    """Refuse a model where a site is not where its family's line says.

    Raises:
        UnsupportedModelError: If so, with what was seen.
    """
    if cut.blocks is None:
        return
    key = _key(cut.model, cut.blocks)
    if key in _PROVEN:
        return
    found = landings(cut)
    if not all(math.isfinite(landing.error) for landing in found):
        return  # a model without numbers shows nothing, and is refused for that
    if wrong := next((landing for landing in found if not landing.holds), None):
        raise UnsupportedModelError(_said(cut.model, cut.blocks, wrong))
    _PROVEN.add(key)


_PROVEN: set[object] = set()


def _key(model: nn.Module, blocks: Blocks) -> object:
    """What decides where the sites are: the class, the configuration, the modules."""
    made = tuple(dict.fromkeys(_make(block) for block in blocks.modules))
    known = tuple(stack.architecture for stack in blocks.stacks)
    return type(model), repr(model.config), made, known


def _make(block: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(module)) for name, module in block.named_modules())


def _kinds(blocks: Blocks) -> list[int]:
    """The first block of every make."""
    first: dict[object, int] = {}
    for layer, block in enumerate(blocks.modules):
        first.setdefault(_make(block), layer)
    return list(first.values())


def _said(model: nn.Module, blocks: Blocks, wrong: Landing) -> str:
    known = blocks.known(wrong.layer)
    path = dict(known.places).get(wrong.site, ("the block itself", "output"))[0]
    return (
        f"{type(model).__name__} (model type {model_type(model)!r}): {wrong.site} of "
        f"block {wrong.layer}, at `{path}`, is not what it should be: {wrong.claim}, "
        f"but that is off by {wrong.error:.2g} of the stream. Correct the line "
        f"{model_type(model)!r} in `equiv.model.known_families.TABLE`, which says "
        f"{known}."
    )


class _Probe:
    """One block, run again and again with something known at one of its sites."""

    def __init__(self, cut: StagedModel, stage: Stage, stream: Tensor) -> None:
        assert cut.blocks is not None
        layer = self.layer = stage.layer
        self.cut = cut
        self.known: Architecture = cut.blocks.known(layer)
        self.block = cut.blocks.modules[layer]
        self.sites = cut.blocks.sites_of(layer)
        self.stage = replace(stage, sites=self.sites)
        self.memory, self.hidden = cut.parted(stage, stream, 0)
        self.tensors = cut.tensors(self.stage)
        self.joined = cut.blocks.joined(layer)
        self.base = self.run({})
        self.generator = torch.Generator().manual_seed(0)
        self.size = self.base["block_out"].norm()

    def run(
        self,
        steer: Steer,
        hidden: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Sites:
        """The sites' activations as they are handed on; "x" and "y" in and out."""
        hidden = self.hidden if hidden is None else hidden
        memory = self.memory if memory is None else memory
        stream = hidden if memory is None else packed(memory, hidden)
        with self.cut.hooked([self.stage]):
            out, seen = self.cut.run(self.stage, self.tensors, stream, 0, steer=steer)
        added = {site: function(seen[site]) for site, function in steer.items()}
        if self.joined and "resid_mid" in added:
            added[self.joined] = added["resid_mid"]  # it is written there
        moved = {site: seen[site] + change for site, change in added.items()}
        given = self.cut.parted(self.stage, out, 0)[1]
        return {**seen, **moved, "x": hidden, "y": given}

    def landings(self) -> Iterator[Landing]:
        """Claim by claim, in the block's own order."""
        for site, claim, left, right in self._sums(self.base, ""):
            yield self._landing(site, claim, left - right)
        for site in self.sites:
            yield from self._lands(site)
        yield from self._behind_the_norm()
        yield from self._reads_the_encoder()
        other = self.hidden + self._vector(self.hidden)
        for site, comes in (
            ("attn_heads", "attn_out"),
            ("mlp_in", "mlp_out"),
            ("mlp_hidden", "mlp_out"),
        ):
            if {site, comes} <= set(self.sites):
                same = self.base[site]
                held = self.run({site: lambda h, same=same: same - h}, other)
                claim = f"what stands at {site} decides {comes}"
                yield self._landing(site, claim, held[comes] - self.base[comes])

    def _behind_the_norm(self) -> Iterator[Landing]:
        """The MLP's input is not what a norm in front of it takes."""
        if not {"mlp_in", "mlp_out"} <= set(self.sites):
            return
        mlp = self.base["mlp_out"]
        moved = self.run({"mlp_in": lambda u: u})["mlp_out"] - mlp
        same = bool(moved.norm() < _SAME * mlp.norm())
        claim = "mlp_in stands after the norm, so that doubling it changes mlp_out"
        yield Landing(self.layer, "mlp_in", claim, float(same), not same)

    def _reads_the_encoder(self) -> Iterator[Landing]:
        """Another output of the encoder arrives by cross-attention, and only there."""
        if "cross_out" not in self.sites or self.memory is None:
            return
        found = self.run({}, memory=self.memory + self._vector(self.memory))
        claim = "another output of the encoder leaves attn_out as it is"
        moved = found["attn_out"] - self.base["attn_out"]
        yield self._landing("cross_out", claim, moved)
        cross = self.base["cross_out"]
        same = bool((found["cross_out"] - cross).norm() < _SAME * cross.norm())
        claim = "another output of the encoder changes cross_out"
        yield Landing(self.layer, "cross_out", claim, float(same), not same)

    def _lands(self, site: str) -> Iterator[Landing]:
        """A vector at one site: where it arrives, and what it must leave alone."""
        v = self._vector(self.base[site])
        found = self.run({site: lambda h: v.expand_as(h)})
        for _, claim, left, right in self._sums(found, site):
            yield self._landing(site, f"with a vector at {site}, {claim}", left - right)
        before = self.sites[: self.sites.index(site)]
        if self.known.parallel and site in ("attn_heads", "attn_out"):
            before = (*before, *(s for s in ("mlp_in", "mlp_out") if s in self.sites))
        for other in before:
            if (other, site) == (self.joined, "resid_mid"):
                continue
            claim = f"a vector at {site} leaves {other} as it is"
            yield self._landing(site, claim, found[other] - self.base[other])

    def _sums(
        self, at: Sites, steered: str
    ) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """The sums of the stream that hold with a vector at a site.

        As site, claim, and the two sides.
        """
        yield "block_out", "block_out is what the block gives", at["block_out"], at["y"]
        if not {"attn_out", "mlp_out"} <= set(self.sites) or steered == "block_out":
            return
        entered, attention, mlp = at["x"], at["attn_out"], at["mlp_out"]
        if self.known.parallel:
            claim = "block_out = the block's input + attn_out + mlp_out"
            yield "mlp_out", claim, at["y"], entered + attention + mlp
            return
        norm = "a norm of " if self.known.norms_after else ""
        claim = f"resid_mid = {norm}the block's input + attn_out"
        middle = self._normed(0, entered + attention)
        if "cross_out" in self.sites:
            claim += f", {norm}that + cross_out" if norm else " + cross_out"
            middle = self._normed(1, middle + at["cross_out"])
        if "resid_mid" in self.sites:
            if steered != "resid_mid" or self.joined:
                yield "attn_out", claim, at["resid_mid"], middle
            middle = at["resid_mid"]
        claim = f"block_out = {norm}resid_mid + mlp_out"
        yield "mlp_out", claim, at["y"], self._normed(-1, middle + mlp)

    def _normed(self, which: int, stream: Tensor) -> Tensor:
        """The stream after the norm that ends its sum, if there is one."""
        if self.known.norms_after is None:
            return stream
        path = self.known.norms_after[which]
        assert self.cut.blocks is not None
        prefix = f"{self.cut.blocks.name(self.layer)}.{path}."
        own = {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }
        return functional_call(self.block.get_submodule(path), own, (stream,))

    def _vector(self, like: Tensor) -> Tensor:
        """A random vector as large as the stream, token by token."""
        drawn = torch.randn(like.shape[-1], generator=self.generator)
        return self.base["y"].square().mean().sqrt() * drawn.to(like)

    def _landing(self, site: str, claim: str, difference: Tensor) -> Landing:
        error = float(difference.norm() / self.size) if bool(self.size) else 0.0
        limit = _ROUNDINGS * torch.finfo(self.cut.dtype).eps
        return Landing(self.layer, site, claim, error, error <= limit)
