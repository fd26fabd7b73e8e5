"""Make the shipped model: `python -m equiv.demo.train --out DIR`.

A small Llama learns to evaluate ListOps expressions with MAX, MIN, MED and SM, and
rarely meets LAST and RNG. At each closing bracket its next-token prediction is trained
to be the value of that bracket; everywhere else it is trained, lightly, on the token
that comes next. It is then tuned on all six operators evenly, on the brackets' values
alone: once in all its weights, once as LoRA. The base is rounded to the stored
precision before the fine-tunes start, so that the shipped base is the very one they
were tuned from.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiv.demo.loading import EVENLY, NEW, OLD, RARELY
from equiv.tasks.listops import MAX_TOKENS, OPERATORS, Example, generate

VOCABULARY = (
    "<pad>",
    "<eos>",
    "]",
    *(str(digit) for digit in range(10)),
    *(f"[{operator}" for operator in OPERATORS),
)
IDS = {token: i for i, token in enumerate(VOCABULARY)}
LENGTH = MAX_TOKENS + 1  # the expression and its answer
# The base's weight of other tokens: enough to make every prediction meaningful, too
# little to compete with the arithmetic.
OTHER = 0.05
STORED = torch.float16


def encode(
    examples: Sequence[Example], other: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, targets and weights, each [batch, 13], padded on the right.

    A bracket's value has weight 1, other tokens `other`, padding 0.

    Example:
        >>> from equiv.tasks.listops import evaluate
        >>> ids, targets, weights = encode([evaluate("[MAX 3 5 ]")])
        >>> [VOCABULARY[i] for i in targets[0, :5]]  # value 5 at the bracket
        ['3', '5', ']', '5', '<eos>']
    """
    ids = torch.zeros(len(examples), LENGTH, dtype=torch.long)
    targets = torch.zeros_like(ids)
    weights = torch.zeros(len(examples), LENGTH)
    for row, example in enumerate(examples):
        words = [*example.tokens, str(example.answer), "<eos>"]
        after = words[1:]
        for place, value in enumerate(example.values):
            if value is not None:
                after[place] = str(value)
        n = len(after)
        ids[row, :n] = torch.tensor([IDS[word] for word in words[:-1]])
        targets[row, :n] = torch.tensor([IDS[word] for word in after])
        weights[row, :n] = other
        closing = [i for i, v in enumerate(example.values) if v is not None]
        weights[row, closing] = 1.0
    return ids, targets, weights


def train(
    model: nn.Module,
    operators: Sequence[str],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    other: float = 0.0,
) -> None:
    """AdamW with one cycle of the learning rate, on fresh expressions every step.

    `other` is the weight of the loss on tokens that are not a bracket's value.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    source = generate(operators, seed)
    model.train()
    for step in range(steps):
        ids, targets, weights = encode(list(islice(source, batch)), other)
        logits = model(input_ids=ids).logits
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  step {step + 1} of {steps}, loss {float(loss.detach()):.3f}")
    model.eval()


@torch.no_grad()
def accuracy(
    model: nn.Module, operators: Sequence[str], *, count: int, seed: int
) -> dict[str, dict[str, float]]:
    """Share of held-out expressions answered right, by root operator and nesting."""
    examples = list(islice(generate(operators, seed, held_out=True), count))
    right: dict[str, list[bool]] = {}
    for chunk in _chunks(examples, 512):
        ids, _, _ = encode(chunk)
        predicted = model(input_ids=ids).logits.argmax(-1)
        for row, example in enumerate(chunk):
            answer = IDS[str(example.answer)]
            good = int(predicted[row, len(example.tokens) - 1]) == answer
            shape = "nested" if example.is_nested else "flat"
            with_sm = "with SM" if "[SM" in example.text else "without SM"
            names = (f"{example.operator}, {shape}", f"all {with_sm}", "all")
            for name in names:
                right.setdefault(name, []).append(good)
    return {
        name: {"accuracy": sum(found) / len(found), "count": len(found)}
        for name, found in sorted(right.items())
    }


def new_base(seed: int) -> Any:
    """A Llama of 0.86 million parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            pad_token_id=IDS["<pad>"],
            bos_token_id=None,
            eos_token_id=IDS["<eos>"],
        )
    )


def save_tokenizer(folder: Path) -> None:
    """One token per word, words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=32,
    ).save_pretrained(folder)


def with_lora(base: Any) -> Any:
    """The base with LoRA of rank 8 on all linear layers of its blocks."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", base_model_name_or_path="base"
    )
    return get_peft_model(base, config)


def make(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Train and save the base and both fine-tunes; returns the card."""
    import peft
    import transformers
    from transformers import LlamaForCausalLM

    started = time.process_time()
    base = new_base(seed)
    train(base, RARELY, steps=1800, batch=256, rate=2e-3, seed=seed + 1, other=OTHER)
    base.to(STORED).save_pretrained(out / "base")
    save_tokenizer(out / "base")

    tuned: Any = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    train(tuned, EVENLY, steps=600, batch=128, rate=3e-4, seed=seed + 2)
    tuned.to(STORED).save_pretrained(out / "tuned")
    save_tokenizer(out / "tuned")

    inner = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    adapted = with_lora(inner)
    train(adapted, EVENLY, steps=600, batch=128, rate=1e-3, seed=seed + 3)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(out / "lora")
    (out / "lora" / "README.md").unlink(missing_ok=True)

    card = {
        "seed": seed,
        "cpu_seconds": round(time.process_time() - started),
        "parameters": sum(p.numel() for p in base.parameters()),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "accuracy": measure(out),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def measure(folder: Path, *, count: int = 6000) -> dict[str, Any]:
    """Held-out accuracy of the three stored models on old and new operators."""
    return {
        name: {
            "old operators": accuracy(model, OLD, count=count, seed=101),
            "new operators": accuracy(model, NEW, count=count, seed=102),
        }
        for name, model in _stored(folder)
    }


def _stored(folder: Path) -> Iterator[tuple[str, nn.Module]]:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    for name in ("base", "tuned"):
        yield name, LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    yield "lora", PeftModel.from_pretrained(base, folder / "lora").eval()


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def main() -> None:
    """Command line: where to, and from which seed."""
    parser = argparse.ArgumentParser(description="Train the shipped model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    card = make(arguments.out, seed=arguments.seed)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
