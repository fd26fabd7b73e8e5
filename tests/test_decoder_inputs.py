"""What an encoder–decoder's decoder reads: labels, ids, rows, or the text again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import equiv
from equiv.cli.main import main
from equiv.model.inputs import from_inputs
from equiv.testing.models import PAIRED, example, transformer


def test_labels_say_what_the_decoder_reads_as_the_model_itself_has_it() -> None:
    for family in PAIRED:
        model = transformer(family, seed=1)
        call = example(model)
        call.pop("decoder_input_ids")
        labels = torch.tensor([[5, 9, 4, 2], [7, 2, -100, -100]])
        (batch,) = from_inputs(model, {**call, "labels": labels})
        with torch.no_grad():
            expected = model(**call, labels=labels).logits
            found = model(**batch.arguments).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
        assert batch.labels is not None and torch.equal(batch.labels, labels)
        # As tokenizers leave padding among labels.
        (again,) = from_inputs(model, {**call, "labels": labels.clamp(min=0)})
        assert torch.equal(again.mask, batch.mask)


@pytest.mark.parametrize("name", ["BartForSequenceClassification", "T5Model"])
def test_a_classifier_has_its_decoder_read_the_text_again(name: str) -> None:
    import transformers

    model: Any = transformer(name.lower().partition("for")[0].removesuffix("model"))
    torch.manual_seed(0)
    model = getattr(transformers, name)(model.config).double().eval()
    ids = torch.tensor([[3, 9, 4, 2, 0, 0], [8, 6, 13, 21, 30, 2]])
    call = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    update = equiv.Update.random(model, 0.01, seed=0)
    if name == "T5Model":  # it asks for what its decoder reads
        with pytest.raises(equiv.InputsError, match=r"Expected `labels` or"):
            equiv.check(model, update, call)
        return
    (batch,) = from_inputs(model, call)
    with torch.no_grad():
        found = model(**batch.arguments).logits
        assert torch.equal(found, model(**call).logits)
    assert batch.mask.sum(1).tolist() == [5, 6]
    report = equiv.check(model, update, call, forms=(), dtype=torch.float64)
    assert report.holds
    assert {row.site for row in report.rows} >= {"cross_out", "logits"}


def test_rows_of_a_table_have_two_lengths_each() -> None:
    model = transformer("t5", seed=4)
    rows = [
        {"input_ids": [3, 4, 5, 2], "labels": [6, 2]},
        {"input_ids": [3, 4, 2], "labels": [6, 7, 8, 2]},
    ]
    (batch,) = from_inputs(model, rows)
    order = list(batch.index)
    assert batch.source is not None and batch.labels is not None
    assert batch.source.sum(1)[order].tolist() == [4, 3]
    assert batch.mask.sum(1)[order].tolist() == [2, 4]
    assert batch.labels[order].tolist() == [[6, 2, -100, -100], [6, 7, 8, 2]]
    read = [{**row, "decoder_input_ids": [0, *row["labels"]]} for row in rows]
    for row in read:
        row.pop("labels")
    (batch,) = from_inputs(model, read)
    assert batch.mask.sum(1)[list(batch.index)].tolist() == [3, 5]


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_what_says_nothing_to_the_decoder_is_refused(family: str) -> None:
    model = transformer(family)
    update = equiv.Update.random(model, 0.01, seed=0)
    call = example(model)
    read = {n: v for n, v in call.items() if n != "decoder_input_ids"}
    with pytest.raises(equiv.InputsError, match=r"Expected `labels` or `decoder_inp"):
        equiv.check(model, update, read)
    with pytest.raises(equiv.InputsError, match="as many sequences for the decoder"):
        equiv.check(model, update, {**call, "decoder_input_ids": torch.ones(3, 4)})
    with pytest.raises(equiv.InputsError, match="its blocks would not run"):
        given = {"encoder_outputs": (torch.randn(2, 6, 16),)}
        ids = call["decoder_input_ids"]
        equiv.check(model, update, {**given, "decoder_input_ids": ids})
    mask = torch.ones(2, 7)
    with pytest.raises(equiv.InputsError, match="decoder_attention_mask"):
        equiv.check(model, update, {**call, "decoder_attention_mask": mask})
    with pytest.raises(equiv.InputsError, match=r"token ids in 0…31"):
        ids = call["decoder_input_ids"] + 40
        equiv.check(model, update, {**call, "decoder_input_ids": ids})


def word_tokenizer() -> Any:
    """Words w3, w4, … are tokens 3, 4, …; every text ends with token 2."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "</s>", *(f"w{n}" for n in range(3, 32))]
    made = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()  # pyright: ignore
    made.post_processor = TemplateProcessing(  # pyright: ignore
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


ROWS = [
    {"text": "w3 w4 w5", "target": "w6 w7"},
    {"text": "w8 w9", "target": "w4 w5 w6"},
    {"text": "w11 w12 w5", "target": "w9 w7"},
    {"text": "w3 w6", "target": "w21 w5 w9"},
]


def test_rows_with_a_text_and_a_target_are_what_both_stacks_read(
    tmp_path: Path,
) -> None:
    model, path = transformer("t5"), tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    found = {}
    for given in (ROWS, path):
        batches = from_inputs(model, given, word_tokenizer())
        for batch in batches:
            assert batch.source is not None and batch.labels is not None
            for row, index in enumerate(batch.index):
                ids = batch.arguments["input_ids"][row][batch.source[row]]
                read = batch.arguments["decoder_input_ids"][row][batch.mask[row]]
                said = batch.labels[row][batch.mask[row]]
                found[index] = ids.tolist(), read.tolist(), said.tolist()
        # T5's start token is 1 in this configuration.
        assert found[0] == ([3, 4, 5, 2], [1, 6, 7], [6, 7, 2])
        assert found[1] == ([8, 9, 2], [1, 4, 5, 6], [4, 5, 6, 2])
        assert len(found) == 4
    with pytest.raises(equiv.InputsError, match="`tokenizer=` beside texts"):
        from_inputs(model, ROWS)
    # A model of one stack reads the texts.
    (batch, *_) = from_inputs(transformer("llama"), path, word_tokenizer())
    assert batch.source is None and batch.labels is None


def test_the_command_line_checks_an_encoder_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("base", 1), ("tuned", 1)):
        model = transformer("t5", seed=seed, dtype=torch.float32)
        if name == "tuned":
            update = equiv.Update.random(model, 0.01, seed=0)
            for own, parameter in model.named_parameters():
                parameter.data += update.deltas[own]
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    call = ["check", str(tmp_path / "base"), str(tmp_path / "tuned")]
    assert main([*call, "--inputs", str(path), "--site", "cross_out"]) == 0
    assert "2 to 3 the decoder's" in " ".join(capsys.readouterr().out.split())
    path.write_text("w3 w4\n\nw5\n")
    texts = path.rename(tmp_path / "texts.txt")
    assert main([*call, "--inputs", str(texts)]) == 2
    assert "say what its decoder reads" in capsys.readouterr().err
