"""Nets of studies: from a seed alone, tuned from the base that they lie beside."""

from itertools import islice

import pytest
import torch

import equiv
from equiv.demo.train import VOCABULARY
from equiv.tasks.listops import evaluate, generate, is_held_out
from equiv.theory.trained.nets import (
    NEW,
    Recipe,
    Training,
    held_out,
    nets,
    new_base,
    right,
)

FEW = Training(3, 8, 1e-3)
TINY = Recipe(16, 2, FEW, FEW, FEW, scored=20)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_fine_tunes_start_from_the_base() -> None:
    made = nets(0, TINY)
    names = set(weights(made.base))
    full = equiv.Update.between(made.base, made.full)
    assert set(full.deltas) == names
    lora = equiv.Update.from_peft(made.lora, made.base)
    assert set(lora.deltas) == {n for n in names if "proj" in n}
    merged = made.lora.get_base_model().state_dict()
    for name, weight in weights(made.base).items():
        stored = merged.get(name, merged.get(name.replace("proj.", "proj.base_layer.")))
        assert stored is not None and torch.equal(stored, weight)


def test_they_come_from_the_seed_alone() -> None:
    first = nets(1, TINY)
    nets.cache_clear()
    torch.manual_seed(99)
    second, other = nets(1, TINY), nets(2, TINY)
    for name, model in {"base": first.base, **first.tuned}.items():
        again = {"base": second.base, **second.tuned}[name]
        for one, two in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, two)
    assert first.accuracy == second.accuracy
    assert not torch.equal(first.base.lm_head.weight, other.base.lm_head.weight)


def test_nets_are_trained_once() -> None:
    assert nets(0, TINY) is nets(0, TINY)


def test_held_out_inputs_are_expressions_with_their_answers() -> None:
    inputs = held_out(40)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        *tokens, answer = [VOCABULARY[i] for i in ids[:n]]
        text = " ".join(tokens)
        assert is_held_out(text) and evaluate(text).answer == int(answer)


@torch.no_grad()
def test_right_counts_right_answers() -> None:
    model = new_base(0, TINY)
    found = 0
    for example in islice(generate(NEW, 101, held_out=True), 50):
        ids = torch.tensor([[VOCABULARY.index(t) for t in example.tokens]])
        best = int(model(input_ids=ids).logits[0, -1].argmax())
        found += VOCABULARY[best] == str(example.answer)
    assert right(model, NEW, 50) == pytest.approx(found / 50)
