"""The two halves of a block, as weights see them.

A last projection is given something, and what comes out is added to a stream:

               given          comes out     added to      then, in post-norm blocks
    attention  attn_heads     attn_out      resid_mid     a LayerNorm
    MLP        mlp_hidden     mlp_out       block_out     a LayerNorm

Where `Architecture.norms_writes`, what comes out passes a norm before it is added, and
no weight comes after that norm.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import UnsupportedModelError
from equiv.model.factors import takes_factors
from equiv.model.families import Architecture, Blocks, find_blocks
from equiv.steering.files.digests import digest
from equiv.update.adapters import clean


@dataclass(frozen=True)
class Half:
    """One half of a block.

    Attributes:
        given: Site of the projection's input.
        written: Site of what the half adds to the stream.
        stream: Site of the stream after that.
        projection: Path of the projection, from the block.
        norm: Path of the LayerNorm whose output is the stream; `None` where the stream
            is a plain sum.
    """

    given: str
    written: str
    stream: str
    projection: str
    norm: str | None


def halves_of(known: Architecture) -> tuple[Half, Half]:
    """Attention, then the MLP."""
    return (
        Half(
            "attn_heads",
            "attn_out",
            "resid_mid",
            known.attn_projection,
            known.norms_after[0] if known.norms_after else None,
        ),
        Half(
            "mlp_hidden",
            "mlp_out",
            "block_out",
            known.mlp_projection,
            known.norms_after[1] if known.norms_after else None,
        ),
    )


def reads_stream(known: Architecture) -> bool:
    """Whether the MLP's input is the stream itself, with no norm between the two."""
    return not known.plain_add or known.resid_mid == (known.mlp, "input")


@dataclass(frozen=True)
class Layer:
    """One linear layer or LayerNorm, by its name in the model.

    Attributes:
        name: Full name of the module.
        module: The module.
    """

    name: str
    module: nn.Module

    @property
    def is_conv1d(self) -> bool:
        """Whether the weight is stored as [in, out], as GPT-2 does."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """In float64: of a matrix [out, in], whatever the module."""
        own: Any = self.module
        found = own.weight.detach().double()
        return found.T if self.is_conv1d else found

    @property
    def bias(self) -> Tensor | None:
        """In float64; `None` if it has none."""
        own: Any = self.module
        return None if own.bias is None else own.bias.detach().double()

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of a matrix, whatever the module; [d] of a LayerNorm."""
        own: Any = self.module
        shape = tuple(own.weight.shape)
        return shape[::-1] if self.is_conv1d else shape

    @property
    def dtype(self) -> torch.dtype:
        """What the weight is stored in."""
        own: Any = self.module
        return own.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        own: Any = self.module
        return own.weight.device

    @property
    def facts(self) -> "Facts":
        """What it is now, without the weights themselves."""
        own: Any = self.module
        return Facts(
            self.name,
            self.shape,
            self.dtype,
            own.bias is not None,
            self.is_conv1d,
            digest(dict(self.module.named_parameters())),
        )


@dataclass(frozen=True)
class Facts:
    """What a layer was when it was looked at.

    Attributes:
        name: Full name of the module.
        shape: [out, in] of a matrix, whatever the module; [d] of a LayerNorm.
        dtype: Of its weight.
        has_bias: Whether it has one.
        is_conv1d: Whether the weight is stored as [in, out].
        sha256: Digest of its weight and bias.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_bias: bool
    is_conv1d: bool
    sha256: str


def layer_at(model: nn.Module, name: str, *, adapted: bool = False) -> Layer:
    """A linear layer or LayerNorm that can be edited.

    Args:
        model: The model.
        name: Full name of the layer.
        adapted: Whether PEFT may have put a layer of its own around it, which is left
            out of account.

    Raises:
        UnsupportedModelError: If it is of another kind, or shares its weight.
    """
    module = model.get_submodule(name)
    if adapted:
        module = without_adapter(module)
    if not (type(module) is nn.LayerNorm or takes_factors(module)):
        raise UnsupportedModelError(
            f"Expected `{name}` to be a plain Linear, Conv1D or LayerNorm, got a "
            f"{type(module).__name__} of {type(module).__module__}. Merge or unload "
            "what was put in its place."
        )
    own = {id(p) for p in module.parameters()}
    every = model.named_parameters(remove_duplicate=False)
    names = [clean(n).rpartition(".")[0] for n, p in every if id(p) in own]
    if shared := [other for other in names if other != name]:
        raise UnsupportedModelError(
            f"`{name}` shares its parameters with `{shared[0]}`: an edit of the one is "
            "an edit of both. Give the module a copy of its own."
        )
    return Layer(name, module)


def without_adapter(module: nn.Module) -> nn.Module:
    """The layer inside the one that PEFT put around it."""
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, nn.Module)
    return inner if inner is module else without_adapter(inner)


def blocks_of(model: nn.Module) -> Blocks:
    """The blocks of a model.

    Raises:
        UnsupportedModelError: If it has none that are known.
    """
    found = find_blocks(model)
    if found is None:
        raise UnsupportedModelError(
            "Expected a Hugging Face model of a known family, got a "
            f"{type(model).__name__}: which of its weights write to a site is not "
            "known."
        )
    if not _are_sequential(found.architecture):
        raise UnsupportedModelError(
            "Expected blocks whose attention and MLP each end in one linear layer that "
            "writes to the stream, the MLP after attention and both as they are; those "
            f"of {type(model).__name__} are mixtures, parallel, scaled, attend to an "
            "encoder or are of other kinds, and no rule is for them."
        )
    return found


def _are_sequential(known: Architecture) -> bool:
    """Whether the rules hold: two halves, one after the other, added unscaled."""
    layers = (known.attn_projection, known.mlp_projection, *known.mlp_readers)
    whole = bool(known.mlp_readers) and all(layers)
    plain = known.resid_mid is not None and not known.write_scale
    return whole and plain and not known.cross_out


def widths_of(model: nn.Module, blocks: Blocks, index: int) -> dict[str, int]:
    """Site → width, in one block."""
    widths: dict[str, int] = {}
    for half in halves_of(blocks.architecture):
        name = f"{blocks.path}.{index}.{half.projection}"
        out, inside = layer_at(model, name).shape
        widths |= {half.given: inside, half.written: out, half.stream: out}
    return {**widths, "mlp_in": widths["resid_mid"]}
