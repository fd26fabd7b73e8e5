"""Load the shipped model, its fine-tunes and its texts."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from equiv.tasks.listops import generate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_FOLDER = Path(__file__).parent / "model"
BASE, TUNED, LORA = _FOLDER / "base", _FOLDER / "tuned", _FOLDER / "lora"
CARD = _FOLDER / "card.json"

OLD = ("MAX", "MIN", "MED", "SM")
NEW = ("LAST", "RNG")
EVENLY = (*OLD, *NEW)  # what the fine-tunes are trained on
RARELY = (*OLD * 9, *NEW)  # what the base is trained on: one new operator in nineteen


def load_base() -> "LlamaForCausalLM":
    """The base model, in float32 and eval mode."""
    return _load(BASE)


def load_tuned() -> "LlamaForCausalLM":
    """The full fine-tune, in float32 and eval mode."""
    return _load(TUNED)


def load_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer: one token per word."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(BASE)


def texts(count: int, seed: int = 0) -> list[str]:
    """Held-out lines on the fine-tune's mix of old and new operators, with answers.

    Example:
        >>> texts(2) == texts(3)[:2]
        True
    """
    examples = islice(generate(EVENLY, seed, held_out=True), count)
    return [f"{example.text} {example.answer}" for example in examples]


def _load(path: Path) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
