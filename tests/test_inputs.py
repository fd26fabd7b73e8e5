"""Texts, files, tables and loaders: what the model sees is each text by itself.

The witness is the model on every text alone, unpadded, in float64: whatever form the
inputs have and however they are batched, logits and shifts are the same.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv.model.batches import Batch
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.stages import staged
from equiv.testing.models import transformer

WORDS = [f"w{i}" for i in range(24)]
TEXTS = ["w1 w5 w2", "w7", "w3 w3 w9 w20 w11 w4", "w2 w8"]
FAMILIES = ("llama", "gpt2", "bert", "gemma2", "qwen2")
# A question's and an answer's begin in a conversation, and its end.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"
)


def tokenizer(*, encoder: bool = False, **settings: Any) -> Any:
    """One id per word; a decoder's puts <s> first, an encoder's [CLS] … [SEP] around.

    Args:
        encoder: Which of the two.
        **settings: Of the tokenizer, such as `padding_side`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    first, last = ("[CLS]", "[SEP]") if encoder else ("<s>", "</s>")
    names = ["<pad>", first, last, "<unk>", "user", "assistant", *WORDS]
    made = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()  # pyright: ignore
    made.post_processor = TemplateProcessing(  # pyright: ignore
        single=f"{first} $A {last}" if encoder else f"{first} $A",
        special_tokens=[(first, 1), (last, 2)],
    )
    kinds = ("cls_token", "sep_token") if encoder else ("bos_token", "eos_token")
    special = dict(zip(kinds, (first, last), strict=True))
    own: Any = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        **{"pad_token": "<pad>", **special, **settings},
    )
    own.chat_template = TEMPLATE
    return own


def number(word: str) -> int:
    """Its id, written down once more."""
    return 6 + WORDS.index(word)


def ids_of(text: str, *, encoder: bool = False) -> list[int]:
    return [1, *map(number, text.split()), *([2] if encoder else [])]


def alone(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Logits of every sequence by itself, by the model's own forward."""
    with witness.own_arithmetic(), torch.no_grad():
        return [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def seen(model: Any, batches: list[Batch]) -> dict[int, Tensor]:
    """Logits [tokens, vocabulary] of every sequence, as the engine runs batches."""
    found = {}
    with (
        measured(model),
        staged(model, batches, torch.float64, sites=("block_out",)) as cut,
    ):
        for i, batch in enumerate(batches):
            hidden = None
            for stage in cut.stages:
                hidden, _ = cut.run(stage, cut.tensors(stage), hidden, i)
            assert hidden is not None
            for row, n in enumerate(batch.index):
                found[n] = hidden[row][batch.mask[row]]
    return found


def check_seen(model: Any, inputs: object, rows: list[list[int]], reader: Any) -> None:
    found = seen(model, from_inputs(model, inputs, reader))
    assert sorted(found) == list(range(len(rows)))
    for n, expected in enumerate(alone(model, rows)):
        witness.close(found[n], expected)


def tokenised(reader: Any, side: str) -> Any:
    return reader(TEXTS, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_run_as_if_alone(family: str, side: str) -> None:
    """Texts, and the tokenizer's own batch of them, padded on either side."""
    encoder = family == "bert"
    reader = tokenizer(encoder=encoder, padding_side=side)
    rows = [ids_of(text, encoder=encoder) for text in TEXTS]
    model = transformer(family)
    check_seen(model, TEXTS, rows, reader)
    batch = tokenised(reader, side)
    pads = batch["input_ids"] == reader.pad_token_id
    assert bool(pads[:, 0].any()) is (side == "left")
    call = {name: batch[name] for name in ("input_ids", "attention_mask")}
    check_seen(model, call, rows, None)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    left=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_padding_on_any_side_is_no_other_input(
    family: str, lengths: list[int], left: bool, seed: int
) -> None:
    model = transformer(family)
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 32, (n,), generator=draw).tolist() for n in lengths]
    width = max(lengths) + seed % 2
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, own], mask[i, own] = torch.tensor(row), 1
    check_seen(model, {"input_ids": ids, "attention_mask": mask}, rows, None)


def test_positions_that_are_given_are_kept() -> None:
    model, mask = transformer("gpt2"), torch.tensor([[0, 0, 1, 1]])
    ids, own = torch.tensor([[3, 3, 4, 5]]), torch.tensor([[0, 0, 7, 8]])
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": own}
    (batch,) = from_inputs(model, call)
    assert torch.equal(batch.arguments["position_ids"], own)
    (plain,) = from_inputs(model, {"input_ids": ids, "attention_mask": mask | 1})
    assert "position_ids" not in plain.arguments


def test_roberta_numbers_its_own_positions() -> None:
    """From the padding's id on: given positions would be wrong there."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
    config = RobertaConfig(
        vocab_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=1,
        **small,
    )
    model = RobertaForMaskedLM(config).double().eval()
    ids = torch.tensor([[1, 1, 5, 6, 7], [8, 9, 4, 3, 2]])
    call = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    (batch,) = from_inputs(model, call)
    assert "position_ids" not in batch.arguments
    with witness.own_arithmetic(), torch.no_grad():
        found = model(**batch.arguments).logits
    for row, expected in zip(
        found, alone(model, [[5, 6, 7], [8, 9, 4, 3, 2]]), strict=True
    ):
        witness.close(row[-len(expected) :], expected)
    # Rows 0 and 1 of its table are the padding's: ten are left of twelve.
    from_inputs(model, torch.full((1, 10), 5))
    with pytest.raises(equiv.InputsError, match=r"at most 10 tokens.*got 11"):
        from_inputs(model, torch.full((1, 11), 5))


def test_a_model_that_takes_no_positions_is_not_padded_on_the_left() -> None:
    class Counting(torch.nn.Module):
        """A table of positions, and no argument for them."""

        def __init__(self) -> None:
            super().__init__()
            self.wpe = torch.nn.Embedding(8, 4)
            self.config = type("Config", (), {"model_type": "counting"})()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.wpe(torch.arange(input_ids.shape[1]))

    call = {
        "input_ids": torch.tensor([[3, 4]]),
        "attention_mask": torch.tensor([[0, 1]]),
    }
    with pytest.raises(equiv.InputsError, match=r"Counting.*padding_side=\"right\""):
        from_inputs(Counting(), call)


def test_a_special_token_stands_once() -> None:
    """Rendered by hand a text has its first token already; plain texts get it."""
    model, reader = transformer("llama"), tokenizer()
    check_seen(model, ["<s> w1 w2", "w1 w2"], [ids_of("w1 w2")] * 2, reader)
    twice = from_inputs(model, ["<s> <s> w1"], reader)
    assert twice[0].arguments["input_ids"].tolist() == [[1, 1, number("w1")]]
    # What is no special token may well stand twice at the start.
    check_seen(model, ["w3 w3 w1"], [ids_of("w3 w3 w1")], reader)
    model, reader = transformer("bert"), tokenizer(encoder=True)
    check_seen(model, ["[CLS] w1 [SEP]"], [ids_of("w1", encoder=True)], reader)


def message(role: str, content: Any) -> Mapping[str, Any]:
    return {"role": role, "content": content}


CHATS = [
    [message("user", "w1 w2"), message("assistant", "w3")],
    [message("user", "w9")],
]
CHAT_IDS = [
    [1, 4, number("w1"), number("w2"), 2, 5, number("w3"), 2],
    [1, 4, number("w9"), 2],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_go_through_the_template(side: str) -> None:
    """As by hand: the template's own special tokens, and no second <s>."""
    model, reader = transformer("llama"), tokenizer(padding_side=side)
    for inputs in (CHATS, tuple(CHATS), [{"messages": c, "id": 3} for c in CHATS]):
        check_seen(model, inputs, CHAT_IDS, reader)
    check_seen(model, CHATS[0], CHAT_IDS[:1], reader)  # one conversation
    rendered = [reader.apply_chat_template(c, tokenize=False) for c in CHATS]
    check_seen(model, rendered, CHAT_IDS, reader)


def test_files_of_lines_and_of_json(tmp_path: Path) -> None:
    model, reader = transformer("llama"), tokenizer()
    rows = [ids_of(text) for text in TEXTS]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(["", *TEXTS, "  ", ""]))
    check_seen(model, lines, rows, reader)
    objects = tmp_path / "texts.jsonl"
    entries = [{"other": "w9", "text": text} for text in TEXTS]
    objects.write_text("\n".join(map(json.dumps, entries)))
    check_seen(model, objects, rows, reader)
    assert equiv.read_texts(objects, "other", limit=2) == ["w9", "w9"]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    check_seen(model, chats, CHAT_IDS, reader)
    report = equiv.check(
        model, equiv.Update.random(model, 0.01, seed=0), objects, tokenizer=reader
    )
    assert report.subject.tokens == sum(map(len, rows))


class Table:
    """What there is of a `datasets.Dataset` that matters here."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns_by_name = columns
        self.column_names: Any = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns_by_name.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns_by_name[key]
        return {name: column[key] for name, column in self.columns_by_name.items()}

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))


def library_table(**columns: list[Any]) -> Any:
    """The real thing; with a fingerprint given, nothing is pickled to make one."""
    arrow = pytest.importorskip("pyarrow").table(columns)
    return pytest.importorskip("datasets").Dataset(arrow, fingerprint="none")


@pytest.mark.parametrize("made", [Table, library_table])
def test_tables(made: Any) -> None:
    model, reader = transformer("llama"), tokenizer()
    rows = [ids_of(text) for text in TEXTS]
    table = made(number=[0, 1, 2, 3], text=TEXTS, answer=["w1"] * 4)
    check_seen(model, table, rows, reader)
    check_seen(model, table["answer"], [ids_of("w1")] * 4, reader)
    ids = made(text=TEXTS, input_ids=rows, attention_mask=[[1] * len(r) for r in rows])
    check_seen(model, ids, rows, None)
    check_seen(model, made(messages=CHATS), CHAT_IDS, reader)
    with pytest.raises(equiv.InputsError, match=r"title, body.*dataset\['title'\]"):
        from_inputs(model, made(title=["w1"], body=["w2"]), reader)
    splits = Table(text=TEXTS)
    splits.column_names = {"train": ["text"], "test": ["text"]}
    with pytest.raises(equiv.InputsError, match=r"train, test.*inputs\['train'\]"):
        from_inputs(model, splits, reader)


def test_rows_keep_their_masks_and_labels() -> None:
    """A row may be padded already, on the left; labels are padded with none."""
    model = transformer("gpt2")
    rows = [
        {"input_ids": [9, 9, 3, 4], "attention_mask": [0, 0, 1, 1], "labels": [5] * 4},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]},
    ]
    check_seen(model, rows, [[3, 4], [5, 6, 7]], None)
    (batch,) = from_inputs(model, rows)
    assert batch.index == (1, 0) and batch.labels is not None
    # A causal model predicts the next token; there is none after the last.
    assert batch.labels.tolist() == [[6, 7, -100, -100], [-100, 5, 5, -100]]


def test_loaders() -> None:
    """Of texts, of rows of a table, of tensors, of the tokenizer's batches."""
    from torch.utils.data import DataLoader, TensorDataset

    model, reader = transformer("llama"), tokenizer()
    rows = [ids_of(text) for text in TEXTS]
    check_seen(model, DataLoader(TEXTS, batch_size=3), rows, reader)  # type: ignore
    table = DataLoader(list(Table(text=TEXTS, n=[0, 1, 2, 3])), batch_size=3)  # type: ignore
    check_seen(model, table, rows, reader)

    def collate(texts: list[str]) -> Any:
        return reader(texts, padding=True, return_tensors="pt")

    for side in ("left", "right"):
        reader.padding_side = side
        batches = DataLoader(TEXTS, batch_size=3, collate_fn=collate)  # type: ignore
        check_seen(model, ({**b} for b in batches), rows, None)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 9, 9]])
    check_seen(model, DataLoader(TensorDataset(ids), 2), ids.tolist(), None)
    check_seen(model, DataLoader(ids, 2), ids.tolist(), None)  # type: ignore


def test_shifts_stand_in_the_callers_order() -> None:
    """Also of conversations: row i is the i-th one's, from its first token on."""
    model, reader = transformer("gpt2"), tokenizer()
    update = equiv.Update.random(model, 0.1, seed=0)
    s = equiv.shifts(model, update, CHATS, tokenizer=reader, dtype=torch.float64)
    found = s[1, "block_out"]
    for row, ids in enumerate(CHAT_IDS):
        call = {"input_ids": torch.tensor([ids])}
        values, tangents = witness.whole_jvp(model, update, call)
        n = len(ids)
        assert found.mask[row].sum() == n
        witness.close(found.base[row, :n], values[1, "block_out"][0])
        witness.close(found.first_order[row, :n], tangents[1, "block_out"][0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_long_texts_are_named_and_nothing_is_cut(family: str) -> None:
    model = transformer(family, max_position_embeddings=8)
    reader = tokenizer(encoder=family == "bert")
    extra = 2 if family == "bert" else 1
    fits, long, longer = ("w1 " * (n - extra) for n in (8, 9, 12))
    assert from_inputs(model, [fits], reader)[0].tokens == 8
    with pytest.raises(equiv.InputsError, match=r"at most 8 tokens.*1 \(9\), 3 \(12\)"):
        from_inputs(model, [fits, long, "w2", longer], reader)
    row = {"input_ids": [3] * 9}
    with pytest.raises(equiv.InputsError, match=r"at most 8 tokens.*: 0 \(9\)"):
        from_inputs(model, [row], reader)
    with pytest.raises(equiv.InputsError, match=r"at most 8 tokens.*got 9"):
        from_inputs(model, torch.full((1, 9), 3))


def test_empty_texts_are_left_out_or_named() -> None:
    """Rows of shifts must not slide up: there an empty text is an error."""
    model = transformer("bert")
    reader = tokenizer(encoder=True)
    reader.backend_tokenizer.post_processor = None
    batches = from_inputs(model, ["w1", "", "w2 w3"], reader)
    assert sorted(n for batch in batches for n in batch.index) == [0, 2]
    with pytest.raises(equiv.InputsError, match="none at index 1"):
        from_inputs(model, ["w1", "", "w2 w3"], reader, keep_empty=True)


BAD: dict[str, tuple[Any, str]] = {
    "a text among conversations": (
        [*CHATS, "w1"],
        "a conversation at index 0 and a te",
    ),
    "a number among texts": (["w1", 3], "a text at index 1"),
    "a batch of other things": ([["w1"], [3]], "a text at index 1"),
    "a role that is none": ([[message("judge", "w1")]], "at index 0.*no such role"),
    "parts of a message": (
        [[message("user", [{"type": "text"}])]],
        "message 0.*index 0",
    ),
    "a message without content": ([[{"role": "user"}]], "`content` of message 0"),
    "ids of words": ([{"input_ids": ["w1"]}], r"inputs\[0\]\['input_ids'\]"),
    "a mask of another length": (
        [{"input_ids": [3, 4], "attention_mask": [1]}],
        r"shape \(2,\), one per token, in `inputs\[0\]\['attention_mask'\]`",
    ),
    "bytes": (b"w1 w2", "got bytes"),
    "a number": (3, "got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_words(name: str) -> None:
    inputs, words = BAD[name]
    with pytest.raises(equiv.InputsError, match=words):
        from_inputs(transformer("llama"), inputs, tokenizer())


def test_a_tokenizer_without_a_template_is_named() -> None:
    reader = tokenizer()
    reader.chat_template = None
    with pytest.raises(equiv.InputsError, match=r"template.*index 0.*pass texts"):
        from_inputs(transformer("llama"), CHATS, reader)
    with pytest.raises(equiv.InputsError, match="`tokenizer=` beside conversations"):
        from_inputs(transformer("llama"), CHATS)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    model, reader = transformer("llama"), tokenizer()
    lines = tmp_path / "texts.txt"
    with pytest.raises(equiv.InputsError, match="does not exist"):
        from_inputs(model, lines, reader)
    lines.write_text("w1 w2\n")
    with pytest.raises(equiv.InputsError, match=r"name of a file.*pass `Path\("):
        from_inputs(model, str(lines), reader)
    with pytest.raises(equiv.InputsError, match="no field 'text'"):
        equiv.read_texts(lines, "text")
    objects = tmp_path / "texts.jsonl"
    objects.write_text('{"title": "w1"}\n')
    with pytest.raises(equiv.InputsError, match=r"line 1: expected a field.*has title"):
        from_inputs(model, objects, reader)
    assert equiv.read_texts(objects, "title") == ["w1"]


def test_a_whole_data_frame_is_refused() -> None:
    frame = pytest.importorskip("pandas").DataFrame({"body": TEXTS})
    model, reader = transformer("llama"), tokenizer()
    with pytest.raises(equiv.InputsError, match=r"DataFrame.*inputs\['body'\]"):
        from_inputs(model, frame, reader)
    check_seen(model, frame["body"], [ids_of(text) for text in TEXTS], reader)
