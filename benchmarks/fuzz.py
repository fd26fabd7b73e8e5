"""Hundreds of models of random configurations, each against its own forward.

    python -m benchmarks.fuzz [--models N] [--first SEED] [--json FILE]

Every seed draws a family and a configuration of it: heads, key-value heads, head size,
widths, depth, activation, biases, tied embeddings, norms and their epsilon, sliding and
full attention, experts. What is then measured is a row of `support_table.py`. A model
ends in one of these ways:

    right      every cell is as it should be
    refused    the library says in words why not
    wrong      a cell is not as it should be, or something else was raised
    invalid    transformers itself cannot build or run such a model: not counted

Orders can be off although every number is right: where the update, small as it is,
reaches over a bend of the model (a norm of few coordinates), or sends a token to other
experts. So an order is measured again with an update an eighth, then a 64th as large;
only what is still off counts as wrong.
"""

import argparse
import json
import platform
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import equiv
from benchmarks.support_table import RELATIVE_NORM, Family, Row
from equiv.testing.models import EVERY_FAMILY, PAIRED, example, transformer

# One encoder–decoder, so that a seed draws what it drew before there were others.
FAMILIES = sorted({*EVERY_FAMILY} - {*PAIRED} | {"whisper"})
SMALLER = (1.0, 1 / 8, 1 / 64)
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "tanh")
EITHER = (
    "attention_bias",
    "mlp_bias",
    "bias",
    "use_bias",
    "use_qkv_bias",
    "enable_bias",
    "tie_word_embeddings",
    "use_qk_norm",
    "qk_layernorm",
    "norm_topk_prob",
    "use_parallel_residual",
    "do_layer_norm_before",
    "layer_norm_elementwise_affine",
    "scale_attn_by_inverse_layer_idx",
    "parallel_attn",
    "multi_query",
    "new_decoder_architecture",
    "relative_attention",
)
EPSILONS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
)
NAMES = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "encoder_attention_heads"),
    "depth": ("num_hidden_layers", "n_layer", "encoder_layers"),
    "hidden": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "encoder_ffn_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    "activation": (
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "activation",
    ),
}


@dataclass(frozen=True)
class Drawn:
    """A family and a configuration of it, as its seed draws them."""

    seed: int
    family: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a model ended, and what was said."""

    drawn: Drawn
    ended: str
    said: str
    relative_norm: float


def draw(seed: int) -> Drawn:
    """The family and configuration of a seed."""
    source = random.Random(seed)
    family = source.choice(FAMILIES)
    return Drawn(seed, family, _config(family, source))


def _config(family: str, source: random.Random) -> dict[str, Any]:
    known = transformer(family).config.to_dict()
    heads, depth = source.choice([1, 2, 4]), source.choice([2, 3])
    size = source.choice([4, 8, 12])
    free = bool(known.get("head_dim")) and "num_attention_heads" in known
    width = source.choice([8, 12, 16, 24]) if free else heads * size
    drawn = {
        "width": width,
        "heads": heads,
        "depth": depth,
        "hidden": source.choice([5, 24, 33]),
        "activation": source.choice(ACTIVATIONS),
    }
    found: dict[str, Any] = {
        name: drawn[what]
        for what, names in NAMES.items()
        for name in names
        if name in known
    }
    found |= {name: source.random() < 0.5 for name in EITHER if name in known}
    found |= {name: source.choice([1e-5, 1e-6]) for name in EPSILONS if name in known}
    if "num_key_value_heads" in known:
        shared = [n for n in (1, 2, 4) if heads % n == 0]
        own = heads if family == "deepseek_v3" else source.choice(shared)
        found["num_key_value_heads"] = own
    if free:
        found["head_dim"] = size
    if known.get("layer_types"):
        kinds = ["sliding_attention", "full_attention"]
        found["layer_types"] = [source.choice(kinds) for _ in range(depth)]
        found |= {"sliding_window": source.choice([2, 4]), "use_sliding_window": True}
    for name in ("num_experts", "num_local_experts"):
        if name in known:
            found[name] = source.choice([2, 4, 6])
    if "num_experts_per_tok" in known and family != "deepseek_v3":
        found["num_experts_per_tok"] = source.choice([1, 2])
    if "vocab_size" in known:
        found["vocab_size"] = source.choice([32, 47, 64])
    return found | _fitting(family, found)


def _fitting(family: str, found: dict[str, Any]) -> dict[str, Any]:
    """What has to go with what was drawn."""
    width, heads = found.get("hidden_size", 0), found.get("num_attention_heads", 1)
    if family == "opt":
        return {"word_embed_proj_dim": width}
    if family == "mamba2":
        return {"hidden_size": 16, "num_heads": 4, "head_dim": 8}
    if family == "falcon":
        return {"num_kv_heads": 1 if heads == 1 else 2}
    if family == "gptj":
        return {"rotary_dim": 4}
    if family == "whisper":
        return {"decoder_attention_heads": found["encoder_attention_heads"]}
    return {}


def invalid(drawn: Drawn) -> str:
    """What transformers itself says against such a model; "" if nothing."""
    try:
        model = transformer(drawn.family, seed=drawn.seed, **drawn.config)
        with torch.no_grad():
            model(**example(model, seed=drawn.seed))
    except Exception as error:  # whatever it says, the model does not run
        return f"{type(error).__name__}: {error}"
    return ""


def outcome(drawn: Drawn) -> Outcome:
    """How one model ends."""
    if said := invalid(drawn):
        return Outcome(drawn, "invalid", said, 0.0)
    norm, row = RELATIVE_NORM, None
    for part in SMALLER:
        norm = RELATIVE_NORM * part
        try:
            made = Family(
                drawn.family, seed=drawn.seed, relative_norm=norm, **drawn.config
            )
            row = made.row()
        except equiv.EquivError as error:
            return Outcome(drawn, "refused", str(error), norm)
        except Exception:  # that none is raised is what is tested
            return Outcome(drawn, "wrong", traceback.format_exc(), norm)
        if row.green:
            return Outcome(drawn, "right", "", norm)
        if not _only_orders(row):
            break
    return Outcome(drawn, "wrong", str(row), norm)


def _only_orders(row: Row) -> bool:
    """Whether nothing but orders, and the derivative's truncation, is off."""
    exact = (row.captured, row.superposition, row.probe, row.steer)
    return max(exact) < 1e-11 and row.generate is not False


def outcomes(models: int, first: int) -> Iterator[Outcome]:
    """So many that transformers can run, from a seed on."""
    seed, done = first, 0
    while done < models:
        found = outcome(draw(seed))
        seed += 1
        done += found.ended != "invalid"
        yield found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Models of random configurations.")
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for one in outcomes(arguments.models, arguments.first):
        found.append(one)
        if one.ended != "right":
            print(one.ended, one.drawn, one.said[-400:], flush=True)
    counts = Counter(one.ended for one in found)
    print(", ".join(f"{count} {ended}" for ended, count in counts.most_common()))
    if arguments.json:
        versions = {n: version(n) for n in ("equiv", "torch", "transformers")}
        content = {
            "machine": platform.machine(),
            "versions": versions,
            "first": arguments.first,
            "counts": dict(counts),
            "families": dict(
                sorted(
                    Counter(o.drawn.family for o in found if o.ended == "right").items()
                )
            ),
            "smaller_update": sum(
                o.ended == "right" and o.relative_norm < RELATIVE_NORM for o in found
            ),
            "not_right": [asdict(o) for o in found if o.ended != "right"],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if counts["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
