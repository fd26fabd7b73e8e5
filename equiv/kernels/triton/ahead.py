"""The kernels compiled ahead of time, for a GPU that is not there, and what came out.

    python -m equiv.kernels.triton.ahead 90 [--all]

One line of JSON per kernel: registers per thread, bytes of stack and of shared memory,
how often local memory is touched (registers that were spilled), and the widths of loads
and stores. Not in a process whose Triton interprets.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equiv.kernels.triton import configurations
from equiv.kernels.triton.configurations import Configuration
from equiv.kernels.triton.low_rank import low_rank_kernel
from equiv.kernels.triton.primitives import ACTIVATION_NUMBERS
from equiv.kernels.triton.vector import candidates_kernel, vector_kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Pointers to anything but activations and weights, and their types.
_OTHER = {"SCALE": "fp32", "INDEX": "i64", "ORDER": "i64", "GATE": "fp32", "Z": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What a kernel came to.

    Attributes:
        name: Kernel, dtypes, sizes.
        warps: Warps per program.
        registers: Per thread.
        stack: Bytes per thread; spilled registers are here.
        local: Loads and stores of local memory.
        shared: Bytes per program.
        wide: Loads and copies of 16 bytes from global memory.
        narrow: Narrower ones, of a row's own numbers (index, scale, bias).
        wide_stores: Stores of 16 bytes.
        narrow_stores: Narrower ones.
        tensor_cores: Products on tensor cores.
    """

    name: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    wide: int
    narrow: int
    wide_stores: int
    narrow_stores: int
    tensor_cores: int


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its constants, and the dtypes of its pointers."""

    name: str
    kernel: Any
    own: Configuration
    constants: dict[str, Any]
    activations: torch.dtype
    weights: torch.dtype


def shipped(*, everything: bool) -> Iterator[Job]:
    """Every configuration that `launching` can use; or one of each kind."""
    halves = (torch.bfloat16, torch.float16) if everything else (torch.bfloat16,)
    for dtype in (*halves, torch.float32):
        for d in (64, 896, 4096) if everything else (4096,):
            for place in (False, True):
                yield vector_job(d, dtype, in_place=place)
            yield candidates_job(d, dtype)
    for dtype in halves:
        for r in (16, 32, 64):
            yield low_rank_job(r, dtype, dtype)
        yield low_rank_job(16, dtype, torch.float32)
        yield low_rank_job(64, dtype, dtype, gated=True)
    for r in (16, 32, 64):
        yield low_rank_job(r, torch.float32, torch.float32)
    for activation in ACTIVATION_NUMBERS if everything else ():
        for dtype in (*halves, torch.float32):
            for r, gated in ((16, False), (16, True), (64, False), (64, True)):
                yield low_rank_job(r, dtype, dtype, activation, gated=gated)


def vector_job(d: int, dtype: torch.dtype, *, in_place: bool) -> Job:
    """The kernel of `vector_shift`."""
    own = configurations.elementwise(d, dtype)
    name = f"vector {_NAMES[dtype]} d{d}{' in place' if in_place else ''}"
    constants = {"HAS_SCALE": True, "IN_PLACE": in_place}
    return Job(name, vector_kernel, own, constants, dtype, dtype)


def candidates_job(d: int, dtype: torch.dtype) -> Job:
    """The kernel of `candidate_shifts`."""
    own = configurations.elementwise(d, dtype)
    name = f"candidates {_NAMES[dtype]} d{d}"
    return Job(name, candidates_kernel, own, {"HAS_SCALE": True}, dtype, dtype)


def low_rank_job(
    r: int,
    activations: torch.dtype,
    weights: torch.dtype,
    activation: str = "silu",
    *,
    gated: bool = False,
) -> Job:
    """The kernel of `low_rank_shift`, or of its gradient."""
    own = configurations.low_rank(r, weights)
    dtypes = f"{_NAMES[activations]} × {_NAMES[weights]}"
    constants = {
        "ACTIVATION": ACTIVATION_NUMBERS[activation],
        "HAS_BASE": not gated,
        "HAS_BIAS": not gated,
        "HAS_SCALE": True,
        "HAS_ORDER": True,
        "GATED": gated,
        "SAVE_Z": not gated,
        "IN_PLACE": False,
        "PRECISION": configurations.precision(weights),
        "BLOCK_R": own.ranks,
    }
    name = f"low rank {dtypes} r{r} {activation}{' gated' if gated else ''}"
    return Job(name, low_rank_kernel, own, constants, activations, weights)


def compiled(job: Job, capability: int) -> Compiled:
    """Compile one kernel and look at the machine code."""
    names, own = list(job.kernel.arg_names), job.own
    constants = job.constants | {
        "BLOCK_M": own.rows,
        "BLOCK_D": own.columns,
        "INTERPRETED": False,
    }
    kinds = {name: _kind(name, job) for name in names if name not in constants}
    # Pointers and widths are multiples of 16, as a launch would find.
    even = [n for n, kind in kinds.items() if kind.startswith("*") or n in ("d", "e")]
    source = ASTSource(
        fn=job.kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    options = {"num_warps": own.warps, "num_stages": own.stages}
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options
    )
    return _read(job, made)


def _kind(name: str, job: Job) -> str:
    if name in ("X", "BASE", "OUT", "H"):
        return f"*{_NAMES[job.activations]}"
    if name in ("DOWN", "UP", "BIAS", "BANK"):
        return f"*{_NAMES[job.weights]}"
    return f"*{_OTHER[name]}" if name in _OTHER else "i32"


def _read(job: Job, made: Any) -> Compiled:
    """Registers and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    wide, stores = count(r"\b(?:LDG|LDGSTS)\S*\.128"), count(r"\bSTG\S*\.128")
    return Compiled(
        name=job.name,
        warps=job.own.warps,
        registers=used["REG"],
        stack=used["STACK"],
        local=count(r"\b(?:LDL|STL)\b"),
        shared=made.metadata.shared,
        wide=wide,
        narrow=count(r"\b(?:LDG|LDGSTS)\b") - wide,
        wide_stores=stores,
        narrow_stores=count(r"\bSTG\b") - stores,
        tensor_cores=count(r"\b(?:HMMA|HGMMA)\b"),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time.")
    parser.add_argument("capability", type=int, help="80, 90, …")
    parser.add_argument("--all", action="store_true", help="every configuration")
    arguments = parser.parse_args()
    for job in shipped(everything=arguments.all):
        print(json.dumps(asdict(compiled(job, arguments.capability))), flush=True)


if __name__ == "__main__":
    main()
