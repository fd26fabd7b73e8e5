"""Where each family's sites are, written down a second time, and read by plain hooks.

Nothing here uses the table of `equiv.model.known_families` or the engine: what is
measured there is compared with these.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from equiv.model.precision import KeepFloat64

Key = tuple[int, str]
OUTPUT: Key = (-1, "output")  # beside the sites: what the model returns


@dataclass(frozen=True)
class Places:
    """Path of the blocks in the model with a head, and of each site in a block.

    A site is written as `path`, for what a module gives, or `path<`, for what it is
    given. `scale` multiplies what is given at attn_out and mlp_out. Of an
    encoder–decoder these are the decoder's, whose layers come after the `encoder`'s.
    """

    blocks: str
    sites: Mapping[str, str]
    scale: str = ""
    encoder: "Places | None" = None


_LLAMA = {
    "attn_heads": "self_attn.o_proj<",
    "attn_out": "self_attn",
    "resid_mid": "post_attention_layernorm<",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.down_proj<",
    "mlp_out": "mlp",
}
_SANDWICH = {
    **_LLAMA,
    "attn_out": "post_attention_layernorm",
    "resid_mid": "pre_feedforward_layernorm<",
    "mlp_out": "post_feedforward_layernorm",
}
_POST_WRITES = {**_SANDWICH, "resid_mid": "mlp<"}
_MIXTURE = {site: path for site, path in _LLAMA.items() if site != "mlp_hidden"}
_PARALLEL = {site: path for site, path in _LLAMA.items() if site != "resid_mid"}
_PHI = {
    "attn_heads": "self_attn.dense<",
    "attn_out": "self_attn",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.fc2<",
    "mlp_out": "mlp",
}
_GPT2 = {
    "attn_heads": "attn.c_proj<",
    "attn_out": "attn",
    "resid_mid": "ln_2<",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.c_proj<",
    "mlp_out": "mlp",
}
_GPTJ = {
    "attn_heads": "attn.out_proj<",
    "attn_out": "attn",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.fc_out<",
    "mlp_out": "mlp",
}
_NEOX = {
    "attn_heads": "attention.dense<",
    "attn_out": "attention",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.dense_4h_to_h<",
    "mlp_out": "mlp",
}
_FALCON = {
    "attn_heads": "self_attention.dense<",
    "attn_out": "self_attention",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.dense_4h_to_h<",
    "mlp_out": "mlp.dense_4h_to_h",
}
_OPT = {
    "attn_heads": "self_attn.out_proj<",
    "attn_out": "self_attn",
    "resid_mid": "final_layer_norm<",
    "mlp_in": "fc1<",
    "mlp_hidden": "fc2<",
    "mlp_out": "fc2",
}
_BERT = {
    "attn_heads": "attention.output.dense<",
    "attn_out": "attention.output.dense",
    "resid_mid": "attention.output",
    "mlp_in": "intermediate<",
    "mlp_hidden": "output.dense<",
    "mlp_out": "output.dense",
}
_MODERNBERT = {
    "attn_heads": "attn.Wo<",
    "attn_out": "attn",
    "resid_mid": "mlp_norm<",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.Wo<",
    "mlp_out": "mlp",
}
_VIT = {
    "attn_heads": "attention.o_proj<",
    "attn_out": "attention",
    "resid_mid": "layernorm_after<",
    "mlp_in": "mlp<",
    "mlp_hidden": "mlp.fc2<",
    "mlp_out": "mlp",
}
_CLIP = {
    **_VIT,
    "attn_heads": "self_attn.out_proj<",
    "attn_out": "self_attn",
    "resid_mid": "layer_norm2<",
}

_T5 = {
    "attn_heads": "layer.0.SelfAttention.o<",
    "attn_out": "layer.0.SelfAttention.o",
    "resid_mid": "layer.1.layer_norm<",
    "mlp_in": "layer.1.DenseReluDense<",
    "mlp_hidden": "layer.1.DenseReluDense.wo<",
    "mlp_out": "layer.1.DenseReluDense.wo",
}
_T5_DECODER = {
    **{site: path.replace("layer.1", "layer.2") for site, path in _T5.items()},
    "cross_out": "layer.1.EncDecAttention.o",
}
_BART = {**_OPT, "attn_out": "self_attn.out_proj", "resid_mid": "fc1<"}
_WHISPER = {**_BART, "resid_mid": "final_layer_norm<"}
_CROSS = {"cross_out": "encoder_attn.out_proj"}


def _two(stem: str, encoder: Mapping[str, str], decoder: Mapping[str, str]) -> Places:
    """Both stacks, whose lists are called alike."""
    first = Places(stem.format("encoder"), encoder)
    return Places(stem.format("decoder"), decoder, encoder=first)


_LAYERS = "model.layers"
PLACES: dict[str, Places] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo", "smollm3"),
        Places(_LAYERS, _LLAMA),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), Places(_LAYERS, _SANDWICH)),
    **dict.fromkeys(("olmo2", "olmo3"), Places(_LAYERS, _POST_WRITES)),
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "deepseek_v3"),
        Places(_LAYERS, _MIXTURE),
    ),
    "granite": Places(_LAYERS, _LLAMA, "residual_multiplier"),
    "stablelm": Places(_LAYERS, _LLAMA),
    **dict.fromkeys(("cohere", "cohere2"), Places(_LAYERS, _PARALLEL)),
    "phi": Places(_LAYERS, _PHI),
    "gpt2": Places("transformer.h", _GPT2),
    "gptj": Places("transformer.h", _GPTJ),
    "gpt_neox": Places("gpt_neox.layers", _NEOX),
    "falcon": Places("transformer.h", _FALCON),
    "opt": Places("model.decoder.layers", _OPT),
    **dict.fromkeys(("mamba", "mamba2"), Places("backbone.layers", {})),
    **{
        family: Places(f"{prefix}.encoder.layer", _BERT)
        for family, prefix in {
            "bert": "bert",
            "roberta": "roberta",
            "xlm-roberta": "roberta",
            "electra": "electra",
            "deberta-v2": "deberta",
        }.items()
    },
    "modernbert": Places(_LAYERS, _MODERNBERT),
    "vit": Places("layers", _VIT),
    **dict.fromkeys(
        ("clip_text_model", "clip_vision_model"), Places("encoder.layers", _CLIP)
    ),
    **dict.fromkeys(("t5", "mt5", "umt5"), _two("{}.block", _T5, _T5_DECODER)),
    **dict.fromkeys(
        ("bart", "blenderbot-small", "marian", "plbart"),
        _two("model.{}.layers", _BART, {**_BART, **_CROSS}),
    ),
    **dict.fromkeys(
        ("blenderbot", "m2m_100", "mbart", "pegasus", "whisper"),
        _two("model.{}.layers", _WHISPER, {**_WHISPER, **_CROSS}),
    ),
}


def places_of(family: str, config: Any) -> Places:
    """Where a family's sites are, as its configuration chooses."""
    known = PLACES[family]
    sites = dict(known.sites)
    if family == "opt" and not config.do_layer_norm_before:
        sites["resid_mid"] = "self_attn_layer_norm"
    if family == "gpt_neox" and not config.use_parallel_residual:
        sites["resid_mid"] = "post_attention_layernorm<"
    if family == "falcon" and not (
        config.new_decoder_architecture or config.parallel_attn
    ):
        sites["resid_mid"] = "post_attention_layernorm<"
    if family == "stablelm" and config.use_parallel_residual:
        del sites["resid_mid"]
    return replace(known, sites=sites)


def activations(
    model: Any,
    places: Places,
    tensors: Mapping[str, Tensor],
    call: Mapping[str, Any],
) -> dict[Key, Tensor]:
    """Sites by (layer, site), "x" and "block_out" of every block, and the output."""
    seen: dict[Key, Tensor] = {}
    with ExitStack() as stack:
        for layer, (block, own) in enumerate(_blocks(model, places)):
            scale = getattr(block, own.scale) if own.scale else 1.0
            for site, path in {**own.sites, "x": "<", "block_out": ""}.items():
                module = block.get_submodule(path.rstrip("<"))
                note = _note(
                    seen, (layer, site), scale if site in ("attn_out", "mlp_out") else 1
                )
                handle = (
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, note=note: note(
                            args or kwargs["hidden_states"]
                        ),
                        with_kwargs=True,
                    )
                    if path.endswith("<")
                    else module.register_forward_hook(
                        lambda _m, _a, out, note=note: note(out)
                    )
                )
                stack.callback(handle.remove)
        out = functional_call(model, dict(tensors), (), dict(call))
    seen[OUTPUT] = out.logits if hasattr(out, "logits") else out.last_hidden_state
    shape = seen[0, "x"].shape[:2]
    # Some keep [batch · seq, d] for a while.
    return {
        key: value.view(*shape, -1) if value.ndim == 2 else value
        for key, value in seen.items()
    }


def _blocks(model: Any, places: Places) -> Iterator[tuple[Any, Places]]:
    """Every block with the places in it, the encoder's first."""
    if places.encoder is not None:
        yield from _blocks(model, places.encoder)
    for block in model.get_submodule(places.blocks):
        yield block, places


def _note(seen: dict[Key, Tensor], key: Key, scale: float) -> Callable[[Any], None]:
    def note(found: Any) -> None:
        first = found if isinstance(found, Tensor) else found[0]
        seen[key] = scale * first.clone()  # some are changed in place later

    return note


def at_scale(
    model: Any,
    places: Places,
    deltas: Mapping[str, Tensor],
    call: Mapping[str, Any],
    t: float,
) -> dict[Key, Tensor]:
    """Everything at W + tΔW, float64, by the model's own forward."""
    tensors = {
        name: value.detach() + t * deltas[name] if name in deltas else value.detach()
        for name, value in model.named_parameters()
    }
    with sdpa_kernel(SDPBackend.MATH), KeepFloat64(), torch.no_grad():
        return activations(model, places, tensors, call)


def central_difference(
    model: Any,
    places: Places,
    deltas: Mapping[str, Tensor],
    call: Mapping[str, Any],
    step: float,
) -> dict[Key, Tensor]:
    """The derivative at W in direction ΔW, by four forwards.

    D(h) = (f(h) − f(−h))/2h misses h²f‴/6; (4 D(h) − D(2h))/3 is free of that.
    """
    at = {t: at_scale(model, places, deltas, call, t * step) for t in (-2, -1, 1, 2)}
    return {
        key: (8 * (at[1][key] - at[-1][key]) - (at[2][key] - at[-2][key])) / (12 * step)
        for key in at[1]
    }
