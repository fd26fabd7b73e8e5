"""`equiv design`, `convert` and `export`, in process, on the shipped model."""

from pathlib import Path

import pytest
import torch

import equiv
from equiv.cli.main import main
from equiv.demo import loading

BASE, LORA = str(loading.BASE), str(loading.LORA)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(loading.texts(60)))
    return str(path)


def convert(texts: str, output: Path, *more: str) -> int:
    given = ["convert", LORA, "--base", BASE, "--inputs", texts, "-o", str(output)]
    return main([*given, *more])


def test_a_fine_tune_becomes_steering(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures in the file and on the screen are those of `equiv.evaluate`."""
    output = tmp_path / "steering.safetensors"
    assert convert(texts, output, "--rank", "4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    base = loading.load_base()
    steering = equiv.load(output, model=base)
    assert len(steering) == 4
    assert steering.num_parameters == 4 * (2 * 4 * 128 + 128)
    lines = loading.texts(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    unseen = [lines[i] for i in order[48:]]
    found = equiv.evaluate(
        base, LORA, unseen, steering, tokenizer=loading.load_tokenizer()
    )
    assert steering.about["steered"] == pytest.approx(found.steered, rel=1e-4)
    assert steering.about["recovered"] == pytest.approx(found.recovered, rel=1e-4)
    assert found.recovered and found.recovered > 0.3
    assert f"{found.recovered:.0%}".replace("%", " %") in shown
    assert "12 texts" in shown and "affine r4 at block_out" in shown


def test_steering_goes_on_to_other_tools(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, folder = tmp_path / "s.safetensors", tmp_path / "peft"
    assert convert(texts, own, "--site", "mlp_out", "--rank", "2") == 0
    assert main(["export", str(own), "--to", "peft", "-o", str(folder)]) == 2
    assert "needs --base" in capsys.readouterr().err
    given = ["export", str(own), "--to", "peft", "--base", BASE, "-o", str(folder)]
    assert main(given) == 0
    assert (folder / "adapter_model.safetensors").is_file()
    ids = torch.tensor([[5, 6, 7, 2]])
    base = loading.load_base()
    with torch.no_grad(), equiv.steer(base, equiv.load(own)):
        steered = base(ids).logits
    update = equiv.Update.from_peft(folder)
    assert not torch.equal(steered, base(ids).logits)
    again = equiv.to_steering(update, base)
    with torch.no_grad(), equiv.steer(base, again):
        torch.testing.assert_close(base(ids).logits, steered, rtol=1e-4, atol=1e-4)
    vector = tmp_path / "v.gguf"
    assert main(["export", str(own), "--to", "gguf", "-o", str(vector)]) == 2
    assert "fixed vectors at block_out only" in capsys.readouterr().err
    assert not vector.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--to", "onnx"), "Expected --to in steering, peft, gguf"),
        (("--site", "nowhere"), "nowhere"),
        (("--form", "magic"), "Expected `form` in vector, linear"),
        (("--target", "fame"), "Expected `target` in block, shift"),
        (("--at", "logits"), "Expected `at`"),
        (("--limit", "3"), "at least 5 texts"),
    ],
)
def test_mistakes_are_told(
    texts: str,
    tmp_path: Path,
    more: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "steering.safetensors"
    assert convert(texts, output, *more) == 2
    assert says in capsys.readouterr().err
    assert not output.exists()


def test_a_missing_folder_is_told_before_the_work(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(texts, tmp_path / "no" / "s.safetensors") == 2
    assert "no folder" in capsys.readouterr().err


def test_a_budget_becomes_a_plan_and_the_plan_becomes_steering(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """check → design → convert, each from the file that the one before wrote."""
    report, plan, output = (
        tmp_path / name for name in ("report.json", "plan.json", "s.safetensors")
    )
    few = ("--limit", "24", "--max-remainder", "10")
    sites = ("--site", "block_out", "--site", "mlp_hidden->block_out")
    given = ["check", BASE, LORA, "--inputs", texts, *few, *sites]
    assert main([*given, "--json", str(report)]) == 0
    fits = equiv.Report.from_json(report).fits
    assert {(fit.reads, fit.writes) for fit in fits} == {
        ("block_out", "block_out"),
        ("mlp_hidden", "block_out"),
    }
    capsys.readouterr()
    given = ["design", str(report), "--budget", "6000", "--json", str(plan)]
    assert main(given) == 0
    shown = capsys.readouterr().out
    design = equiv.Design.from_json(plan)
    assert 0 < design.num_parameters <= 6000
    assert f"{design.num_parameters:,} of" in " ".join(shown.split())
    assert convert(texts, output, "--plan", str(plan)) == 0
    assert "the plan" in capsys.readouterr().out
    made = equiv.load(output)
    assert {key: steer.num_parameters for key, steer in made.items()} == {
        (c.layer, c.site): c.num_parameters for c in design.choices
    }


def test_wrong_files_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "s.safetensors"
    equiv.Design((), 0, predicted=0.0, reachable=0.0).to_json(plan)
    assert convert(str(plan), output, "--plan", str(plan)) == 2
    assert "no steers" in capsys.readouterr().err
    assert main(["design", str(plan), "--budget", "100"]) == 2
    assert "report format 1" in capsys.readouterr().err
