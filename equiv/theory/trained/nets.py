"""The nets that studies train: per seed a small Llama and two fine-tunes of it.

The base learns to evaluate ListOps expressions with MAX, MIN and MED and rarely meets
LAST and RNG, as the shipped model does, at a quarter of its size. It is then tuned on
all five evenly, once in all its weights and once as LoRA.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from equiv.demo.train import IDS, OTHER, VOCABULARY, accuracy, encode, train
from equiv.tasks.listops import generate

OLD = ("MAX", "MIN", "MED")
NEW = ("LAST", "RNG")
EVENLY = (*OLD, *NEW)  # what the fine-tunes are trained on
RARELY = (*OLD * 30, *NEW)  # what the base is trained on
RANK = 8  # of LoRA


@dataclass(frozen=True)
class Training:
    """One run of `equiv.demo.train.train`: AdamW, one cycle of the learning rate."""

    steps: int
    batch: int
    rate: float

    def __call__(
        self, model: nn.Module, operators: tuple[str, ...], seed: int, other: float = 0
    ) -> None:
        """Train the model in place."""
        train(model, operators, **asdict(self), seed=seed, other=other)


@dataclass(frozen=True)
class Recipe:
    """Sizes and trainings; the defaults are what the shipped results come from.

    Attributes:
        width: Of the residual stream; the MLP is three times as wide.
        layers: Blocks.
        base: From random weights.
        full: From the base, all weights.
        lora: From the base, LoRA on every linear layer of the blocks.
        scored: Held-out expressions that accuracy is measured on.
    """

    width: int = 64
    layers: int = 4
    base: Training = Training(1200, 64, 3e-3)
    full: Training = Training(400, 64, 5e-4)
    lora: Training = Training(400, 64, 2e-3)
    scored: int = 1000


@dataclass(frozen=True)
class Nets:
    """What is trained from one seed, all in float32 and eval mode.

    Attributes:
        seed: Where it comes from.
        base: The base model.
        full: The full fine-tune.
        lora: The LoRA fine-tune, a `PeftModel` over its own copy of the base.
        accuracy: Model → "old" and "new" → share of held-out expressions with these
            operators that it answers right.
    """

    seed: int
    base: Any
    full: Any
    lora: Any
    accuracy: Mapping[str, Mapping[str, float]]

    @property
    def tuned(self) -> dict[str, Any]:
        """Both fine-tunes, by the name that results give them."""
        return {"all weights": self.full, "LoRA": self.lora}


@lru_cache(maxsize=8)
def nets(seed: int, recipe: Recipe = Recipe()) -> Nets:
    """Train the nets of a seed, once in a process.

    They are shared by whoever asks: leave them as they are, and train copies.
    """
    base = base_of(seed, recipe)
    full = copy.deepcopy(base)
    recipe.full(full, EVENLY, 10 * seed + 2)
    lora = with_lora(copy.deepcopy(base), seed)  # a PeftModel changes what it wraps
    recipe.lora(lora, EVENLY, 10 * seed + 3)
    made = Nets(seed, base, full.eval(), lora.eval(), {})
    scores = {
        name: {
            "old": right(model, OLD, recipe.scored),
            "new": right(model, NEW, recipe.scored),
        }
        for name, model in {"base": base, **made.tuned}.items()
    }
    return replace(made, accuracy=scores)


@lru_cache(maxsize=8)
def base_of(seed: int, recipe: Recipe = Recipe()) -> Any:
    """The base of a seed alone, in eval mode; shared likewise."""
    base = new_base(seed, recipe)
    recipe.base(base, RARELY, 10 * seed + 1, OTHER)
    return base.eval()


def new_base(seed: int, recipe: Recipe = Recipe(), activation: str = "silu") -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.width,
            intermediate_size=3 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            hidden_act=activation,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            pad_token_id=IDS["<pad>"],
            bos_token_id=None,
            eos_token_id=IDS["<eos>"],
        )
    )


def with_lora(base: Any, seed: int, rank: int = RANK) -> Any:
    """The base, changed in place, with LoRA on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(base, config)


def right(model: nn.Module, operators: tuple[str, ...], count: int) -> float:
    """Share of held-out expressions with these operators that are answered right."""
    return accuracy(model, operators, count=count, seed=101)["all"]["accuracy"]


def held_out(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Expressions that no training has seen, with their answers, as a model reads them.

    Returns:
        `input_ids` and `attention_mask`, each [count, 13], padded on the right.

    Example:
        >>> inputs = held_out(3)
        >>> inputs["input_ids"].shape
        torch.Size([3, 13])
        >>> bool((inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all())
        True
    """
    ids, _, _ = encode(list(islice(generate(EVENLY, seed, held_out=True), count)))
    return {"input_ids": ids, "attention_mask": (ids != IDS["<pad>"]).long()}
