"""The command line, in process: exit status, files, and what it says to mistakes."""

import json
from pathlib import Path

import pytest

from equiv.cli.loading import read_texts
from equiv.cli.main import main
from equiv.demo import loading
from equiv.report.report import Report

BASE, TUNED, LORA = (str(p) for p in (loading.BASE, loading.TUNED, loading.LORA))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*loading.texts(8), "", ""]))
    return str(path)


def test_check_writes_what_it_found(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, page = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ["check", BASE, LORA, "--inputs", texts, "--rank", "2"]
    status = main([*arguments, "--json", str(made), "--html", str(page)])
    assert status == 0
    shown = capsys.readouterr()
    report = Report.from_json(made)
    assert report.subject.sequences == 8 and report.subject.inputs == "texts"
    assert report.subject.rank == 2
    assert " ".join(report.headline.split()) in " ".join(shown.out.split())
    assert page.read_text().startswith("<!doctype html>")
    assert "equiv check" in shown.err  # the progress bar


@pytest.mark.parametrize(
    ("extra", "status", "says"),
    [
        (["--max-remainder", "50"], 0, ""),
        (["--max-remainder", "1e-6"], 1, "Not met: layer 0"),
        (["--min-recovered", "0"], 0, ""),
        (["--min-recovered", "0.9999"], 1, "Not met: steering recovers"),
    ],
)
def test_thresholds_set_the_status(
    texts: str,
    extra: list[str],
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", BASE, TUNED, "--inputs", texts, *extra]) == status
    assert says in capsys.readouterr().out


def test_what_was_not_measured_is_not_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.txt"  # nothing can be held out of one text
    path.write_text(loading.texts(1)[0])
    arguments = ["check", BASE, LORA, "--inputs", str(path)]
    assert main([*arguments, "--min-recovered", "0.1"]) == 1
    assert "recovers –" in capsys.readouterr().out
    assert main(["check", BASE, LORA]) == 0


def test_jsonl_inputs_and_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = tmp_path / "texts.jsonl", tmp_path / "r.json"
    lines = [json.dumps({"question": line}) for line in loading.texts(9)]
    lines[3] = json.dumps(loading.texts(1)[0])
    path.write_text("\n".join(lines))
    arguments = ["check", BASE, LORA, "--inputs", str(path), "--limit", "6"]
    assert main([*arguments, "--json", str(made)]) == 0
    assert Report.from_json(made).subject.sequences == 6
    assert "first 6 of 9 texts" in capsys.readouterr().err


def test_a_field_of_jsonl_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is that of the same texts in a file of lines."""
    lines, quick = loading.texts(6), ["--site", "block_out", "--at", "base"]
    rows = [{"text": "1 2", "body": line, "answer": "3"} for line in lines]
    plain, fields = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("\n".join(lines))
    fields.write_text("\n".join(json.dumps(row) for row in rows))
    found: list[Report] = []
    given = ["--inputs", str(plain)], ["--inputs", str(fields), "--field", "body"]
    for extra in given:
        made = tmp_path / f"{len(found)}.json"
        assert main(["check", BASE, LORA, *quick, *extra, "--json", str(made)]) == 0
        found.append(Report.from_json(made))
    assert found[0].rows == found[1].rows
    assert found[0].subject.tokens == found[1].subject.tokens
    assert main(["check", BASE, LORA, *given[1][:-1], "bodies"]) == 2
    assert "expected a field bodies" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "No such command"),
        (["check", BASE], "Missing argument"),
        (["check", BASE, LORA, "--rank", "two"], "valid integer"),
        (["check", BASE, LORA, "--rank", "0"], "Expected `rank`"),
        (["check", BASE, LORA, "--at", "end"], "both, base, midpoint"),
        (["check", BASE, LORA, "--derivative", "left"], "forward, central"),
        (["check", BASE, LORA, "--site", "nowhere"], "nowhere"),
        (["check", BASE, LORA, "--colour"], "No such option"),
        (["check", BASE, LORA, "--inputs", "/no/file"], "does not exist"),
        (["check", "/no/model", LORA], "no config.json"),
        (["check", BASE, "/no/update"], "/no/update"),
        (["check", BASE, LORA, "--json", "/no/folder/x.json"], "no folder /no/folder"),
        (["demo", "--html", "/no/folder/x.html"], "no folder /no/folder"),
        (["check", BASE, LORA, "--json", "/tmp"], "/tmp: it is a folder"),
        (["demo", "--html", "/tmp"], "/tmp: it is a folder"),
        (["check", BASE, LORA, "--limit", "0"], "invalid value for '--limit'"),
        (["check", BASE, LORA, "--min-recovered", "0.5"], "needs --inputs"),
        (
            ["check", BASE, LORA, "--inputs", "samples", "--min-recovered", "1.5"],
            "at most 1 (all of it), got 1.5",
        ),
        (
            ["check", BASE, LORA, "--inputs", "samples", "--min-recovered", "nan"],
            "at most 1 (all of it), got nan",
        ),
        (["check", "models/of/mine", LORA], "and there is no such local path"),
        (["check", BASE, "models/of/mine"], "and there is no such local path"),
        (["check", BASE, LORA, "--max-remainder", "nan"], "`max_remainder`"),
        (["check", BASE, LORA, "--seed", "-1"], "`seed`"),
        (["check", BASE, BASE], "equal everywhere"),
        (["check", BASE, LORA, "--field", "body"], "pass it with --inputs"),
        (
            ["check", BASE, LORA, "--field", "body", "--inputs", "samples"],
            "pass it with --inputs",
        ),
        (["compare", BASE, TUNED, "--field", "body"], "pass it with --inputs"),
    ],
)
def test_mistakes_have_status_two(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert says.lower() in " ".join(shown.err.split()).lower()
    assert "Traceback" not in shown.err + shown.out


@pytest.mark.parametrize(
    ("content", "suffix", "says"),
    [
        (b"", ".txt", "holds no text"),
        (b"\xff\xfe\x00", ".txt", "not text in UTF-8"),
        (b'{"text": "a"}\n{', ".jsonl", "line 2: not JSON"),
        (b'{"body": "a"}', ".jsonl", "line 1: expected a field text, question"),
        (b'{"text": 3}', ".jsonl", "line 1: expected a field"),
        (b'{"text": 3}', ".JSONL", "line 1: expected a field"),
        (b'\xef\xbb\xbf\n{"text": "a"}', ".txt", "rename it to .jsonl"),
        (b'["a", "b"]', ".txt", "rename it to .jsonl"),
    ],
)
def test_bad_files_have_status_two(
    content: bytes,
    suffix: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(content)
    assert main(["check", BASE, LORA, "--inputs", str(path)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_lines_end_where_files_say_so(tmp_path: Path) -> None:
    """A byte order mark, carriage returns, and separators inside JSON strings."""
    path = tmp_path / "texts.JSONL"
    texts = ["a\u2028b", "c\u0085d", "e"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_texts(path, 9) == texts
    plain = tmp_path / "texts.txt"
    plain.write_bytes("\ufeff[MAX 1 2]\r\na\u2028b\r\n".encode())
    assert read_texts(plain, 9) == ["[MAX 1 2]", "a\u2028b"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ZeroDivisionError("ours"), 3),
        (EOFError("ours"), 3),
        (BrokenPipeError(32, "ours"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_nobody_expected_is_not_status_one(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr("equiv.model.loading.load_saved", broken)
    assert main(["check", BASE, LORA]) == status
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == isinstance(error, ZeroDivisionError)


def test_reports_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: Report, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "to_json", full)
    arguments = ["check", BASE, LORA, "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 2
    assert "No space left" in capsys.readouterr().err


def test_a_damaged_model_has_status_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["check", str(tmp_path), LORA]) == 2
    (tmp_path / "config.json").write_text((loading.BASE / "config.json").read_text())
    assert main(["check", str(tmp_path), LORA]) == 2
    whole = (loading.BASE / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:5000])
    assert main(["check", str(tmp_path), LORA]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_hub_ids_come_from_the_cache(tmp_path: Path, texts: str) -> None:
    """A hub repository as it lies in the cache, without any network."""
    import os
    import shutil
    import subprocess
    import sys

    for name, source in (("me/base-v0.1", loading.BASE), ("me/lora", loading.LORA)):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(source, folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    code = "import sys; from equiv.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "me/base-v0.1", "me/lora"],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "first order is right at every layer" in " ".join(done.stdout.split())


def test_help_says_what_the_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 when what was asked for is met, 1 when it is not met" in shown
    assert "3 for an internal error" in shown
    assert main(["--help"]) == 0


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("equiv.cli.demo.SEQUENCES", 32)
    made, page = tmp_path / "demo.json", tmp_path / "demo.html"
    assert main(["demo", "--json", str(made), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if "Wrote" not in line)
    assert Report.from_json(made).subject.update.startswith("LoRA")
    for word in ("LoRA", "all weights", "What this means", "exact oracle", "▒"):
        assert word in shown
    assert page.stat().st_size > 50_000


def test_finite_differences_are_said(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    asked = ["--site", "block_out", "--derivative", "central", "--at", "base"]
    assert main(["check", BASE, LORA, *asked, "--json", str(path)]) in (0, 1)
    rows = Report.from_json(path).rows
    assert rows and {row.derivative for row in rows if row.site == "block_out"} == {
        "central"
    }
