"""Clocks for the kernels: on a GPU by events, with a cold L2, or inside a CUDA graph.

Contestants take turns in an order drawn anew every round, so that a slow spell falls on
all of them; ours takes part twice, which says how far chance goes.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

AGAIN = " again"
_FLUSH = 2**28  # bytes that push everything else out of the L2
_IN_GRAPH = 20


@dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Time":
        """From single measurements, in seconds."""
        cuts = statistics.quantiles([1e6 * s for s in seconds], n=5)
        return cls(1e6 * statistics.median(seconds), cuts[0], cuts[3])

    def json(self) -> dict[str, float]:
        """Rounded to what can be known."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


def timed(
    contestants: dict[str, Callable[[], object]],
    *,
    device: str,
    rounds: int,
    graph: bool = False,
) -> dict[str, Time]:
    """Every contestant, and the first of them twice."""
    first = next(iter(contestants))
    taking_part = {**contestants, first + AGAIN: contestants[first]}
    for call in contestants.values():  # compiles, allocates
        call()
        call()
    clock = _cpu_clock() if device == "cpu" else _cuda_clock()
    calls = 1
    if graph:
        taking_part = {name: _captured(call) for name, call in taking_part.items()}
        calls = _IN_GRAPH
    seconds: dict[str, list[float]] = {name: [] for name in taking_part}
    order = random.Random(0)
    for _ in range(rounds):
        names = list(taking_part)
        order.shuffle(names)
        for name in names:
            seconds[name].append(clock(taking_part[name]) / calls)
    return {name: Time.of(own) for name, own in seconds.items()}


def dispatched(call: Callable[[], object], device: str, calls: int = 200) -> float:
    """Microseconds of the host per call, as a device that is never waited for sees it.

    On a CPU the work itself is among them.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - started
    synchronize()
    return round(1e6 * spent / calls, 2)


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes per second of the fastest copy: the ceiling of everything else."""
    source = torch.zeros(2**28 if device == "cpu" else 2**30, dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    found = timed({"copy": lambda: target.copy_(source)}, device=device, rounds=rounds)[
        "copy"
    ]
    return 2 * source.numel() / (1e-6 * found.p20)


def _cpu_clock() -> Callable[[Callable[[], object]], float]:
    def clock(call: Callable[[], object]) -> float:
        started = time.thread_time()
        call()
        return time.thread_time() - started

    return clock


def _cuda_clock() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")

    def clock(call: Callable[[], object]) -> float:
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return 1e-3 * before.elapsed_time(after)

    return clock


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Twenty calls as a CUDA graph, so that launching costs nothing."""
    side = torch.cuda.Stream()
    graph, kept = torch.cuda.CUDAGraph(), list[object | Tensor]()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kept.extend(call() for _ in range(_IN_GRAPH))
    return graph.replay
