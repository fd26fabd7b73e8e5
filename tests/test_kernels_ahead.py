"""The kernels compiled for GPUs that are not here: nothing spilled, everything wide.

A process of its own, since this one's Triton interprets. The ordinary tests compile one
configuration of each kind; `pytest -m slow tests/test_kernels_ahead.py` all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# At most so many per thread: with 4 warps two programs share a multiprocessor.
REGISTERS = 248
SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes that a program may have


def compiled(capability: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    hidden = {"TRITON_INTERPRET", "TRITON_CACHE_DIR"}
    own = {k: v for k, v in os.environ.items() if k not in hidden}
    command = [sys.executable, "-m", "equiv.kernels.triton.ahead", str(capability)]
    done = subprocess.run(
        [*command, *arguments],
        env={**own, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], capability: int) -> None:
    for one in found:
        name = f"{one['name']} on sm_{capability}"
        assert one["stack"] == one["local"] == 0, f"{name}: {one}"
        assert one["registers"] <= REGISTERS, f"{name}: {one}"
        # Two programs at once.
        assert 2 * one["shared"] <= SHARED[capability], f"{name}: {one}"
        # Numbers of a row (index, scale, bias, gate) are loaded one by one; what has a
        # width is loaded and stored 16 bytes at a time.
        assert one["wide"] > 0 and one["wide_stores"] > 0, f"{name}: {one}"
        if "low rank" in one["name"]:
            assert one["tensor_cores"] > 0, f"{name}: {one}"
        else:
            assert one["narrow_stores"] == 0, f"{name}: {one}"


@pytest.mark.parametrize("capability", [90, 80])
def test_shipped_kernels(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, tmp_path)
    assert len(found) >= 14
    check(found, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
def test_every_configuration(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, tmp_path, "--all")
    assert len(found) >= 100
    check(found, capability)


def test_what_the_check_is_for(tmp_path: Path) -> None:
    """Tiles that are too large spill, and widths that nobody knows load narrowly."""
    code = """
import dataclasses, json, torch
from equiv.kernels.triton import ahead
from equiv.kernels.triton.configurations import Configuration
job = ahead.low_rank_job(64, torch.float32, torch.float32)
large = dataclasses.replace(job, own=Configuration(32, 128, 64, warps=4, stages=2))
print(json.dumps(dataclasses.asdict(ahead.compiled(large, 90))))
"""
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**own, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    with pytest.raises(AssertionError):
        check([json.loads(done.stdout)], 90)
