"""Claim 34: how many parameters steering and LoRA have, as shares of the model's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from equiv.theory.judging import identity
from equiv.theory.registry import claim
from equiv.theory.values import AsWritten, ClaimResult, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 8
LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
# The published configurations; what they leave out is the family's default.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
# Percent of the model as the blog prints it: post-block steering r8, LoRA r8.
PRINTED = {
    "Llama-3.2-1B": (0.04, 0.45),
    "Gemma-3-1B": (0.04, 0.45),
    "Qwen3-4B": (0.036, 0.41),
}


@claim(
    34,
    title="steering of rank 8 has 0.04 % of the parameters of a 1B model, LoRA 0.5 %",
    formula="block_out: 2rdL; LoReFT: (2rd + r)L; vector: dL; LoRA: Σ r (in + out)",
    assumptions="r = 8; LoRA on the seven linear layers; tied embeddings counted once",
    source="blog: tables; paper: 0.04 % in the abstract",
    falsified_by="other counts of a model built from its published configuration",
    kind="exact",
    as_written="LoRA of rank 8 has 0.45 % of the parameters of gemma-3-1b",
    derivation="""
        A map of rank r from d to d has r(d + d) parameters, one per layer. LoRA has
        r(in + out) per matrix. The models are built on the meta device from their
        published configurations, without memory for weights, and counted; the formulas
        are compared with modules of those shapes.

        0.45 % is Llama-3.2-1B's share. Gemma-3-1B's narrow stream (1152) with a wide
        MLP (6912) gives LoRA more: 0.65 %.
    """,
)
def parameter_counts() -> ClaimResult:
    """Four models, counted."""
    gaps, table = {}, {}
    for name in PUBLISHED:
        model = meta_model(name)
        counts, formulas = counted(model), by_formula(model)
        for form in formulas:
            gaps[f"{name}, {form}"] = float(abs(counts[form] - formulas[form]))
        total = sum(p.numel() for p in model.parameters())
        shares = {form: 100 * n / total for form, n in counts.items()}
        table[name] = {"total": total, **counts} | {
            f"{form}, %": round(share, 4) for form, share in shares.items()
        }
    printed = table["Gemma-3-1B"]["LoRA r8, %"]
    return identity(
        gaps,
        "Formulas and counted modules agree; block_out r8 against LoRA r8: "
        + "; ".join(
            f"{name} {t['block_out r8, %']} % and {t['LoRA r8, %']} %"
            for name, t in table.items()
        ),
        evidence=table,
        as_written=AsWritten(
            Verdict.HOLDS if round(printed, 2) == 0.45 else Verdict.FAILS,
            "0.45 % is the share in Llama-3.2-1B",
            {
                "LoRA r8 in Gemma-3-1B, %": printed,
                "LoRA r8 in Llama-3.2-1B, %": table["Llama-3.2-1B"]["LoRA r8, %"],
            },
        ),
    )


def meta_model(name: str) -> "PreTrainedModel":
    """A model of the published shape, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    published = dict(PUBLISHED[name])
    config = AutoConfig.for_model(published.pop("model_type"), **published)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def by_formula(model: "PreTrainedModel") -> dict[str, int]:
    """Counts from the configuration alone."""
    c: Any = model.config
    d, layers, inner = c.hidden_size, c.num_hidden_layers, c.intermediate_size
    head = getattr(c, "head_dim", None) or d // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    pairs = [(d, q), (d, kv), (d, kv), (q, d), (d, inner), (d, inner), (inner, d)]
    return {
        "vector": d * layers,
        "block_out r8": 2 * RANK * d * layers,
        "LoReFT r8": (2 * RANK * d + RANK) * layers,
        "LoRA r8": sum(RANK * (i + o) for i, o in pairs) * layers,
    }


def counted(model: "PreTrainedModel") -> dict[str, int]:
    """Counts of modules, one set per layer; LoRA by the shapes of the linear layers."""
    d, layers = model.config.hidden_size, model.config.num_hidden_layers
    with torch.device("meta"):
        low = nn.Sequential(
            nn.Linear(d, RANK, bias=False), nn.Linear(RANK, d, bias=False)
        )
        reft = nn.ModuleList([nn.Linear(d, RANK), nn.Linear(d, RANK, bias=False)])
        lora = [
            nn.Sequential(
                nn.Linear(m.in_features, RANK, bias=False),
                nn.Linear(RANK, m.out_features, bias=False),
            )
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and name.split(".")[-1] in LINEARS
        ]
    return {
        "vector": d * layers,
        "block_out r8": layers * _size(low),
        "LoReFT r8": layers * _size(reft),
        "LoRA r8": sum(map(_size, lora)),
    }


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
