"""Where each Hugging Face family writes to its residual stream: one line per family.

Paths are relative to the block. Every entry is proven on real modules by the tests:
a known vector is added at each site and has to land where `sites.py` says.
"""

from dataclasses import dataclass

from torch import nn

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.sites import SITES, Place


@dataclass(frozen=True)
class Architecture:
    """How the blocks of one family are built.

    Attributes:
        blocks: Path of the list of blocks, from the backbone.
        attn_out: Module whose output attention adds to the residual stream.
        mlp: Module whose input is the MLP's input.
        mlp_out: Module whose output the MLP adds to the residual stream.
        plain_add: Whether `block_out` is the stream plus `mlp_out`, no norm after it.
    """

    blocks: str
    attn_out: str
    mlp: str
    mlp_out: str
    plain_add: bool = True


_LLAMA = Architecture("layers", "self_attn", "mlp", "mlp")
_GPT2 = Architecture("h", "attn", "mlp", "mlp")
_BERT = Architecture(
    "encoder.layer",
    "attention.output.dropout",
    "intermediate",
    "output.dropout",
    plain_add=False,
)

FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
    "bert": _BERT,
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and how they are built."""

    path: str
    modules: tuple[nn.Module, ...]
    architecture: Architecture

    def place(self, layer: int, site: str) -> Place:
        """Where `site` is in block `layer`.

        Raises:
            SiteError: If there is no such layer or site.
        """
        if not 0 <= layer < len(self.modules):
            raise SiteError(
                f"Expected a layer in 0…{len(self.modules) - 1}, got {layer!r}."
            )
        block, known = self.modules[layer], self.architecture
        if site == "block_out":
            return Place(block, "output")
        if site == "attn_out":
            return Place(block.get_submodule(known.attn_out), "output")
        if site == "mlp_in":
            return Place(block.get_submodule(known.mlp), "input")
        if site == "mlp_out":
            return Place(block.get_submodule(known.mlp_out), "output")
        raise SiteError(f"Expected a site in {', '.join(SITES)}, got {site!r}.")


def model_type(model: nn.Module) -> str | None:
    """The Hugging Face model type, or `None` for any other module."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None)


def find_blocks(model: nn.Module) -> Blocks | None:
    """The blocks of a Hugging Face model; `None` for a module that is one stage.

    Raises:
        UnsupportedModelError: If the family is not in the table.
    """
    family = model_type(model)
    if family is None:
        return None
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"No architecture entry for `{type(model).__name__}` (model type "
            f"{family!r}); known: {', '.join(sorted(FAMILIES))}. Add a line to "
            "`equiv.model.families.FAMILIES`."
        )
    known = FAMILIES[family]
    prefix = getattr(model, "base_model_prefix", "")
    inside = prefix and isinstance(getattr(model, prefix, None), nn.Module)
    path = f"{prefix}.{known.blocks}" if inside else known.blocks
    modules = model.get_submodule(path)
    assert isinstance(modules, nn.ModuleList)
    return Blocks(path, tuple(modules), known)
