"""The benchmark of the kernels runs, dry, and its floors are those counted by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.bench_kernels import targets
from benchmarks.kernel_bytes import launches_of
from benchmarks.kernel_timing import dispatched
from equiv import kernels

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def test_it_runs_dry(tmp_path: Path) -> None:
    """Every kind of case within its bound, and a model steered by row."""
    file = tmp_path / "dry.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_kernels"]
    subprocess.run(
        [*command, "--dry", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    result = json.loads(file.read_text())
    assert len(result["cases"]) >= 9 and not result["left_out"]
    for row in result["cases"]:
        assert 0 < row["of_bound"] <= 1 and "times_us" not in row
        assert len(row["launches"]) == 1 and row["bytes"] > 0
    assert "seconds" not in result["model"]


def test_floors_are_counted_by_hand() -> None:
    """Rows of 2 × 10, d = 8, bfloat16; two of three steers of rank 4 occur."""
    h = torch.zeros(2, 10, 8, dtype=torch.bfloat16)
    down, up = torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16)
    bias, scale = torch.zeros(3, 4, dtype=torch.bfloat16), torch.ones(2, 1)
    index = torch.tensor([[2], [0]], dtype=torch.int32)
    found = launches_of(lambda: kernels.low_rank_shift(h, down, up, bias, index, scale))
    activations = 2 * (20 * 8 * 2)  # read, written
    weights = 2 * (2 * 4 * 8 + 4) * 2
    z, small = 20 * 4 * 4, 2 * 4 + 2 * 4
    assert found.names == ["low_rank"]
    assert found.floor == activations + weights + z + small
    # In place only the steered rows: ten of twenty here.
    index = torch.tensor([[2], [-1]], dtype=torch.int32)
    found = launches_of(lambda: kernels.vector_shift_(h, up[:, 0], index))
    assert found.floor == 2 * 10 * 8 * 2 + 8 * 2 + 2 * 4
    found = launches_of(lambda: kernels.candidate_shifts(h, up[:, 0]))
    assert found.floor == (1 + 3) * 20 * 8 * 2 + 3 * 8 * 2


def test_targets_are_judged_one_way_or_the_other() -> None:
    row = {"over": {"eager gather + bmm": 2.6}, "of_floor": 0.1}
    found = targets("low rank, decode", row, 8.5)
    assert {name: own["met"] for name, own in found.items()} == {
        "eager gather + bmm": True,
        "microseconds": False,
    }
    assert targets("low rank, decode", row, 7.5)["microseconds"]["met"]
    assert not targets("candidates", row, 1.0)["floor"]["met"]
    assert dispatched(lambda: time.sleep(1e-3), "cpu", 3) >= 1000


def test_readme_has_the_figures_of_the_results() -> None:
    file = ROOT / "benchmarks" / "results" / "cpu" / "kernels.json"
    cases = json.loads(file.read_text())["cases"]
    text = (ROOT / "README.md").read_text()
    columns = (
        "equiv",
        "per-token gather",
        "eager gather + bmm",
        "torch.compile",
        "plain h + v",
    )
    for row, name, dtype in (
        ("8 steers of rank 16, float32", "low rank 8 ", "float32"),
        ("the same, bfloat16", "low rank 8 ", "bfloat16"),
        ("vectors per token, float32", "vector", "float32"),
        ("64 single rows, 64 steers of rank 16", "low rank 64 × 1 ", "float32"),
    ):
        case = next(
            c
            for c in cases
            if c["name"].startswith(name) and c["setting"]["dtype"] == dtype
        )
        times = [case["times_us"].get(column) for column in columns]
        shown = [f"{t['median'] / 1000:.1f}" if t else "–" for t in times]
        assert f"| {' | '.join([row, *shown])} |" in text
