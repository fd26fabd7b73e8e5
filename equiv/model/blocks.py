"""The blocks of a model, and where the sites are in its modules."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.architecture import Architecture
from equiv.model.sites import FLOW, SITES, Place, read_and_written


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and how they are built.

    Of an encoder–decoder the layers are numbered through: the encoder's blocks come
    first, then the decoder's.

    Attributes:
        path: Of the list of blocks; of an encoder–decoder, of the decoder's.
        modules: The blocks.
        architecture: How they are built; of an encoder–decoder, the decoder's.
        encoder: The blocks of the encoder, by themselves; `None` if there is none.
    """

    path: str
    modules: tuple[nn.Module, ...]
    architecture: Architecture
    encoder: "Blocks | None" = None

    @property
    def first(self) -> int:
        """The layer of the first block of the last stack: the decoder's, or 0."""
        return len(self.encoder.modules) if self.encoder else 0

    @property
    def stacks(self) -> "tuple[Blocks, ...]":
        """Every list of blocks by itself, in the order in which they run."""
        if self.encoder is None:
            return (self,)
        last = Blocks(self.path, self.modules[self.first :], self.architecture)
        return (self.encoder, last)

    def known(self, layer: int) -> Architecture:
        """How block `layer` is built."""
        if self.encoder is not None and layer < self.first:
            return self.encoder.architecture
        return self.architecture

    def name(self, layer: int) -> str:
        """The name of block `layer` among the model's modules."""
        if self.encoder is not None and layer < self.first:
            return self.encoder.name(layer)
        return f"{self.path}.{layer - self.first}"

    @property
    def sites(self) -> tuple[str, ...]:
        """Those of `SITES` that every block has, and `cross_out` where one has it."""
        own = [self.sites_of(layer) for layer in range(len(self.modules))]
        common = {s for s in SITES if all(s in sites for sites in own)}
        if any("cross_out" in sites for sites in own):
            common.add("cross_out")
        return tuple(s for s in FLOW if s in common)

    def sites_of(self, layer: int) -> tuple[str, ...]:
        """Every site that one block has, in the order in which it computes them."""
        named = (*self.known(layer).places, "block_out")
        return tuple(s for s in FLOW if s in named and self._has(layer, s))

    def layers_with(self, site: str) -> tuple[int, ...]:
        """The layers in which a site, or one of its kind, has to be.

        All, but for `cross_out` of an encoder–decoder: the decoder's.
        """
        everywhere = range(len(self.modules))
        crossing = "cross_out" in read_and_written([site])
        return tuple(everywhere[self.first if crossing else 0 :])

    def _has(self, layer: int, site: str) -> bool:
        if site == "block_out":
            return True
        joined = self.joined(layer) if site == "resid_mid" else ""
        if joined and not self._has(layer, joined):
            return False  # it is written there
        path = self.known(layer).places.get(site, ("", ""))[0]
        return bool(path) and submodule(self.block(layer), path) is not None

    def block(self, layer: int) -> nn.Module:
        """Block `layer`.

        Raises:
            SiteError: If there is no such layer.
        """
        if not 0 <= layer < len(self.modules):
            raise SiteError(
                f"Expected a layer in 0…{len(self.modules) - 1}, got {layer!r}."
            )
        return self.modules[layer]

    def place(self, layer: int, site: str) -> Place:
        """Where the activation of `site` is in block `layer`.

        Raises:
            SiteError: If there is no such layer or site.
        """
        block, known = self.block(layer), self.known(layer)
        if site == "block_out":
            return Place(block, "output")
        if site not in FLOW:
            raise SiteError(f"Expected a site in {', '.join(FLOW)}, got {site!r}.")
        if not self._has(layer, site):
            raise SiteError(self._why_not(layer, site))
        path, side = known.places[site]
        module = block.get_submodule(path)
        write = site in ("attn_out", "mlp_out") and known.write_scale
        return Place(
            module,
            side,
            scale=float(getattr(block, known.write_scale)) if write else 1.0,
            in_place=site == "mlp_out" and known.adds_in_place,
            shaped_by=block if site in known.flattens else None,
        )

    def _why_not(self, layer: int, site: str) -> str:
        kind = type(self.block(layer)).__name__
        known = self.known(layer)
        if site == "resid_mid" and known.parallel:
            reason = "its attention and MLP read the same stream, so none lies between"
        elif site == "mlp_hidden" and known.mlp:
            reason = "its MLP has no one last layer, as in a mixture of experts"
        else:
            reason = "no module of it gives or takes that"
        has = ", ".join(self.sites_of(layer))
        return f"{kind} {layer} has no {site}: {reason}. It has {has}."

    def joined(self, layer: int) -> str:
        """The site that stands in for writing to `resid_mid`; empty if that is a place.

        Where the stream in the middle is only formed between modules, what is read is
        the block's input plus what attention adds to it, and what is written there is
        written to the last of these.
        """
        known = self.known(layer)
        if known.resid_mid is None or known.resid_mid[1] == "output":
            return ""
        return "cross_out" if known.cross_out else "attn_out"


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """A submodule by path; `None` where this block has none, or has `None` there."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def model_type(model: nn.Module) -> str | None:
    """The Hugging Face model type, or `None` for any other module."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None)


def list_of_blocks(model: nn.Module, known: Architecture) -> tuple[str, nn.ModuleList]:
    """The path of the blocks in this class of model, which may be bare or headed.

    Raises:
        UnsupportedModelError: If there is none, or more than one.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for path in (f"{prefix}.{known.blocks}".lstrip("."), known.blocks):
        found = submodule(model, path)
        if isinstance(found, nn.ModuleList):
            return path, found
    inside = [
        (path, module)
        for path, module in model.named_modules()
        if path.endswith(f".{known.blocks}") and isinstance(module, nn.ModuleList)
    ]
    if len(inside) == 1:
        return inside[0]
    paths = ", ".join(path for path, _ in inside) or "none"
    raise UnsupportedModelError(
        f"Expected one list of blocks at `{known.blocks}` in {type(model).__name__} "
        f"(model type {model_type(model)!r}), got {paths}. Of a model with more than "
        "one stack pass the one that the update is in, as a model of its own: "
        "`model.get_encoder()`."
    )
