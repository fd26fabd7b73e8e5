"""Encoder–decoder families: how the blocks of both stacks are built, one line each.

Paths are relative to the block, as in `known_families.py`; cross-attention is the one
thing that only the decoder's blocks have. The lists of blocks end in `encoder.` and
`decoder.` and the path of the line.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from equiv.model.architecture import Architecture


@dataclass(frozen=True)
class Pair:
    """How the blocks of an encoder and of the decoder that reads it are built."""

    encoder: Architecture
    decoder: Architecture

    @property
    def decoder_alone(self) -> Architecture:
        """The decoder where nothing is encoded: without its cross-attention."""
        norms = self.decoder.norms_after
        return replace(
            self.decoder,
            cross_out="",
            norms_after=None if norms is None else (norms[0], norms[-1]),
            resid_mid=self.encoder.resid_mid if norms else self.decoder.resid_mid,
        )


_T5_ENCODER = Architecture(
    blocks="block",
    attn_out="layer.0.SelfAttention",
    mlp="layer.1.DenseReluDense",
    mlp_out="layer.1.DenseReluDense",
    attn_projection="layer.0.SelfAttention.o",
    mlp_projection="layer.1.DenseReluDense.wo",
    mlp_readers=("layer.1.DenseReluDense.wi",),
    resid_mid=("layer.0", "output"),
    returns=3,
    shares_bias="layer.0.SelfAttention",
)
_T5_DECODER = replace(
    _T5_ENCODER,
    mlp="layer.2.DenseReluDense",
    mlp_out="layer.2.DenseReluDense",
    mlp_projection="layer.2.DenseReluDense.wo",
    mlp_readers=("layer.2.DenseReluDense.wi",),
    cross_out="layer.1.EncDecAttention",
    resid_mid=("layer.1", "output"),
)
_BART_ENCODER = Architecture(
    blocks="layers",
    attn_out="self_attn",
    mlp="fc1",
    mlp_out="fc2",
    attn_projection="self_attn.out_proj",
    mlp_projection="fc2",
    mlp_readers=("fc1",),
    resid_mid=("self_attn_layer_norm", "output"),
    norms_after=("self_attn_layer_norm", "final_layer_norm"),
)
_BART_DECODER = replace(
    _BART_ENCODER,
    cross_out="encoder_attn",
    resid_mid=("encoder_attn_layer_norm", "output"),
    norms_after=(
        "self_attn_layer_norm",
        "encoder_attn_layer_norm",
        "final_layer_norm",
    ),
)
_WHISPER_ENCODER = replace(
    _BART_ENCODER, resid_mid=("final_layer_norm", "input"), norms_after=None
)
_WHISPER_DECODER = replace(_WHISPER_ENCODER, cross_out="encoder_attn")
_POST_NORM = Pair(_BART_ENCODER, _BART_DECODER)
_PRE_NORM = Pair(_WHISPER_ENCODER, _WHISPER_DECODER)


def _gated(known: Architecture) -> Architecture:
    mlp = known.mlp
    return replace(known, mlp_readers=(f"{mlp}.wi_0", f"{mlp}.wi_1"))


def _t5(config: Any) -> Pair:
    pair = Pair(_T5_ENCODER, _T5_DECODER)
    if config.is_gated_act:
        return Pair(_gated(pair.encoder), _gated(pair.decoder))
    return pair


def _umt5(config: Any) -> Pair:
    """Like T5, but every block has a table of positions of its own."""
    pair = _t5(config)
    return Pair(
        replace(pair.encoder, shares_bias="", returns=0),
        replace(pair.decoder, shares_bias="", returns=0),
    )


PAIRS: dict[str, Pair | Callable[[Any], Pair]] = {
    "t5": _t5,
    "mt5": _t5,
    "umt5": _umt5,
    "bart": _POST_NORM,
    "plbart": _POST_NORM,
    "marian": _POST_NORM,
    "blenderbot-small": _POST_NORM,
    "blenderbot": _PRE_NORM,
    "mbart": _PRE_NORM,
    "m2m_100": _PRE_NORM,
    "pegasus": _PRE_NORM,
    "whisper": _PRE_NORM,
}


def pair_of(family: str, config: Any) -> Pair | None:
    """How both stacks of a family are built; `None` if it is not in the table."""
    known = PAIRS.get(family)
    return known if known is None or isinstance(known, Pair) else known(config)
