"""Inputs of every form become the same batches; long ones are bounded."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equiv
from equiv.model import batches as module
from equiv.model.batches import Batch, at_most, split
from equiv.model.inputs import from_inputs
from equiv.testing.models import mlp, transformer

IDS = torch.tensor([[3, 9, 4, 8], [5, 6, 7, 11]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


class Letters:
    """A tokenizer: one id per letter."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(c) - ord("a") + 3 for c in text])


def llama(**config: Any) -> Any:
    return transformer("llama", dtype=torch.float32, **config)


def only(found: list[Batch]) -> Batch:
    (batch,) = found
    return batch


@pytest.mark.parametrize(
    "inputs",
    [
        IDS.int(),
        IDS.numpy(),
        IDS.numpy()[:, ::-1][:, ::-1],
        IDS.numpy().astype(">i4"),
        np.broadcast_to(IDS.numpy(), IDS.shape),  # read-only
        IDS.tolist(),
        tuple(map(tuple, IDS.tolist())),
        (row for row in IDS.tolist()),
        {"input_ids": IDS.numpy()},
        {"input_ids": IDS.tolist(), "attention_mask": np.ones((2, 4), dtype=np.int8)},
        {"input_ids": list(IDS), "past_key_values": None},
        {"token_type_ids": torch.zeros(1, 4).long(), "input_ids": IDS},
        {"input_ids": IDS, "use_cache": True},
        [(IDS,)],
        [IDS.numpy()],
    ],
)
def test_token_ids_of_every_form(inputs: object) -> None:
    batch = only(from_inputs(llama(), inputs))
    assert torch.equal(batch.arguments["input_ids"], IDS)
    assert batch.arguments["input_ids"].dtype == torch.int64
    assert batch.arguments["use_cache"] is False
    assert batch.mask.shape == IDS.shape and bool(batch.mask.all())


def test_tokenizer_output_without_tensors() -> None:
    from transformers import BatchEncoding

    encoded = BatchEncoding(
        {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}
    )
    batch = only(from_inputs(llama(), encoded))
    assert torch.equal(batch.mask, MASK.bool())


def test_features_of_every_form() -> None:
    model, x = mlp((3, 4, 2)), torch.arange(6.0).view(2, 3)
    for inputs in (x, x.numpy(), x.tolist(), [(x, torch.zeros(2))], [x.numpy()]):
        batch = only(from_inputs(model, inputs))
        assert torch.equal(batch.arguments[module.POSITIONAL].float(), x)
        assert batch.mask.tolist() == [True, True]


def test_a_plain_module_keeps_its_lists() -> None:
    class Cropped(nn.Linear):
        def forward(self, input: Tensor, sizes: list[int]) -> Tensor:
            assert isinstance(sizes, list)
            return super().forward(input[:, : sizes[0]])

    call = {"input": torch.randn(8, 5), "sizes": [3]}
    batch = only(from_inputs(Cropped(3, 2), call))
    assert batch.arguments["sizes"] == [3]
    bare = only(from_inputs(mlp((3, 4, 2)), {"input": [[1.0, 2.0, 3.0]]}))
    assert bare.arguments["input"].shape == (1, 3)


def test_texts_of_every_form() -> None:
    model, tokenizer = llama(), Letters()
    texts = ["abc", "de", "fghi"]
    expected = from_inputs(model, texts, tokenizer)
    assert [batch.index for batch in expected] == [(1, 0, 2)]
    keys = dict.fromkeys(texts).keys()
    for inputs in (tuple(texts), (t for t in texts), np.array(texts), keys):
        found = from_inputs(model, inputs, tokenizer)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.arguments["input_ids"], b.arguments["input_ids"])
            assert torch.equal(a.mask, b.mask) and a.index == b.index
    assert only(from_inputs(model, "simple", tokenizer)).tokens == 6
    assert only(from_inputs(model, ["samples"], tokenizer)).tokens == 7


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ["bool", "lowest", "-inf", "heads", "shared"])
def test_masks_of_pairs(family: str, kind: str) -> None:
    """[batch, 1 or heads, seq, seq]: the tokens that count, and the same shifts."""
    model = transformer(family)
    update = equiv.Update.random(model, 0.1, seed=0)
    mask = MASK[:1].expand(2, 4) if kind == "shared" else MASK
    flat = {"input_ids": IDS, "attention_mask": mask}
    sees = mask.bool()[:, None, None, :].expand(2, 1, 4, 4)
    if family != "bert":
        sees = sees & torch.ones(4, 4, dtype=torch.bool).tril()
    low = -torch.inf if kind == "-inf" else torch.finfo(torch.float64).min
    pairs = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, low)
    if kind == "bool":
        pairs = sees
    elif kind == "heads":
        pairs = pairs.expand(2, 2, 4, 4)
    elif kind == "shared":
        pairs = pairs[:1]
    call = {"input_ids": IDS, "attention_mask": pairs}
    batch = only(from_inputs(model, call))
    assert torch.equal(batch.mask, mask.bool())
    s = equiv.shifts(model, update, flat, dtype=torch.float64)[1, "block_out"]
    t = equiv.shifts(model, update, call, dtype=torch.float64)[1, "block_out"]
    torch.testing.assert_close(s.exact[s.mask], t.exact[t.mask])
    torch.testing.assert_close(s.first_order[s.mask], t.first_order[t.mask])


def test_micro_batches_are_bounded_by_tokens_and_by_logits(monkeypatch) -> None:
    model = llama()
    ids = torch.full((100, 50), 3)
    sizes = [batch.sequences for batch in from_inputs(model, ids)]
    assert max(sizes) == 2048 // 50 and sum(sizes) == 100
    monkeypatch.setattr(module, "MICRO_BATCH_LOGITS", 32 * 120)
    sizes = [batch.sequences for batch in from_inputs(model, ids)]
    assert sizes == [2] * 50
    texts = ["a" * 50] * 5
    found = from_inputs(model, texts, Letters())
    assert [batch.sequences for batch in found] == [2, 2, 1]
    monkeypatch.setattr(module, "MICRO_BATCH_LOGITS", 1)
    assert {batch.sequences for batch in from_inputs(model, ids)} == {1}


@pytest.mark.parametrize("embedded", [False, True])
def test_a_long_sequence_is_cut(embedded: bool) -> None:
    """Ten tokens of width 40, padded on the left by 5 and 9."""
    model, width = llama(), 40
    mask = torch.ones(2, width)
    mask[0, :5], mask[1, :9] = 0, 0
    ids = torch.randint(3, 32, (2, width), generator=torch.Generator().manual_seed(0))
    name = "inputs_embeds" if embedded else "input_ids"
    call = {
        name: model.model.embed_tokens(ids).detach() if embedded else ids,
        "attention_mask": mask,
        "position_ids": torch.arange(width)[None],
        "labels": ids,
    }
    batches = split(from_inputs(model, call), 0.5, seed=0)
    whole = at_most(batches, 80, seed=0)
    assert sum(batch.tokens for batch in whole) == 35 + 31
    batch = only(at_most(batches, 10, seed=0))
    (row,) = batch.index
    start = (5, 9)[row]
    columns = slice(start, start + 10)
    assert batch.tokens == 10 and batch.mask.shape == (1, 10)
    assert torch.equal(batch.arguments[name], call[name][row : row + 1, columns])
    assert batch.arguments["position_ids"].tolist() == [list(range(40))[columns]]
    assert batch.arguments["attention_mask"].shape == (1, 10)
    assert batch.labels is not None
    assert torch.equal(batch.labels[0], ids[row, start + 1 : start + 11])
    assert batch.held_out == next(b.held_out for b in batches if row in b.index)


def test_padding_around_short_sequences_is_cut_with_masks_of_pairs() -> None:
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0, :2] = mask[1, 36:] = mask[2, 38:] = True
    pairs = (mask[:, None, None, :] & mask[:, None, :, None]).expand(3, 1, 40, 40)
    call = {"input_ids": torch.full((3, 40), 3), "attention_mask": pairs}
    batch = only(at_most(from_inputs(llama(), call), 10, seed=0))
    # All three are drawn; the columns start with the first token of any.
    assert batch.index == (0,) and batch.mask.shape == (1, 10) and batch.tokens == 2
    assert torch.equal(batch.arguments["attention_mask"], pairs[:1, :, :10, :10])


def test_features_are_not_cut() -> None:
    model = mlp((40, 4, 2))
    batch = only(at_most(from_inputs(model, torch.randn(30, 40)), 10, seed=0))
    assert batch.arguments[module.POSITIONAL].shape == (10, 40)


def test_a_long_sequence_takes_no_more_than_its_share_of_the_calculus() -> None:
    model = llama(max_position_embeddings=1024)
    ids = torch.randint(3, 32, (2, 600), generator=torch.Generator().manual_seed(0))
    report = equiv.check(model, equiv.Update.random(model, 0.01, seed=0), ids)
    assert report.subject.calculus_tokens == 256 and report.subject.tokens == 1200
    assert report.derivative_holds
