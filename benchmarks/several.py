"""Several updates in one call of a check, against a call for each.

    python -m benchmarks.several [--json FILE] [--layers 2] [--runs 3] [--updates 3]

Every round runs both, in turn, on the Llama of `bench_check.py` with LoRA updates;
figures are medians over rounds of CPU time on one thread, with the smallest and the
largest. `base` is what a shared pass of the base could save at most: the share of a
check that goes into values of the base model, which a `jvp` from the base computes
beside its tangents. It is measured by running every such stage once more for its value
alone.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import equiv
from benchmarks.bench_check import new_model, spread, updates
from equiv.shift import propagate


def seconds(run: Callable[[], object]) -> float:
    """CPU time of one run: other work on the machine does not enter it."""
    started = time.process_time()
    run()
    return time.process_time() - started


@contextmanager
def base_values() -> Iterator[list[float]]:
    """Seconds of every value of the base, each run once more beside its `jvp`."""
    found: list[float] = []
    run = propagate._Pass._jvp

    def twice(
        self: Any, batch: int, s: float, h: Tensor | None, dh: Tensor | None
    ) -> Any:
        if s == 0.0:
            found.append(
                seconds(lambda: self.cut.run(self.stage, self.tensors, h, batch))
            )
        return run(self, batch, s, h, dh)

    propagate._Pass._jvp = twice
    try:
        yield found
    finally:
        propagate._Pass._jvp = run


def base_share(model: Any, update: equiv.Update, inputs: object) -> float:
    """Share of one check that goes into values of the base model."""
    with base_values() as found:
        whole = seconds(lambda: equiv.check(model, update, inputs))
    return sum(found) / (whole - sum(found))


def measure(layers: int, rounds: int, count: int) -> dict[str, Any]:
    """One call for all against one for each, on random inputs and on given ones."""
    model = new_model(layers)
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    lora = updates(model)["LoRA"]
    several = {f"lora {i}": (1 + i) * lora for i in range(count)}
    result: dict[str, Any] = {}
    for name, inputs in (("random inputs", None), ("given inputs", ids)):
        ratios, shares = [], []
        for _ in range(rounds):
            together = seconds(lambda given=inputs: equiv.check(model, several, given))
            apart = sum(
                seconds(lambda u=update, given=inputs: equiv.check(model, u, given))
                for update in several.values()
            )
            ratios.append(together / apart)
            shares.append(base_share(model, lora, inputs))
        result[name] = {"one_call_over_calls": spread(ratios), "base": spread(shares)}
    setting = {
        "layers": layers,
        "updates": count,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    return {"several": result, "setting": setting}


def show(result: dict[str, Any]) -> None:
    """The result in lines."""
    console = Console(width=100, highlight=False)
    for name, found in result["several"].items():
        ratio, base = found["one_call_over_calls"], found["base"]
        console.print(
            f"{result['setting']['updates']} LoRA updates, {name}: one call / calls "
            f"{ratio['median']:.3f} ({ratio['low']:.3f} – {ratio['high']:.3f}); values "
            f"of the base {base['median']:.1%} ({base['low']:.1%} – {base['high']:.1%})"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.layers, arguments.runs, arguments.updates)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
