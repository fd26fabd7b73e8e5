"""`equiv claims`: what it takes, prints and writes, and its exit status."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from equiv.cli.main import main
from equiv.demo import loading
from equiv.theory.trained import study
from equiv.theory.trained.study import Study

MODEL = [str(loading.BASE), str(loading.LORA)]
MINE = '''
import equiv
from equiv.theory import ClaimResult, Verdict

@equiv.theory.claim("small", formula="‖ΔW‖ < 0.1 ‖W‖", source="this project")
def small(update, inputs, tokenizer):
    """Because."""
    assert tokenizer is not None or inputs
    holds = {holds}
    return ClaimResult(Verdict.HOLDS if holds else Verdict.FAILS, "it was measured")
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "my_claims.py"
    path.write_text(MINE.format(holds=True))
    return path


def test_claims_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = tmp_path / "found.json", tmp_path / "found.html"
    arguments = ["claims", "3", "--only", "18,1", "--json", str(found)]
    assert main([*arguments, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "3 claims: 3 hold; 1 fails as written" in shown
    entries = json.loads(found.read_text())["claims"]
    assert [entry["id"] for entry in entries] == [3, 18, 1]
    for entry in entries:
        assert {"id", "verdict", "conditions", "evidence"} <= entry.keys()
    assert page.read_text().startswith("<!doctype html>")


def test_one_claim_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "18", "--explain"]) == 0
    shown = capsys.readouterr().out
    for part in ("Claim 18: With independent", "Why", "oblique", "Found: holds"):
        assert part in shown


@pytest.mark.parametrize("holds", [True, False])
def test_a_claim_of_ones_own_sets_the_status(
    mine: Path, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.write_text(MINE.format(holds=holds))
    assert main(["claims", str(mine), *MODEL]) == (0 if holds else 1)
    shown = capsys.readouterr().out
    assert "small" in shown and "It was measured" in shown and "1 claim:" in shown


def test_on_the_shipped_model_and_beside_a_number(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", str(mine), "1"]) == 0
    assert "2 claims: 2 hold" in capsys.readouterr().out


def test_texts_come_with_their_tokenizer(mine: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(loading.texts(4)))
    mine.write_text(
        MINE.format(holds="len(inputs) and sum(b.sequences for b in inputs) == 3")
    )
    arguments = ["claims", str(mine), *MODEL, "--inputs", str(texts)]
    assert main([*arguments, "--limit", "3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["0"], "no claim 0; there are 1 to 49"),
        (["--only", "1,x"], "no claim x"),
        ([MODEL[0]], "a model and its update"),
        (["1", "--inputs", "texts.txt"], "--inputs needs MODEL"),
        (["none.py"], "Python file"),
        (["1", "--norm", "maximum"], "norm"),
        (["1", "--train"], "none of these claims reads results"),
        (["1", "--json", "nowhere/found.json"], "no folder"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_training_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def losses(seeds: Sequence[int]) -> dict[str, list[int]]:
        return {"losses": [10 * seed for seed in seeds]}

    monkeypatch.setattr(study, "studies", lambda: {"mine": Study("mine", 7, losses)})
    mine = tmp_path / "my_claims.py"
    mine.write_text(TRAINED)
    arguments = ["claims", str(mine), "1", "--results", str(tmp_path)]
    assert main(arguments) == 1
    assert "no results of the study 'mine'" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--train"]) == 0
    shown = capsys.readouterr()
    assert "Training for mine: about 7 minutes" in shown.err
    assert "Mean 20" in shown.out


TRAINED = '''
import statistics
import equiv
from equiv.theory import ClaimResult, Verdict

@equiv.theory.claim(
    "loss", formula="a", source="this project", kind="trained", study="mine"
)
def loss(results):
    """Because."""
    return ClaimResult(Verdict.HOLDS, f"mean {statistics.mean(results['losses'])}")
'''


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "examples/claims/my_claims.py"
    assert main(["claims", str(path), *MODEL, "--norm", "fisher"]) == 0
    assert "2 claims: 2 hold" in capsys.readouterr().out
