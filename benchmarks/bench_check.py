"""What measuring every layer and site costs, in units of one plain forward.

    python -m benchmarks.bench_check [--json FILE] [--layers 8] [--runs 7]

Unit: one forward of the same model on the same batch under `no_grad`, as PyTorch runs
it by default (fused attention). Model: a Llama of 8 layers × 768 with random weights,
batch 4 × 256, float32, two threads. Every round runs each contestant once, in turn, so
that a slow spell of the machine falls on all of them; figures are medians over rounds
of the ratio to the unit of the same round.

Floors: a dense update needs base (1), tangent (2: ΔW x and W dx) and tuned (1) products
per weight, 4 units; factors leave out ΔW x, about 3. The midpoint adds a `jvp` of its
own, 3 and 2.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import equiv
from equiv.model.attention import attention
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import SITES
from equiv.model.stages import staged
from equiv.shift.calculus import Selection
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.table import Table
from equiv.shift.traces import BASE, MIDPOINT, TUNED, Point
from equiv.update.low_rank import LowRank

RANK = 16
TARGETS = {"dense": 5.2, "LoRA": 4.0}
PEER_TARGET = 1.1
FLOORS = {
    "dense": 4.0,
    "LoRA": 3.0,
    "dense, base and midpoint": 7.0,
    "LoRA, base and midpoint": 5.0,
    "whole-model jvp + tuned forward": 4.0,
}


def new_model(layers: int) -> Any:
    """The Llama that is measured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=768,
            num_hidden_layers=layers,
            num_attention_heads=12,
            num_key_value_heads=4,
            intermediate_size=2048,
            vocab_size=2048,
        )
    ).eval()


def updates(model: Any) -> dict[str, equiv.Update]:
    """A dense update of all matrices of the blocks, and a LoRA of the same ones."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return 1e-3 * torch.randn(shape, generator=generator)

    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and ".layers." in name
    }
    return {
        "dense": equiv.Update.from_dict(
            {n: random(*p.shape) for n, p in weights.items()}
        ),
        "LoRA": equiv.Update.from_dict(
            {
                n: LowRank(random(p.shape[0], RANK), random(RANK, p.shape[1]))
                for n, p in weights.items()
            }
        ),
    }


def check_core(
    model: Any, update: equiv.Update, ids: Tensor, points: tuple[Point, ...]
) -> Table:
    """The full pass of a check: shifts and norms at all sites, without fits."""
    low = low_rank_names(model, update)
    with (
        measured(model),
        staged(model, from_inputs(model, ids), torch.float32, low_names=low) as cut,
    ):
        table = Table(Selection(frozenset(cut.layers), SITES))
        for _, _, traces in propagate(cut, update, points, low=low):
            for trace in traces:
                table.add(trace, cut.batches[trace.batch].mask)
    return table


def whole_jvp(model: Any, ids: Tensor, change: Mapping[str, Tensor]) -> None:
    """One `jvp` of the whole model: the base and the tangent of its output."""
    fixed = {n: p.detach() for n, p in model.named_parameters()}

    def run(moving: dict[str, Tensor]) -> Tensor:
        call = {"input_ids": ids, "use_cache": False}
        return functional_call(model, {**fixed, **moving}, (), call).logits

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        jvp(run, ({n: fixed[n] for n in change},), (dict(change),))


def forward(model: Any, ids: Tensor) -> None:
    """One plain forward."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def heads() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer."""
    key, value = torch.randn(2, 4, 4, 256, 64)
    return torch.randn(4, 12, 256, 64), key, value


def attend(layers: int) -> None:
    """The attention of one plain forward, fused."""
    for _ in range(layers):
        scaled_dot_product_attention(*heads(), is_causal=True, enable_gqa=True)


def attend_and_move(layers: int) -> None:
    """The attention of base, tangent and tuned, as a check computes it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        for _ in range(layers):
            qkv = heads()
            jvp(run, qkv, qkv)
            run(*qkv)


def tuned_forward(model: Any, ids: Tensor, change: Mapping[str, Tensor]) -> None:
    """One plain forward at W + ΔW."""
    moved = {n: p.detach() for n, p in model.named_parameters()}
    moved |= {n: moved[n] + d for n, d in change.items()}
    with torch.no_grad():
        functional_call(model, moved, (), {"input_ids": ids, "use_cache": False})


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(layers: int, rounds: int) -> dict[str, Any]:
    """All contestants, in turn, `rounds` times."""
    model = new_model(layers)
    ids = torch.randint(2048, (4, 256), generator=torch.Generator().manual_seed(0))
    made = updates(model)
    dense, lora = made["dense"], made["LoRA"]
    change = {n: d for n, d in dense.deltas.items() if isinstance(d, Tensor)}
    contestants: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, ids),
        "attention of a forward": lambda: attend(layers),
        "attention of a check": lambda: attend_and_move(layers),
        "dense": lambda: check_core(model, dense, ids, (BASE, TUNED)),
        "LoRA": lambda: check_core(model, lora, ids, (BASE, TUNED)),
        "dense, base and midpoint": lambda: check_core(
            model, dense, ids, (BASE, MIDPOINT, TUNED)
        ),
        "LoRA, base and midpoint": lambda: check_core(
            model, lora, ids, (BASE, MIDPOINT, TUNED)
        ),
        "whole-model jvp": lambda: whole_jvp(model, ids, change),
        "tuned forward": lambda: tuned_forward(model, ids, change),
    }
    for run in contestants.values():  # warm up: dynamo, allocator, oneDNN
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(seconds(run))
    return _summary(times, layers)


def _summary(times: dict[str, list[float]], layers: int) -> dict[str, Any]:
    unit = times["forward"]
    units = {
        name: [t / u for t, u in zip(ts, unit, strict=True)]
        for name, ts in times.items()
    }
    peer = [
        a + b
        for a, b in zip(times["whole-model jvp"], times["tuned forward"], strict=True)
    ]
    units["whole-model jvp + tuned forward"] = [
        p / u for p, u in zip(peer, unit, strict=True)
    ]
    sites = 4 * layers + 1
    units[f"obvious way: one jvp per site ({sites}) + tuned forward"] = [
        (sites * a + b) / u
        for a, b, u in zip(
            times["whole-model jvp"], times["tuned forward"], unit, strict=True
        )
    ]
    against_peer = [d / p for d, p in zip(times["dense"], peer, strict=True)]
    plain, check = (
        statistics.median(units[f"attention of a {what}"])
        for what in ("forward", "check")
    )
    return {
        "unit_seconds": spread(unit),
        "units": {name: spread(values) for name, values in units.items()},
        "dense_over_peer": spread(against_peer),
        "attention": {
            "forward": plain,
            "check": check,
            "dense_rest": statistics.median(units["dense"]) - check,
            "LoRA_rest": statistics.median(units["LoRA"]) - check,
        },
        "targets": {**TARGETS, "dense_over_peer": PEER_TARGET},
        "floors": FLOORS,
        "setting": {
            "layers": layers,
            "width": 768,
            "batch": [4, 256],
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "rank": RANK,
            "rounds": len(unit),
        },
        "machine": {
            "processor": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    table = RichTable(box=None)
    for column in ("", "units", "low", "high", "target", "floor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, spread in result["units"].items():
        target, floor = result["targets"].get(name), result["floors"].get(name)
        table.add_row(
            name,
            *(f"{spread[key]:.2f}" for key in ("median", "low", "high")),
            "" if target is None else f"{target:.1f}",
            "" if floor is None else f"{floor:.0f}",
        )
    console = Console(width=100, highlight=False)
    unit = result["unit_seconds"]
    console.print(
        f"Unit: one forward, {unit['median']:.3f} s ({unit['low']:.3f} – "
        f"{unit['high']:.3f} s)"
    )
    console.print(table)
    ratio = result["dense_over_peer"]
    console.print(
        f"dense / (whole-model jvp + tuned forward): {ratio['median']:.2f} "
        f"({ratio['low']:.2f} – {ratio['high']:.2f}), target ≤ {PEER_TARGET}"
    )
    share = result["attention"]
    console.print(
        f"of which attention: {share['forward']:.2f} units of a forward, "
        f"{share['check']:.2f} of a check; the rest is {share['dense_rest']:.2f} "
        f"(dense) and {share['LoRA_rest']:.2f} (LoRA)"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    result = measure(arguments.layers, arguments.runs)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
