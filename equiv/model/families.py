"""Where each Hugging Face family writes to its residual stream: one line per family.

Paths are relative to the block. Every entry is proven on real modules by the tests:
a known vector is added at each site and has to land where `sites.py` says.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from equiv.errors import SiteError, UnsupportedModelError
from equiv.model.sites import FLOW, Place


@dataclass(frozen=True)
class Architecture:
    """How the blocks of one family are built.

    Attributes:
        blocks: Path of the list of blocks, from the backbone.
        attn_out: Module whose output attention adds to the residual stream.
        mlp: Module whose input is the MLP's input.
        mlp_out: Module whose output the MLP adds to the residual stream.
        attn_projection: Last linear layer of attention: its input are the heads.
        mlp_projection: Last linear layer of the MLP: its input is the hidden layer.
        mlp_readers: Linear layers that read the MLP's input.
        resid_mid: Where the stream between the two is: input or output of a module.
        plain_add: Whether `block_out` is the stream plus `mlp_out`, no norm after it.
        norms_writes: Whether a norm stands between the projections and the stream.
    """

    blocks: str
    attn_out: str
    mlp: str
    mlp_out: str
    attn_projection: str
    mlp_projection: str
    mlp_readers: tuple[str, ...]
    resid_mid: tuple[str, Literal["input", "output"]]
    plain_add: bool = True
    norms_writes: bool = False


_LLAMA = Architecture(
    blocks="layers",
    attn_out="self_attn",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="self_attn.o_proj",
    mlp_projection="mlp.down_proj",
    mlp_readers=("mlp.gate_proj", "mlp.up_proj"),
    resid_mid=("post_attention_layernorm", "input"),
)
_GEMMA2 = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    resid_mid=("pre_feedforward_layernorm", "input"),
    norms_writes=True,
)
_OLMO2 = replace(_GEMMA2, resid_mid=("mlp", "input"))
_GPT2 = Architecture(
    blocks="h",
    attn_out="attn",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="attn.c_proj",
    mlp_projection="mlp.c_proj",
    mlp_readers=("mlp.c_fc",),
    resid_mid=("ln_2", "input"),
)
_BERT = Architecture(
    blocks="encoder.layer",
    attn_out="attention.output.dropout",
    mlp="intermediate",
    mlp_out="output.dropout",
    attn_projection="attention.output.dense",
    mlp_projection="output.dense",
    mlp_readers=("intermediate.dense",),
    resid_mid=("attention.output", "output"),
    plain_add=False,
)

FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA2,
    "olmo2": _OLMO2,
    "gpt2": _GPT2,
    "bert": _BERT,
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model and how they are built."""

    path: str
    modules: tuple[nn.Module, ...]
    architecture: Architecture

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
        places: dict[str, tuple[str, Literal["input", "output"]]] = {
            "attn_heads": (known.attn_projection, "input"),
            "attn_out": (known.attn_out, "output"),
            "resid_mid": known.resid_mid,
            "mlp_in": (known.mlp, "input"),
            "mlp_hidden": (known.mlp_projection, "input"),
            "mlp_out": (known.mlp_out, "output"),
        }
        if site not in places:
            raise SiteError(f"Expected a site in {', '.join(FLOW)}, got {site!r}.")
        path, side = places[site]
        return Place(block.get_submodule(path), side)

    @property
    def joins_middle(self) -> bool:
        """Whether the stream in the middle is only formed between modules.

        What is read there is then the block's input plus what attention adds to it,
        and what is written there is written to `attn_out`.
        """
        return self.architecture.resid_mid[1] == "input"


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
