"""README's code runs, and the commands it names exist."""

import re
from pathlib import Path

import pytest
import torch

import equiv
from equiv.demo import loading
from equiv.testing.models import transformer

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.randint(3, 32, (6, 8), generator=torch.Generator().manual_seed(0))
    model = transformer("llama", num_hidden_layers=5, dtype=torch.float32)
    tuned = transformer("llama", num_hidden_layers=5, dtype=torch.float32)
    update = equiv.Update.random(model, 0.001, seed=0)
    with torch.no_grad():
        for name, delta in update.deltas.items():
            tuned.get_parameter(name).add_(delta)  # type: ignore[arg-type]
    names = {
        "equiv": equiv,
        "torch": torch,
        "model": model,
        "base": model,
        "tuned": tuned,
        "merged": tuned,
        "ask": lambda rows: tuned(rows).logits,
        "update": update,
        "delta_w": update,
        "inputs": ids,
        "batch": {"input_ids": ids},
    }
    if "bank" in code:
        shared = equiv.fit_steering(model, update, ids, rank=1)
        names["steering"] = shared
    if "tokenizer" in code:
        names |= {"model": loading.load_base(), "delta_w": loading.LORA}
        names |= {"texts": loading.texts(4), "tokenizer": loading.load_tokenizer()}
    exec(compile(code, str(README), "exec"), names)
    shown = " ".join(capsys.readouterr().out.split())
    if "print(report)" in code:
        assert "first order" in shown
    if "diagnose" in code:
        assert "applied in every layer" in shown


def test_commands_exist() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (README.parent / f"{module.replace('.', '/')}.py").is_file()
    for option in re.findall(
        r"(--[\w-]+)", "".join(re.findall(r"^    equiv .*", text, re.M))
    ):
        commands = "".join(
            file.read_text() for file in (README.parent / "equiv/cli").glob("*.py")
        )
        assert option in commands or f"{option[2:].replace('-', '_')}:" in commands
