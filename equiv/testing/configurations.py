"""Small configurations of every family, as their classes in transformers take them."""

from typing import Any

VOCABULARY = 32
SPREAD = 0.2  # standard deviation of the weights

# No padding token: its embedding would be zero, where an RMS norm bends so sharply
# (over a distance of √ε) that no probed scale of an update is small.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
}

_GEMMA2 = {
    **_LLAMA,
    "query_pre_attn_scalar": 8,
    "sliding_window": 32,
    "pad_token_id": None,
}
# Some layers see four tokens back, some all of them.
_SLIDING = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GROUPED = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
_MIXTURE = {
    **_LLAMA,
    "moe_intermediate_size": 12,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = {
    **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_NEOX = {**_BERT, "hidden_act": "gelu", "bos_token_id": 1, "eos_token_id": 2}
_OPT = {
    **_BERT,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "init_std": SPREAD,
    "activation_function": "gelu",
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {
    **{k: v for k, v in _BERT.items() if k != "intermediate_size"},
    "ffn_hidden_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "state_size": 4,
    "num_hidden_layers": 2,
    "expand": 2,
    "conv_kernel": 3,
    "initializer_range": SPREAD,
    "residual_in_fp32": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA2 = {**_MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}

_MODERNBERT = {
    **_BERT,
    "local_attention": 4,
    "pad_token_id": None,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
_DEBERTA = {
    **_BERT,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_buckets": 8,
    "position_biased_input": False,
}
_IMAGES = {
    **{
        k: v
        for k, v in _BERT.items()
        if k not in ("vocab_size", "max_position_embeddings")
    },
    "image_size": 8,
    "patch_size": 4,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "init_std": SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_MARIAN = {**_BART, "decoder_vocab_size": VOCABULARY}
_WHISPER = {
    **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
    "num_mel_bins": 4,
    "max_source_positions": 6,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 0.6,  # its attention does not divide by the root of d_kv
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# Family → names of configuration and model class in transformers, and the settings.
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA2),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
}
FAMILIES = tuple(CLASSES)  # one of every kind of block; tests of everything run these
CLASSES |= {
    "clip_text_model": ("CLIPTextConfig", "CLIPTextModel", _BERT),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", _IMAGES),
    "cohere": ("CohereConfig", "CohereForCausalLM", _GROUPED),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**_LLAMA, **_SLIDING}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", _DEBERTA),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_BERT, "embedding_size": 12}),
    "falcon": ("FalconConfig", "FalconForCausalLM", _FALCON),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _LLAMA),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA2, **_SLIDING},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_MIXTURE, **_SLIDING}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_GROUPED, "residual_multiplier": 0.4, "attention_multiplier": 0.5},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", _MAMBA),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", _MAMBA2),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MIXTURE),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", _MODERNBERT),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _GROUPED),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**_GROUPED, **_SLIDING}),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "pad_token_id": None}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MIXTURE, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MIXTURE),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _BERT),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GROUPED),
    "vit": ("ViTConfig", "ViTModel", _IMAGES),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", _BERT),
}
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", _BART),
    "blenderbot-small": (
        "BlenderbotSmallConfig",
        "BlenderbotSmallForConditionalGeneration",
        _BART,
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", _MARIAN),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", _T5),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _BART),
    "plbart": ("PLBartConfig", "PLBartForConditionalGeneration", _BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", _T5),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
}
PAIRED = tuple(PAIRS)  # encoder–decoders
CLASSES |= PAIRS
EVERY_FAMILY = tuple(CLASSES)
