"""What the batched shifts cost: kernels against PyTorch, and a model steered by row.

    python -m benchmarks.bench_kernels [--json FILE]    on a CUDA device, in 9 minutes
    python -m benchmarks.bench_kernels --cpu            the reference, on one thread
    python -m benchmarks.bench_kernels --dry            everything, tiny and untimed

First the copy ceiling; then for each case the kernel against its truth in float64, and
only then times: median of interleaved rounds with the 20th and 80th percentile. The
floor is the time that the required bytes of the launches really made (`kernel_bytes`)
take at the copy ceiling. Baselines: eager, `torch.compile`, max-autotune, the per-token
gather of weights, and plain h + v, which no kernel can beat by much. In the dry run the
kernels run in Triton's interpreter, and nothing is timed. Times on a CPU are those of
one thread with memory that is kept (`MALLOC` below): else what they show is how often
the operating system hands out new pages.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_bytes import launches_of
from benchmarks.kernel_cases import (
    OURS,
    POPULARITIES,
    Case,
    Where,
    candidates_case,
    check,
    low_rank_case,
    vector_case,
)
from benchmarks.kernel_model import measured
from benchmarks.kernel_timing import copy_bandwidth, dispatched, timed

# Variables of glibc that keep freed memory; read when a process starts.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
SECONDS = 520  # of all; what does not fit is named in the result
AT_MOST = "microseconds"
# Of the floor, over eager, over torch.compile, and the microseconds at most: what is
# aimed at on an H200.
TARGETS: dict[str, dict[str, float]] = {
    "vector": {"floor": 0.90, "eager where": 2.7, "torch.compile": 0.97},
    "vector in place": {"floor": 0.60, "torch.compile": 5.0},
    "low rank, rank 16": {
        "floor": 0.60,
        "eager gather + bmm": 1.6,
        "per-token gather": 15.0,
        "torch.compile": 1.5,
        "torch.compile, max-autotune": 1.0,
    },
    "low rank, rank 64": {
        "floor": 0.45,
        "eager gather + bmm": 1.2,
        "torch.compile": 1.2,
    },
    "low rank, decode": {"eager gather + bmm": 2.5, AT_MOST: 8.0},
    "candidates": {
        "floor": 0.88,
        "eager h[None] + v[:, None]": 1.6,
        "torch.compile": 1.6,
    },
}
Made = Iterator[Callable[[], Case]]


def cuda_cases(where: Where, tuned: Where) -> Made:
    """In the order in which they matter, should the time run out."""
    yield lambda: vector_case(where, 32768, 4096)
    yield lambda: vector_case(where, 32768, 4096, share=0.1)
    for r in (16, 64):
        for own in (tuned if r == 16 else where,):
            yield lambda r=r, own=own: low_rank_case(
                own, 8, 4096, 4096, 8, r, gather=False
            )
    yield lambda: low_rank_case(where, 8, 256, 4096, 8, 16, gather=True)
    yield lambda: low_rank_case(where, 64, 1, 4096, 64, 16, graph=True)
    yield lambda: candidates_case(where, 8192, 4096, 16)
    plain = Where(where.device, where.dtype, where.impl, None)
    for d in (2048, 8192, 16384):
        yield lambda d=d: vector_case(plain, 2**27 // d, d)
        yield lambda d=d: low_rank_case(plain, 8, 2**24 // d, d, 8, 16)
    yield lambda: low_rank_case(plain, 8, 4096, 4096, 8, 4)
    for n in (1, 64, 512):
        yield lambda n=n: low_rank_case(plain, 64, 512, 4096, n, 16)
    for kind in POPULARITIES:
        yield lambda kind=kind: low_rank_case(plain, 64, 512, 4096, 64, 16, kind=kind)
        yield lambda kind=kind: low_rank_case(
            plain, 64, 512, 4096, 64, 16, kind=kind, per_token=True
        )
    for batch in (1, 16, 256):
        yield lambda batch=batch: low_rank_case(
            plain, batch, 1, 4096, batch, 16, graph=True
        )
    full = Where(where.device, torch.float32, where.impl, None)
    yield lambda: low_rank_case(full, 8, 2048, 4096, 8, 16)


def cpu_cases(where: Where) -> Made:
    """Sizes of a model that a CPU runs; the gather is of 268 MB of weights, twice."""
    half = Where("cpu", torch.bfloat16, where.impl, where.compiled)
    for own in (where, half):
        yield lambda own=own: vector_case(own, 2048, 2048)
        yield lambda own=own: vector_case(own, 2048, 2048, share=0.1)
        yield lambda own=own: low_rank_case(own, 8, 256, 2048, 8, 16, gather=True)
        yield lambda own=own: candidates_case(own, 128, 2048, 16)
    yield lambda: low_rank_case(where, 64, 32, 2048, 64, 4, gather=True)
    yield lambda: low_rank_case(where, 64, 1, 2048, 64, 16, gather=True)


def dry_cases(where: Where) -> Made:
    """One of each kind."""
    yield lambda: vector_case(where, 40, 96, 4)
    yield lambda: vector_case(where, 40, 96, 4, share=0.1)
    yield lambda: low_rank_case(where, 3, 20, 96, 3, 16, gather=True)
    yield lambda: low_rank_case(where, 3, 1, 96, 3, 64, graph=True)
    for kind in POPULARITIES:
        yield lambda kind=kind: low_rank_case(
            where, 3, 20, 96, 4, 4, kind=kind, per_token=True
        )
    yield lambda: candidates_case(where, 20, 96, 3)


def measure_case(case: Case, bandwidth: float, *, device: str, rounds: int) -> dict:
    """Truth, bytes, times."""
    ratio = check(case)
    made = launches_of(case.contestants[OURS])
    row: dict[str, Any] = {
        "name": case.name,
        "group": case.group,
        "setting": case.setting,
        "of_bound": ratio,
        "launches": made.names,
        "bytes": made.floor,
    }
    if not rounds:
        for call in case.contestants.values():
            call()
        return row
    times = timed(
        dict(case.contestants), device=device, rounds=rounds, graph=case.graph
    )
    own, floor = times[OURS], 1e6 * made.floor / bandwidth
    row["floor_us"] = round(floor, 2)
    row["of_floor"] = round(floor / own.median, 3)
    row["times_us"] = {name: found.json() for name, found in times.items()}
    row["over"] = {
        name: round(found.median / own.median, 3)
        for name, found in times.items()
        if name != OURS
    }
    if case.graph:  # launched one by one, it costs the host this, which a graph saves
        row["dispatch_us"] = dispatched(case.contestants[OURS], device)
    if device == "cuda":
        row["targets"] = targets(case.group, row, own.median)
    return row


def targets(group: str, row: dict[str, Any], microseconds: float) -> dict[str, Any]:
    """What is aimed at, what was found, and whether that is enough.

    Not every case of a group has all contestants.
    """
    found = {**row["over"], "floor": row["of_floor"], AT_MOST: microseconds}
    judged = {}
    for name, wanted in TARGETS.get(group, {}).items():
        if name in found:
            got = found[name]
            met = got <= wanted if name == AT_MOST else got >= wanted
            judged[name] = {"wanted": wanted, "found": got, "met": met}
    return judged


def compilers(backend: str) -> list[Callable[..., Any]]:
    """`torch.compile`, plain and tuned, from a clean slate."""

    def compile_by(**settings: Any) -> Callable[..., Any]:
        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            torch._dynamo.reset()
            return torch.compile(function, fullgraph=True, dynamic=False, **settings)

        return compiled

    if backend == "aot_eager":
        return [compile_by(backend=backend)] * 2
    return [compile_by(), compile_by(mode="max-autotune-no-cudagraphs")]


def environment(device: str) -> dict[str, str]:
    """Device and versions."""
    versions = {name: version(name) for name in ("torch", "triton", "transformers")}
    named = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": named,
        "capability": str(torch.cuda.get_device_capability())
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "cuda": str(torch.version.cuda),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
    }


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(mode: str) -> dict[str, Any]:
    """Everything of one mode."""
    started, device = time.monotonic(), "cuda" if mode == "cuda" else "cpu"
    rounds = {"cuda": 40, "cpu": 15, "dry": 0}[mode]
    plain, tuned = compilers("aot_eager" if mode == "dry" else "inductor")
    dtype = torch.float32 if mode == "cpu" else torch.bfloat16
    where = Where(device, dtype, "reference" if mode == "cpu" else "fused", plain)
    with_tuning = Where(device, dtype, where.impl, plain, tuned)
    bandwidth = copy_bandwidth(device, 20) if rounds else 1.0
    cases = {
        "cuda": lambda: cuda_cases(where, with_tuning),
        "cpu": lambda: cpu_cases(where),
        "dry": lambda: dry_cases(with_tuning),
    }[mode]()
    rows, left = [], []
    for make in cases:
        case = make()
        if mode == "cuda" and time.monotonic() - started > SECONDS * 0.7:
            left.append(case.name)
            continue
        rows.append(measure_case(case, bandwidth, device=device, rounds=rounds))
        show(rows[-1])
    result = {
        "environment": environment(device),
        "copy_bytes_per_second": round(bandwidth),
        "cases": rows,
        "left_out": left,
    }
    if mode != "cpu":
        result["model"] = measured(device, timed=bool(rounds))
        Console().print_json(json.dumps(result["model"]))
    result["seconds"] = round(time.monotonic() - started)
    return result


def show(row: dict[str, Any]) -> None:
    """One case as a table."""
    console = Console(width=100, highlight=False)
    title = f"{row['name']}: {row['of_bound']:.2f} of its bound, {row['bytes']:,} bytes"
    console.print(f"{title} in {', '.join(row['launches'])}")
    table = Table(box=None, show_header=False)
    for name, found in row.get("times_us", {}).items():
        over = row["over"].get(name)
        table.add_row(
            f"  {name}",
            f"{found['median']:.1f} µs",
            f"[{found['p20']:.1f}, {found['p80']:.1f}]",
            f"{row['of_floor']:.2f} of the floor" if over is None else f"{over:.2f} ×",
        )
    console.print(table)
    if "dispatch_us" in row:
        console.print(f"  outside a graph {row['dispatch_us']} µs of the host per call")
    for name, own in row.get("targets", {}).items():
        said = "met" if own["met"] else "missed"
        console.print(f"  target {name}: {own['found']:.2f}, {said} ({own['wanted']})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time the batched shifts.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--dry", action="store_true", help="tiny, untimed, on the CPU")
    modes.add_argument("--cpu", action="store_true", help="the reference")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    mode = "dry" if arguments.dry else "cpu" if arguments.cpu else "cuda"
    if mode == "dry":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if mode == "cpu":
        if not MALLOC.items() <= os.environ.items():
            command = [sys.executable, "-m", "benchmarks.bench_kernels", *sys.argv[1:]]
            os.execve(sys.executable, command, {**os.environ, **MALLOC})
        torch.set_num_threads(1)
    with torch.no_grad():
        result = run(mode)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
