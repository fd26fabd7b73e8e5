"""Several updates in one call: each report is that of a call of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equiv
from equiv.cli.main import main
from equiv.demo import loading
from equiv.report.report import Report
from equiv.testing.models import mlp, transformer
from equiv.update.several import OneUpdate, as_several

IDS = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {
    "sites": ("block_out",),
    "layers": [1],
    "forms": ("vector",),
    "at": "base",
}
WEIGHT: dict[str, Any] = {"0.weight": torch.ones(4, 3)}
BASE, TUNED, LORA = (str(p) for p in (loading.BASE, loading.TUNED, loading.LORA))


def same(found: Report, alone: Report, tmp_path: Path) -> None:
    """Equal to the last digit: the same work is done in the same order."""
    files = [tmp_path / "found.json", tmp_path / "alone.json"]
    for report, file in zip((found, alone), files, strict=True):
        report.to_json(file)
    one, two = (json.loads(file.read_text()) for file in files)
    assert one == two


def three(model: nn.Module) -> dict[str, OneUpdate]:
    """Factors, a task vector, and a module of its own."""
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    weight = model.get_parameter(name)
    generator = torch.Generator().manual_seed(4)
    tuned = transformer("llama", seed=1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return {
        "random": equiv.Update.random(model, 0.05, seed=2),
        "vector": {name: 1e-3 * torch.randn(weight.shape, generator=generator)},
        "tuned": tuned,
    }


@pytest.mark.parametrize("inputs", [None, IDS, "samples"])
def test_each_report_is_that_of_a_call_of_its_own(
    inputs: object, tmp_path: Path
) -> None:
    model = transformer("llama", seed=1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    updates = three(model)
    if inputs == "samples":  # longer sequences: two are enough
        del updates["vector"]
    found = equiv.check(model, updates, inputs, **QUICK)
    assert isinstance(found, dict) and list(found) == list(updates)
    for name, update in updates.items():
        same(found[name], equiv.check(model, update, inputs, **QUICK), tmp_path)
    if inputs is IDS:  # what was measured before has no say
        other = equiv.check(model, dict(reversed(updates.items())), inputs, **QUICK)
        assert list(other) == ["tuned", "vector", "random"]
        for name in updates:
            same(other[name], found[name], tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_inputs_that_can_be_read_once_are(tmp_path: Path) -> None:
    """An iterator is used up by the first reading; a tokenizer is asked once a text."""
    model = mlp(dtype=torch.float64)
    updates = {
        name: equiv.Update.random(model, 0.05, seed=i) for i, name in enumerate("ab")
    }
    x = torch.randn(8, next(model.parameters()).shape[1], dtype=torch.float64)
    found = equiv.check(model, updates, (row[None] for row in x))
    for name, update in updates.items():
        same(found[name], equiv.check(model, update, [r[None] for r in x]), tmp_path)


def test_shifts_of_several() -> None:
    model = transformer("llama", seed=1)
    updates = three(model)
    found = equiv.shifts(model, updates, IDS)
    for name, update in updates.items():
        alone = equiv.shifts(model, update, IDS)[1, "mlp_out"]
        for field in ("exact", "first_order", "midpoint", "local_exact"):
            assert torch.equal(
                getattr(found[name][1, "mlp_out"], field), getattr(alone, field)
            )


def test_values_tell_updates_from_entries_of_one() -> None:
    vector: dict[str, Tensor] = {"0.weight": torch.ones(2, 2)}
    assert as_several(vector) is None
    assert as_several(equiv.Update.from_dict(vector)) is None
    assert as_several({}) is None
    several = {"one": vector, "two": "folder", "three": Path("x"), "four": nn.Tanh()}
    assert as_several(several) == several


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (WEIGHT | {"b": "lora"}, "'0.weight' is a Tensor, 'b' is a str"),
        ({"a": "lora", "b": 3}, "'b' is a int"),
        ({1: "lora"}, "names of updates as keys, got 1"),
        ({"a": WEIGHT, "b": {"nine": torch.ones(1)}}, "Update 'b'"),
        ({"a": WEIGHT, "b": {}}, "Update 'b': The update is empty"),
    ],
)
def test_mixtures_and_wrong_ones_are_refused_by_name(given: Any, says: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(equiv.UpdateError) as caught:
        equiv.check(model, given)
    assert says in str(caught.value)


def test_nothing_is_measured_if_one_is_wrong() -> None:
    calls = []
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(equiv.UpdateMismatchError, match="Update 'bad'"):
        equiv.check(model, {"good": WEIGHT, "bad": {"0.weight": torch.ones(2, 2)}})
    assert not calls


def test_the_command_line_takes_several_and_the_status_is_the_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "report.json"
    arguments = ["check", BASE, LORA, TUNED, "--site", "block_out", "--at", "base"]
    assert main([*arguments, "--json", str(made)]) == 0
    shown = capsys.readouterr().out
    assert shown.index(LORA) < shown.index(TUNED)
    files = [tmp_path / "report-1.json", tmp_path / "report-2.json"]
    assert sorted(tmp_path.iterdir()) == files
    reports = [Report.from_json(file) for file in files]
    assert [r.subject.update for r in reports] == [
        "LoRA adapter lora",
        "fine-tune tuned",
    ]
    missed = [max(row.remainder or 0.0 for row in r.rows) for r in reports]
    limit, above = sum(missed) / 2, (LORA, TUNED)[missed.index(max(missed))]
    assert main([*arguments, "--max-remainder", str(limit)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("Not met: ") == 1 and f"Not met: {above}: " in shown


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([LORA, LORA], "given more than once"),
        ([LORA, "/no/update"], "Update '/no/update'"),
        ([LORA, TUNED, "--json", "/no/folder/x.json"], "no folder /no/folder"),
    ],
)
def test_mistakes_among_several_have_status_two(
    extra: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", BASE, *extra]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_readme_says_what_sharing_the_base_would_save() -> None:
    root = Path(__file__).parent.parent
    results = json.loads((root / "benchmarks/results/several.json").read_text())
    share = {n: found["base"]["median"] for n, found in results["several"].items()}
    text = " ".join((root / "README.md").read_text().split())
    assert (
        f"are {share['given inputs']:.0%} of a check with inputs and "
        f"{share['random inputs']:.0%} of one without"
    ).replace("%", " %") in text
