"""How the blocks of one family are built: which module is at which site."""

from dataclasses import dataclass
from typing import Literal

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Architecture:
    """How the blocks of one family are built.

    Paths are relative to the block; an empty one says that there is no such module.

    Attributes:
        blocks: Path of the list of blocks, from the backbone.
        attn_out: Module whose output attention adds to the residual stream.
        mlp: Module whose input is the MLP's input.
        mlp_out: Module whose output the MLP adds to the residual stream.
        attn_projection: Last linear layer of attention: its input are the heads.
        mlp_projection: Last linear layer of the MLP: its input is the hidden layer. A
            mixture of experts has none.
        mlp_readers: Linear layers that read the MLP's input.
        cross_out: Module whose output cross-attention adds to the residual stream, in
            decoder blocks that have it.
        resid_mid: Where the stream in front of the MLP is: input or output of a module;
            `None` in parallel blocks, where no such stream is formed.
        norms_after: Norms that end the sums in post-norm blocks.
        shares_bias: Attention whose table of relative positions, in the first block, is
            that of every block; empty where each has its own or none.
        norms_writes: Whether a norm stands between the projections and the stream.
        write_scale: Attribute of the block with the number that what its modules give
            is multiplied with before it is added.
        returns: Entries of the tuple that a block returns, the hidden state first; 0
            for a tensor.
        adds_in_place: Whether the block goes on to change what `mlp_out` gave.
        flattens: Sites whose tensors the block keeps as [batch · seq, d].
    """

    blocks: str
    attn_out: str = ""
    mlp: str = ""
    mlp_out: str = ""
    attn_projection: str = ""
    mlp_projection: str = ""
    mlp_readers: tuple[str, ...] = ()
    cross_out: str = ""
    resid_mid: tuple[str, Side] | None = None
    norms_after: tuple[str, ...] | None = None
    shares_bias: str = ""
    norms_writes: bool = False
    write_scale: str = ""
    returns: int = 0
    adds_in_place: bool = False
    flattens: tuple[str, ...] = ()

    @property
    def plain_add(self) -> bool:
        """Whether `block_out` is the stream plus `mlp_out`, no norm after it."""
        return self.norms_after is None

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return bool(self.attn_out and self.mlp_out) and self.resid_mid is None

    @property
    def places(self) -> dict[str, tuple[str, Side]]:
        """Site → module and side, in the block's own order, without the block's end."""
        named: dict[str, tuple[str, Side]] = {
            "attn_heads": (self.attn_projection, "input"),
            "attn_out": (self.attn_out, "output"),
            "cross_out": (self.cross_out, "output"),
            "resid_mid": self.resid_mid or ("", "input"),
            "mlp_in": (self.mlp, "input"),
            "mlp_hidden": (self.mlp_projection, "input"),
            "mlp_out": (self.mlp_out, "output"),
        }
        return {site: place for site, place in named.items() if place[0]}
