"""The blocks of a model, and where the sites are in its modules."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.architecture import Architecture
from equiv.model.sites import FLOW, SITES, Place


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and how they are built."""

    path: str
    modules: tuple[nn.Module, ...]
    architecture: Architecture

    @property
    def sites(self) -> tuple[str, ...]:
        """Those of `SITES` that every block has."""
        own = [self.sites_of(layer) for layer in range(len(self.modules))]
        return tuple(s for s in SITES if all(s in sites for sites in own))

    def sites_of(self, layer: int) -> tuple[str, ...]:
        """Every site that one block has, in the order in which it computes them."""
        return tuple(site for site in self._named if self._has(layer, site))

    def _has(self, layer: int, site: str) -> bool:
        if site == "block_out":
            return True
        if (
            site == "resid_mid"
            and self.joins_middle
            and not self._has(layer, "attn_out")
        ):
            return False  # it is written there
        path = self.architecture.places.get(site, ("", ""))[0]
        return bool(path) and submodule(self.block(layer), path) is not None

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(s for s in FLOW if s in (*self.architecture.places, "block_out"))

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
        block, known = self.block(layer), self.architecture
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
        if site == "resid_mid" and self.architecture.parallel:
            reason = "its attention and MLP read the same stream, so none lies between"
        elif site == "mlp_hidden" and self.architecture.mlp:
            reason = "its MLP has no one last layer, as in a mixture of experts"
        else:
            reason = "no module of it gives or takes that"
        has = ", ".join(self.sites_of(layer))
        return f"{kind} {layer} has no {site}: {reason}. It has {has}."

    @property
    def joins_middle(self) -> bool:
        """Whether the stream in the middle is only formed between modules.

        What is read there is then the block's input plus what attention adds to it,
        and what is written there is written to `attn_out`.
        """
        middle = self.architecture.resid_mid
        return middle is not None and middle[1] == "input"


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
