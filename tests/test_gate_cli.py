"""`equiv compare`, in process, on merges of the shipped adapter by PEFT; and in CI."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Answer, Seen, answer, likeliest, serving
from torch import Tensor

import equiv
from equiv.cli.main import main
from equiv.demo import loading
from equiv.gate.values import Agreement, Diagnosis, Fate
from equiv.model.loading import load_saved

peft = pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

BASE, TUNED, LORA = (str(p) for p in (loading.BASE, loading.TUNED, loading.LORA))
UPDATE = ["--base", BASE, "--update", LORA]
CI = Path(equiv.__file__).parents[1] / "examples" / "ci"

Capture = pytest.CaptureFixture[str]
Change = Callable[[str, Tensor], Tensor]


def merged(change: Change) -> Any:
    """The base with the adapter as PEFT merges it, its differences then changed.

    In float64, rounded to float32 once.
    """
    base = loading.load_base().double()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapted = peft.PeftModel.from_pretrained(base, LORA, autocast_adapter_dtype=False)
    made = adapted.double().merge_and_unload()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(change(name, parameter - before[name]))
    return made.float()


def skipped(name: str, delta: Tensor) -> Tensor:
    return -delta if ".layers.1." in name else 0 * delta


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models beside each other: what they have to be, right ones, and wrong ones."""
    home = tmp_path_factory.mktemp("models")
    right = merged(lambda _, delta: 0 * delta)
    models = {
        "reference": right,
        "right": right,
        "twice": merged(lambda _, delta: delta),
        "skipped": merged(skipped),
        "half": merged(lambda _, delta: 0 * delta).bfloat16(),
    }
    for name, model in models.items():
        model.save_pretrained(home / name)
    loading.load_tokenizer().save_pretrained(home / "reference")
    (home / "base").symlink_to(BASE)
    (home / "adapter").symlink_to(LORA)
    (home / "texts.txt").write_text("\n".join(loading.texts(6)))
    return home


@pytest.fixture(autouse=True)
def here(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)


@pytest.fixture
def served(folders: Path) -> Iterator[Callable[[str], Seen]]:
    """Serves one of the models until the test is over."""
    left: list[Any] = []

    def start(name: str) -> Seen:
        model: Any = load_saved(str(folders / name))

        def log_probs(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.log_softmax(model(input_ids=ids).logits.double(), -1)

        def right(body: dict[str, Any], _: int) -> Answer:
            size = model.config.vocab_size
            body = {**body, "logprobs": min(body["logprobs"], size)}
            return answer(likeliest(body, log_probs, own=False))

        left.append(serving(right))
        return left[-1].__enter__()

    yield start
    for context in left:
        context.__exit__(None, None, None)


def words(capsys: Capture) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("actual", ["right", "half", "reference"])
@pytest.mark.parametrize("more", [[], ["--inputs", "texts.txt"]])
def test_right_merges_have_status_zero(
    actual: str, more: list[str], capsys: Capture
) -> None:
    assert main(["compare", "reference", actual, *more]) == 0
    shown = words(capsys)
    assert f"Same: {actual} is reference: weights to the rounding of" in shown
    assert ("outputs to" in shown) == bool(more)


@pytest.mark.parametrize(
    ("actual", "count", "story", "wrong"),
    [
        ("twice", 28, "every layer applied twice", {0, 1, 2, 3}),
        ("skipped", 7, "layer 1 not applied", {1}),
    ],
)
def test_wrong_merges_have_status_one_and_are_told(
    actual: str,
    count: int,
    story: str,
    wrong: set[int],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    made, page = tmp_path / "gate.json", tmp_path / "gate.html"
    files = ["--json", str(made), "--html", str(page)]
    assert main(["compare", "reference", actual, *UPDATE, *files]) == 1
    shown = words(capsys)
    assert f"Not the same: `model.layers.{1 if actual == 'skipped' else ''}" in shown
    assert f"{count} of 39 matrices differ" in shown
    assert f"{actual}: {story}" in shown
    assert f"Wrote {made}" in shown and f"Wrote {page}" in shown
    found, told = Agreement.from_json(made), Diagnosis.from_json(made)
    assert (found.expected, found.actual) == ("reference", actual)
    assert {row.layer for row in found.weights} == wrong
    layers = {i for i, s in enumerate(told.layers) if s.fate is not Fate.APPLIED}
    assert layers == wrong and told.looks_like == story
    assert f"<h1>{actual} is not reference: {story}</h1>" in page.read_text()


@pytest.mark.parametrize(
    ("actual", "status", "says"),
    [("right", 0, "rounding of float32"), ("twice", 1, "every layer applied twice")],
)
def test_a_merge_needs_no_reference(
    folders: Path, actual: str, status: int, says: str, capsys: Capture
) -> None:
    """The base and the adapter themselves say what their merge has to be."""
    assert main(["compare", f"{BASE}+{LORA}", str(folders / actual)]) == status
    assert says in " ".join(capsys.readouterr().out.split())


def test_a_right_merge_is_diagnosed_as_such(capsys: Capture) -> None:
    assert main(["compare", "reference", "right", *UPDATE]) == 0
    assert "right: applied in every layer" in words(capsys)


def test_the_base_itself_and_another_update(tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "gate.json"
    assert main(["compare", "reference", BASE, *UPDATE, "--json", str(made)]) == 1
    assert "every layer not applied" in words(capsys)
    assert all(s.fate is Fate.NOT_APPLIED for s in Diagnosis.from_json(made).layers)
    assert main(["compare", "reference", TUNED]) == 1
    assert "changed in another way" in words(capsys)


def test_tolerances_and_the_limit(tmp_path: Path, capsys: Capture) -> None:
    made = ["--json", str(tmp_path / "gate.json")]
    assert main(["compare", "reference", "skipped", "--atol", "1"]) == 0
    assert "weights to rtol=0, atol=1" in words(capsys)
    assert main(["compare", "reference", "half", "--rtol", "1e-6"]) == 1
    capsys.readouterr()
    few = ["--inputs", "texts.txt", "--limit", "2"]
    assert main(["compare", "reference", "right", *few, *made]) == 0
    assert "first 2 of 6 texts" in capsys.readouterr().err
    outputs = Agreement.from_json(made[1]).outputs
    tokenizer = loading.load_tokenizer()
    sizes = [len(tokenizer(text)["input_ids"]) for text in loading.texts(2)]
    assert outputs is not None and outputs.tokens == sum(sizes)


def test_an_endpoint_that_serves_the_right_model(
    served: Callable[[str], Seen], capsys: Capture
) -> None:
    seen = served("right")
    address = f"{seen.url}#mine"
    assert main(["compare", "reference", address, "--inputs", "texts.txt"]) == 0
    assert f"Same: {address} is reference: outputs to" in words(capsys)
    assert len(seen.bodies) == 6 and seen.bodies[0]["model"] == "mine"
    ids = loading.load_tokenizer()(loading.texts(6))["input_ids"]
    asked = [body["prompt"] for body in seen.bodies]
    assert sorted(asked) == sorted(ids)


def test_an_endpoint_that_serves_the_wrong_model(
    served: Callable[[str], Seen], tmp_path: Path, capsys: Capture
) -> None:
    address, made = f"{served('skipped').url}#mine", tmp_path / "gate.json"
    arguments = ["compare", "reference", address, *UPDATE, "--json", str(made)]
    assert main(arguments) == 1  # on random token ids
    shown = words(capsys)
    assert "the outputs differ most in sequence" in shown
    assert f"{address}: layer 1 not applied" in shown
    told = Diagnosis.from_json(made)
    assert told.evidence == "outputs" and told.actual == address
    shares = [share.coefficient for share in told.layers]
    assert shares == pytest.approx([1, 0, 1, 1], abs=0.01)


def test_an_endpoint_that_fails_has_status_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("equiv.gate.endpoint.PAUSE", 0.0)
    made = tmp_path / "gate.json"
    with serving(lambda *_: (503, b"busy")) as seen:
        address = f"{seen.url}#mine"
        assert main(["compare", "reference", address, "--json", str(made)]) == 2
    assert "row 1 of" in capsys.readouterr().err
    assert not made.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["reference"], "Missing argument"),
        (["reference", "right", "more"], "unexpected extra argument"),
        (["reference", "right", "--colour"], "No such option"),
        (["reference", "right", "--base", BASE], "--base needs --update"),
        (["reference", "right", "--update", LORA], "--update needs --base"),
        (["reference", "right", "--base", BASE, "--update", "/no/update"], "no/update"),
        (["reference", "right", "--base", BASE, "--update", BASE], "equal everywhere"),
        (["reference", "right", "--base", "/no/base", "--update", LORA], "/no/base"),
        (["/no/model", "right"], "no config.json"),
        (["reference", "/no/model"], "no config.json"),
        (["reference", LORA], "no config.json"),
        (["reference", "models/of/mine"], "and there is no such local path"),
        (["reference", "right", "--inputs", "/no/file"], "does not exist"),
        (["right", "right", "--inputs", "texts.txt"], "No tokenizer beside 'right'"),
        (["right", "http://127.0.0.1:9/v1#mine"], "No tokenizer beside 'right'"),
        (["reference", "http://127.0.0.1:9/v1"], "URL#MODEL"),
        (["reference", "http://127.0.0.1:9/v1#"], "URL#MODEL"),
        (["reference", "http://me:secret@host/v1#mine"], "Expected `url`"),
        (["http://127.0.0.1:9/v1#mine", "right"], "only ACTUAL may be an endpoint"),
        (
            ["reference", "right", "--base", "https://h/v1#m", "--update", LORA],
            "as --base, got an address",
        ),
        (["reference", "right", "--rtol", "-1"], "Expected `rtol`"),
        (["reference", "right", "--rtol", "nan"], "Expected `rtol`"),
        (["reference", "right", "--atol", "much"], "should be a valid number"),
        (["reference", "right", "--limit", "0"], "invalid value for '--limit'"),
        (["reference", "right", "--json", "/no/x.json"], "no folder /no"),
        (["reference", "right", "--html", "/no/x.html"], "no folder /no"),
        (["reference", "right", "--json", "/tmp"], "/tmp: it is a folder"),
        (["reference", "right", "--html", "/tmp"], "/tmp: it is a folder"),
    ],
)
def test_mistakes_have_status_two(
    arguments: list[str], says: str, capsys: Capture
) -> None:
    assert main(["compare", *arguments]) == 2
    shown = capsys.readouterr()
    assert says.lower() in " ".join(shown.err.split()).lower()
    assert "Traceback" not in shown.err + shown.out and "secret" not in shown.err


@pytest.mark.parametrize("damage", ["cut", "empty", "no weights", "no config"])
def test_damaged_models_have_status_two(
    damage: str, folders: Path, tmp_path: Path, capsys: Capture
) -> None:
    broken, made = tmp_path / "broken", tmp_path / "gate.json"
    shutil.copytree(folders / "right", broken)
    weights = broken / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no weights":
        weights.unlink()
    else:
        (broken / "config.json").write_text("{}")
    for sides in (["reference", str(broken)], [str(broken), "right"]):
        assert main(["compare", *sides, "--json", str(made)]) == 2
        shown = capsys.readouterr()
        assert str(broken) in shown.err
        assert "Traceback" not in shown.err + shown.out
    assert not made.exists()


def test_files_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    made = tmp_path / "gate.json"
    assert main(["compare", "reference", "right", "--json", str(made)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_nobody_expected_is_not_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("equiv.cli.compare.compare", broken)
    assert main(["compare", "reference", "right"]) == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_help_says_what_the_status_means(capsys: Capture) -> None:
    assert main(["compare", "--help"]) == 0
    shown = words(capsys)
    assert "0 when the two are the same, 1 when they are not" in shown
    assert "URL#MODEL" in shown and "3 for an internal error" in shown


def workflow() -> dict[str, Any]:
    return yaml.safe_load((CI / "equiv-gate.yml").read_text())


def resolved(expression: str, inputs: dict[str, str]) -> str:
    """`${{ inputs.x || 'default' }}` as GitHub fills it in."""
    found = re.fullmatch(
        r"\$\{\{ inputs\.(\w+)(?: \|\| '(\w+)')? \}\}", expression.strip()
    )
    assert found, expression
    return inputs.get(found[1]) or found[2] or ""


def said_by(script: str, variables: dict[str, str]) -> list[str]:
    """The arguments of `equiv` in a step, as GitHub's shell passes them on."""
    stub = "equiv() { printf '%s\\0' \"$@\"; }\n"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", stub + script],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def test_the_workflow_is_one() -> None:
    made = workflow()
    made = {str(key): value for key, value in made.items()}
    on = made["True"]  # "on" is a truth value to YAML
    assert set(on) == {"pull_request", "workflow_dispatch"}
    (job,) = made["jobs"].values()
    inputs = set(on["workflow_dispatch"]["inputs"])
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        script = step.get("run", "")
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert "${{" not in script  # what a stranger wrote is never run as shell
        for value in step.get("env", {}).values():
            assert resolved(value, {name: name for name in inputs}) in inputs
    assert job["steps"][-1]["if"] == "always()"


def test_the_workflow_installs_what_the_constraints_say() -> None:
    (job,) = workflow()["jobs"].values()
    (install,) = [s["run"] for s in job["steps"] if "pip install" in s.get("run", "")]
    constraints = (CI.parents[1] / "constraints.txt").read_text().splitlines()
    (torch_pin,) = re.findall(r"torch==\S+", install)
    assert torch_pin in constraints
    (source,) = [s["with"] for s in job["steps"] if "repository" in s.get("with", {})]
    assert f"-c {source['path']}/constraints.txt" in install
    assert f"./{source['path']}[cli,report,peft]" in install


@pytest.mark.parametrize(
    ("actual", "more", "status"),
    [
        ("right", {}, 0),
        ("skipped", {}, 1),
        ("skipped", {"base": "base", "update": "adapter"}, 1),
    ],
)
def test_the_workflow_compares(
    actual: str,
    more: dict[str, str],
    status: int,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = {"actual": f"a folder of {actual}", **more}
    (tmp_path / inputs["actual"]).symlink_to(folders / actual)
    for name in ("reference", *more.values()):
        (tmp_path / name).symlink_to(folders / name)
    (job,) = workflow()["jobs"].values()
    (step,) = [s for s in job["steps"] if "equiv compare" in s.get("run", "")]
    variables = {name: resolved(v, inputs) for name, v in step["env"].items()}
    arguments = said_by(step["run"], variables)
    assert main(arguments) == status
    assert ("layer 1 not applied" in words(capsys)) == bool(more)
    (kept,) = [s["with"]["path"] for s in job["steps"] if "upload" in s.get("uses", "")]
    assert Agreement.from_json(Path(kept) / "gate.json").same == (not status)
    assert (Path(kept) / "gate.html").read_text().startswith("<!doctype html>")


def test_pull_requests_compare_the_usual_folders() -> None:
    (job,) = workflow()["jobs"].values()
    (step,) = [s for s in job["steps"] if "equiv compare" in s.get("run", "")]
    variables = {name: resolved(v, {}) for name, v in step["env"].items()}
    assert said_by(step["run"], variables)[:3] == ["compare", "reference", "merged"]


@pytest.mark.parametrize(("actual", "status"), [("right", 0), ("twice", 1)])
def test_the_hook_compares(
    actual: str,
    status: int,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (repository,) = yaml.safe_load((CI / "pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local" and not hook["pass_filenames"]
    assert re.search(hook["files"], "merged/model.safetensors")
    assert not re.search(hook["files"], "reference/model.safetensors")
    subprocess.run(["bash", "-n", "-c", hook["entry"]], check=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").symlink_to(folders / "reference")
    (tmp_path / "merged").symlink_to(folders / actual)
    command, *arguments = shlex.split(hook["entry"])
    assert command == "equiv" and main(arguments) == status


def test_the_readme_names_files_and_options_that_exist(capsys: Capture) -> None:
    text = (CI / "README.md").read_text()
    for name in ("equiv-gate.yml", "pre-commit-config.yaml"):
        assert name in text and (CI / name).is_file()
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in re.findall(r"--\w+", text):
        assert option in shown, option
    assert (
        "OWNER/equiv" in text and "OWNER/equiv" in (CI / "equiv-gate.yml").read_text()
    )
