"""The shipped model: what its card says is so, and the fine-tunes are real ones."""

import json
from itertools import islice

import pytest
import torch

import equiv
from equiv.demo import loading
from equiv.demo.train import accuracy, encode, new_base, train
from equiv.tasks.listops import generate


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads(loading.CARD.read_text())


def test_files_are_small_and_hold_no_path() -> None:
    files = [p for p in loading.CARD.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 5e6
    assert {p.suffix for p in files} <= {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            assert "/tmp" not in path.read_text()


def test_the_base_is_right_on_what_it_learnt(card: dict) -> None:
    known = card["accuracy"]["base"]["old operators"]["all without SM"]
    assert known["accuracy"] >= 0.95
    assert card["cpu_seconds"] <= 20 * 60
    for model in ("tuned", "lora"):
        after = card["accuracy"][model]
        before = card["accuracy"]["base"]
        gain = (
            after["new operators"]["all"]["accuracy"]
            - before["new operators"]["all"]["accuracy"]
        )
        assert gain > 0.05
        assert after["old operators"]["all without SM"]["accuracy"] >= 0.95


@pytest.mark.parametrize("name", ["base", "tuned", "lora"])
def test_the_card_is_what_the_files_do(card: dict, name: str) -> None:
    """Scored again, on the first 1500 of the 6000 expressions behind the card."""
    model: torch.nn.Module = loading.load_base()
    if name == "tuned":
        model = loading.load_tuned()
    elif name == "lora":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(model, loading.LORA).eval()
    for operators, seed, part in (
        (loading.OLD, 101, "old operators"),
        (loading.NEW, 102, "new operators"),
    ):
        found = accuracy(model, operators, count=1500, seed=seed)["all"]["accuracy"]
        stated = card["accuracy"][name][part]["all"]["accuracy"]
        # Five standard errors of a share among 1500.
        assert found == pytest.approx(stated, abs=5 * (0.25 / 1500) ** 0.5)


def test_the_card_states_every_operator_flat_and_nested(card: dict) -> None:
    for model in ("base", "tuned", "lora"):
        for part, operators in (
            ("old operators", loading.OLD),
            ("new operators", loading.NEW),
        ):
            shapes = card["accuracy"][model][part]
            for operator in operators:
                for shape in ("flat", "nested"):
                    assert 0 <= shapes[f"{operator}, {shape}"]["accuracy"] <= 1


def test_texts_are_held_out_and_known_to_the_tokenizer() -> None:
    tokenizer = loading.load_tokenizer()
    for line in loading.texts(50):
        ids = tokenizer(line).input_ids
        assert len(ids) == len(line.split())
        assert tokenizer.pad_token_id not in ids


def test_the_updates_can_be_measured() -> None:
    base = loading.load_base()
    tokenizer = loading.load_tokenizer()
    lines = loading.texts(12)
    for update in (loading.LORA, loading.TUNED):
        report = equiv.check(base, update, lines, tokenizer=tokenizer, forms=())
        assert report.derivative_holds, report.reason
        assert 0.001 < report.subject.update_relative_norm < 0.5


def test_supervision_is_the_value_at_every_bracket() -> None:
    examples = list(islice(generate(loading.EVENLY, 0), 8))
    ids, targets, weights = encode(examples, other=0.25)
    from equiv.demo.train import VOCABULARY

    for row, example in enumerate(examples):
        for place, wanted in enumerate(example.values):
            assert VOCABULARY[ids[row, place]] == example.tokens[place]
            if wanted is not None:
                assert VOCABULARY[targets[row, place]] == str(wanted)
                assert weights[row, place] == 1
            else:
                assert VOCABULARY[targets[row, place]] == example.tokens[place + 1]
                assert weights[row, place] == 0.25
        assert not weights[row, len(example.tokens) + 1 :].any()


def test_training_learns_and_is_determined_by_its_seed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = []
    for _ in range(2):
        model = new_base(0)
        train(model, ["MAX"], steps=100, batch=16, rate=2e-3, seed=1)
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1]
    assert float(losses[0].split()[-1]) < 2.3  # ln 10: a guess among the digits
