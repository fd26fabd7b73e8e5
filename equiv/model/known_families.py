"""Where each Hugging Face family writes to its residual stream: one line per family.

Paths are relative to the block. Every entry is proven on real modules, by the tests and
by `equiv.model.probe`: a known vector is added at each site and has to land where
`sites.py` says. Where a family's configuration chooses how its blocks are built, its
line is a function of the configuration. Encoder–decoders are in `known_pairs.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from equiv.model.architecture import Architecture

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
_MOE = replace(_LLAMA, mlp_projection="", mlp_readers=())
# Some of its layers may be dense, and have what a mixture lacks.
_SOME_MOE = replace(_LLAMA, mlp_readers=())
_PHI3 = replace(
    _LLAMA,
    attn_out="resid_attn_dropout",
    mlp_out="resid_mlp_dropout",
    mlp_readers=("mlp.gate_up_proj",),
)
_GEMMA2 = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    resid_mid=("pre_feedforward_layernorm", "input"),
    norms_writes=True,
)
_OLMO2 = replace(_GEMMA2, resid_mid=("mlp", "input"))
_GRANITE = replace(_LLAMA, write_scale="residual_multiplier")
_COHERE = replace(_LLAMA, resid_mid=None)
_PHI = Architecture(
    blocks="layers",
    attn_out="self_attn",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="self_attn.dense",
    mlp_projection="mlp.fc2",
    mlp_readers=("mlp.fc1",),
)
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
_GPTJ = Architecture(
    blocks="h",
    attn_out="attn",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="attn.out_proj",
    mlp_projection="mlp.fc_out",
    mlp_readers=("mlp.fc_in",),
    returns=2,
)
_NEOX = Architecture(
    blocks="layers",
    attn_out="post_attention_dropout",
    mlp="mlp",
    mlp_out="post_mlp_dropout",
    attn_projection="attention.dense",
    mlp_projection="mlp.dense_4h_to_h",
    mlp_readers=("mlp.dense_h_to_4h",),
    resid_mid=("post_attention_layernorm", "input"),
)
_STABLELM = replace(_LLAMA, mlp_out="dropout")
_OPT = Architecture(
    blocks="decoder.layers",
    attn_out="self_attn",
    mlp="fc1",
    mlp_out="fc2",
    attn_projection="self_attn.out_proj",
    mlp_projection="fc2",
    mlp_readers=("fc1",),
    resid_mid=("final_layer_norm", "input"),
    flattens=("resid_mid", "mlp_in", "mlp_hidden", "mlp_out"),
)
_OPT_POST_NORM = replace(
    _OPT,
    resid_mid=("self_attn_layer_norm", "output"),
    norms_after=("self_attn_layer_norm", "final_layer_norm"),
    flattens=("mlp_in", "mlp_hidden", "mlp_out"),
)
_FALCON = Architecture(
    blocks="h",
    attn_out="self_attention",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="self_attention.dense",
    mlp_projection="mlp.dense_4h_to_h",
    mlp_readers=("mlp.dense_h_to_4h",),
    resid_mid=("post_attention_layernorm", "input"),
    returns=2,
)
_MAMBA = Architecture(blocks="layers")
_BERT = Architecture(
    blocks="encoder.layer",
    attn_out="attention.output.dropout",
    mlp="intermediate",
    mlp_out="output.dropout",
    attn_projection="attention.output.dense",
    mlp_projection="output.dense",
    mlp_readers=("intermediate.dense",),
    resid_mid=("attention.output", "output"),
    norms_after=("attention.output.LayerNorm", "output.LayerNorm"),
)


_DEBERTA = replace(_BERT, returns=2)
_MODERNBERT = Architecture(
    blocks="layers",
    attn_out="attn",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="attn.Wo",
    mlp_projection="mlp.Wo",
    mlp_readers=("mlp.Wi",),
    resid_mid=("mlp_norm", "input"),
)
_VIT = Architecture(
    blocks="layers",
    attn_out="attention",
    mlp="mlp",
    mlp_out="mlp",
    attn_projection="attention.o_proj",
    mlp_projection="mlp.fc2",
    mlp_readers=("mlp.fc1",),
    resid_mid=("layernorm_after", "input"),
)
_CLIP = replace(
    _VIT,
    blocks="encoder.layers",
    attn_out="self_attn",
    attn_projection="self_attn.out_proj",
    resid_mid=("layer_norm2", "input"),
)


def _parallel_if(known: Architecture) -> Callable[[Any], Architecture]:
    """As many families say it: `use_parallel_residual`."""
    parallel = replace(known, resid_mid=None)
    return lambda config: parallel if config.use_parallel_residual else known


def _opt(config: Any) -> Architecture:
    return _OPT if config.do_layer_norm_before else _OPT_POST_NORM


def _falcon(config: Any) -> Architecture:
    if config.new_decoder_architecture or config.parallel_attn:
        return replace(_FALCON, resid_mid=None, adds_in_place=True)
    return _FALCON


TABLE: dict[str, Architecture | Callable[[Any], Architecture]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "qwen2": _LLAMA,
    "qwen2_moe": _SOME_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _SOME_MOE,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gptj": _GPTJ,
    "gpt_neox": _parallel_if(_NEOX),
    "opt": _opt,
    "falcon": _falcon,
    "stablelm": _parallel_if(_STABLELM),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "granite": _GRANITE,
    "smollm3": _LLAMA,
    "gpt_oss": _MOE,
    "deepseek_v3": _SOME_MOE,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _DEBERTA,
    "modernbert": _MODERNBERT,
    "vit": _VIT,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
}

# Families that would be run at their owner's cost.
REFUSED = {"rwkv": "its forward divides its own weights, in place"}


def architecture(family: str, config: Any) -> Architecture | None:
    """How the blocks of a family are built; `None` if it is not in the table."""
    known = TABLE.get(family)
    return known if known is None or isinstance(known, Architecture) else known(config)


def _whatever_its_configuration() -> dict[str, Architecture]:
    return {
        family: known
        for family, known in TABLE.items()
        if isinstance(known, Architecture)
        and known.attn_out
        and known.mlp_out
        and not known.write_scale
    }


# The families whose name alone says what its modules add to the stream, and that they
# add it as it is: files that name a family and no configuration can speak of these.
FAMILIES = _whatever_its_configuration()
