"""The study `oracles_by_depth`: oracles at one layer, in one toy with four variants.

A small Llama whose MLP has SiLU or GELU, without norms after its sub-layers or with
them, as in Gemma-2. A seed's variants start from the same weights and see the same
expressions, so that between two of them one thing is swapped. Fine-tunes move the
blocks alone: what the head does with the stream is the base's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from equiv.demo.train import OTHER
from equiv.theory.trained.joining import joined
from equiv.theory.trained.nets import (
    EVENLY,
    NEW,
    OLD,
    RARELY,
    Recipe,
    Training,
    held_out,
    new_base,
    right,
)
from equiv.theory.trained.oracles import oracle_changes
from equiv.theory.trained.study import study
from equiv.theory.values import Value

# Name → (activation, whether norms follow the sub-layers).
VARIANTS = {
    "SiLU": ("silu", False),
    "GELU": ("gelu_pytorch_tanh", False),
    "SiLU, post-norms": ("silu", True),
    "GELU, post-norms": ("gelu_pytorch_tanh", True),
}
RECIPE = Recipe(
    width=32, base=Training(600, 64, 5e-3), full=Training(200, 64, 1e-3), scored=500
)


@dataclass(frozen=True)
class Sizes:
    """The toy, its trainings and what is measured on; defaults: the shipped results.

    `recipe.lora` is not used.
    """

    recipe: Recipe = RECIPE
    sequences: int = 128


@study("oracles_by_depth", minutes=12)
def oracles_by_depth(seeds: Sequence[int]) -> Mapping[str, Value]:
    """The results that claim 23 reads."""
    return joined([of_seed(seed) for seed in seeds])


def of_seed(seed: int, sizes: Sizes = Sizes()) -> dict[str, Value]:
    """All variants of one seed."""
    return {name: _of_variant(seed, sizes, *v) for name, v in VARIANTS.items()}


def _of_variant(
    seed: int, sizes: Sizes, activation: str, post_norms: bool
) -> dict[str, Value]:
    recipe = sizes.recipe
    base = with_post_norms(new_base(seed, recipe, activation), post_norms)
    recipe.base(base, RARELY, 10 * seed + 1, OTHER)
    tuned = copy.deepcopy(base)
    tuned.requires_grad_(False)
    tuned.model.layers.requires_grad_(True)
    recipe.full(tuned, EVENLY, 10 * seed + 2)
    models = {"base": base, "tuned": tuned}
    return {
        "accuracy": {
            name: {
                "old": right(model, OLD, recipe.scored),
                "new": right(model, NEW, recipe.scored),
            }
            for name, model in models.items()
        },
        "change": oracle_changes(base, tuned, held_out(sizes.sequences)),
    }


def with_post_norms(model: Any, wanted: bool) -> Any:
    """The model, changed in place: what a sub-layer adds to the stream is normed."""
    for block in model.model.layers if wanted else ():
        norm = type(block.input_layernorm)
        width, eps = model.config.hidden_size, model.config.rms_norm_eps
        attention = block.self_attn
        attention.o_proj = nn.Sequential(attention.o_proj, norm(width, eps))
        block.mlp = nn.Sequential(block.mlp, norm(width, eps))
    return model
