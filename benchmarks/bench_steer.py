"""What steering costs: a steered forward over an unsteered one, beside other tools.

    python -m benchmarks.bench_steer [--json FILE] [--rounds 100]

Model: a Llama of 8 layers × 256 with random weights, batch 4 × 64, float32, one thread,
without a cache. Steered at the output of every block by one fixed vector, or by one
LoReFT of rank 8. Plain hooks are the floor: a line of PyTorch each, LoReFT with W − R
formed beforehand. What is measured is the CPU time of that thread, which does not
count waiting for a shared machine. In every round each contestant has a turn of four
forwards, of which the last three count, in an order drawn anew, so that a slow spell
falls on all of them; figures are medians over rounds of the ratio to the unsteered
turns of the same round, with quartiles, and the ratio of the fastest turns.
"Unsteered, again" says how far chance goes.

Nothing is timed before every contestant's logits are those of plain hooks. Other tools
take part where they are installed, in an environment of their own:

    pip install --no-deps pyvene==0.1.8 pyreft==0.1.0 && pip install datasets
"""

import argparse
import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable
from torch import Tensor

import equiv

LAYERS, WIDTH, RANK, BATCH, SEQ = 8, 256, 8, 4, 64
UNSTEERED, AGAIN = "unsteered", "unsteered, again"
VECTOR, LOREFT = "fixed vector", f"LoReFT r{RANK}"
TARGET = 1.03
FORWARDS = 3
# Float32 logits of one size 1 after 8 blocks, summed in another order: some 1e-6.
TOLERANCE = 1e-4


@dataclass
class Contestant:
    """A way to run the model.

    Attributes:
        steer: What is entered before it runs.
        forward: Runs it once and returns the logits.
        kind: What it should be equal to: unsteered, or the plain hooks of this kind.
    """

    steer: Callable[[], AbstractContextManager[object]]
    forward: Callable[[], Tensor]
    kind: str
    seconds: list[float] = field(default_factory=list)


def new_model() -> Any:
    """The Llama that is steered."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=688,
            vocab_size=1024,
        )
    ).eval()


@dataclass(frozen=True)
class Drawn:
    """The steering, as tensors, one entry per layer."""

    vectors: list[Tensor]  # [d]
    rotations: list[Tensor]  # [r, d], orthonormal rows
    weights: list[Tensor]  # [r, d]
    biases: list[Tensor]  # [r]

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        """Drawn by a seed, some percent of the activations' size."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> list[Tensor]:
            return [torch.randn(shape, generator=generator) for _ in range(LAYERS)]

        rotations = [torch.linalg.qr(x)[0].T.contiguous() for x in draw(WIDTH, RANK)]
        return cls(
            [0.02 * v for v in draw(WIDTH)],
            rotations,
            [0.05 * w for w in draw(RANK, WIDTH)],
            [0.02 * b for b in draw(RANK)],
        )

    def steering(self, kind: str) -> dict[tuple[int, str], equiv.Steering]:
        """As `equiv.steer` takes it."""
        loreft = zip(self.rotations, self.weights, self.biases, strict=True)
        made: list[equiv.Steering] = (
            [equiv.Vector(v) for v in self.vectors]
            if kind == VECTOR
            else [equiv.LoReFT(*parts) for parts in loreft]
        )
        return {(layer, "block_out"): form for layer, form in enumerate(made)}

    def plain(self, kind: str) -> list[Callable[[Tensor], Tensor]]:
        """What a plain hook returns, layer by layer."""
        if kind == VECTOR:
            return [_adding(v) for v in self.vectors]
        parts = zip(self.rotations, self.weights, self.biases, strict=True)
        return [_editing(r, w - r, b) for r, w, b in parts]


def _adding(v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: h + v


def _editing(r: Tensor, down: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: h + (h @ down.T + b) @ r


@contextmanager
def plain_hooks(
    model: Any, changes: list[Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """One hook per block, of one line."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda _module, _args, out: change(out)

    with ExitStack() as stack:
        for block, change in zip(model.model.layers, changes, strict=True):
            stack.callback(block.register_forward_hook(hook(change)).remove)
        yield


def contestants(model: Any, ids: Tensor) -> dict[str, Contestant]:
    """Everything that is compared; other tools where they are installed."""
    drawn, others = Drawn.of(1), [Drawn.of(seed) for seed in range(1, BATCH + 1)]

    def forward() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    made = {
        UNSTEERED: Contestant(nullcontext, forward, UNSTEERED),
        AGAIN: Contestant(nullcontext, forward, UNSTEERED),
    }
    for kind in (VECTOR, LOREFT):
        steering, plain = drawn.steering(kind), drawn.plain(kind)
        made[f"{kind}: plain hooks"] = Contestant(
            lambda plain=plain: plain_hooks(model, plain), forward, kind
        )
        made[f"{kind}: equiv"] = Contestant(
            lambda s=steering: equiv.steer(model, s), forward, kind
        )
        made[f"{kind}: equiv, positions"] = Contestant(
            lambda s=steering: equiv.steer(model, s, positions="prompt"), forward, kind
        )
        bank = [steering, *(other.steering(kind) for other in others[1:])]
        same = [0] * BATCH
        made[f"{kind}: equiv, by row, one steer"] = Contestant(
            lambda b=bank, i=same: equiv.steer(model, b, index=i), forward, kind
        )
        made[f"{kind}: equiv, by row, {BATCH} steers"] = Contestant(
            lambda b=bank: equiv.steer(model, b, index=range(BATCH)), forward, ""
        )
    return made | peers(model, ids, drawn)


def peers(model: Any, ids: Tensor, drawn: Drawn) -> dict[str, Contestant]:
    """Other tools, with the steering that `drawn` holds."""
    found: dict[str, Contestant] = {}
    for name, make in ((f"{VECTOR}: pyvene", pyvene), (f"{LOREFT}: pyreft", pyreft)):
        try:
            forward = make(model, ids, drawn)
        except ImportError as error:
            Console(stderr=True).print(f"{name} takes no part: {error}")
            continue
        found[name] = Contestant(nullcontext, forward, name.partition(":")[0])
    return found


def pyvene(model: Any, ids: Tensor, drawn: Drawn) -> Callable[[], Tensor]:
    """Pyvene's addition of a constant at the output of every block."""
    import pyvene as pv  # pyright: ignore[reportMissingImports]

    wrapped = pv.IntervenableModel(
        [
            {
                "layer": layer,
                "component": "block_output",
                "intervention_type": pv.AdditionIntervention,
                "source_representation": v,
            }
            for layer, v in enumerate(drawn.vectors)
        ],
        model=model,
    )
    return lambda: wrapped({"input_ids": ids, "use_cache": False})[1].logits


def pyreft(model: Any, ids: Tensor, drawn: Drawn) -> Callable[[], Tensor]:
    """Pyreft's LoReFT at the output of every block."""
    import pyreft as pr  # pyright: ignore[reportMissingImports]

    made = []
    for r, w, b in zip(drawn.rotations, drawn.weights, drawn.biases, strict=True):
        edit = pr.LoreftIntervention(
            embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32
        )
        edit.rotate_layer.weight = r.T
        edit.learned_source.weight.data, edit.learned_source.bias.data = w, b
        made.append(edit)
    config = pr.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": edit,
            }
            for layer, edit in enumerate(made)
        ]
    )
    wrapped = pr.get_reft_model(model, config, set_device=False)
    wrapped.eval()
    return lambda: wrapped({"input_ids": ids, "use_cache": False})[1].logits


def check(made: dict[str, Contestant]) -> dict[str, float]:
    """Largest difference of logits to plain hooks.

    Raises:
        SystemExit: If one is wrong: then there is nothing to time.
    """
    logits: dict[str, Tensor] = {}
    for name, contestant in made.items():
        with contestant.steer():
            logits[name] = contestant.forward()
    off: dict[str, float] = {}
    plain = {kind: logits[f"{kind}: plain hooks"] for kind in (VECTOR, LOREFT)}
    plain[UNSTEERED] = logits[UNSTEERED]
    for name, contestant in made.items():
        # Rows that are steered differently: the first is steered as the others are.
        rows = slice(None) if contestant.kind else slice(1)
        kind = contestant.kind or name.partition(":")[0]
        off[name] = float((logits[name] - plain[kind])[rows].abs().max())
        moved = float((logits[name] - logits[UNSTEERED]).abs().max())
        seen = kind == UNSTEERED or moved > 100 * TOLERANCE
        if not (off[name] <= TOLERANCE and seen):
            raise SystemExit(
                f"{name} is wrong, so nothing is timed: logits {off[name]:.2g} from "
                f"plain hooks, {moved:.2g} from unsteered."
            )
    return off


def measure(rounds: int) -> dict[str, Any]:
    """All contestants, in turn, `rounds` times."""
    model = new_model()
    ids = torch.randint(1024, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    made = contestants(model, ids)
    off, order = check(made), random.Random(0)
    entering: list[float] = []
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        names = list(made)
        order.shuffle(names)
        for name in names:
            started = time.thread_time()
            with made[name].steer():
                entered = time.thread_time()
                seconds = turn(made[name].forward)
            if number:  # the first round warms up
                made[name].seconds.append(seconds)
                if name == f"{LOREFT}: equiv":
                    entering.append(entered - started)
    return summary(made, off, entering)


def turn(forward: Callable[[], Tensor]) -> float:
    """Seconds of one forward, once the caches hold what it needs."""
    forward()
    started = time.thread_time()
    for _ in range(FORWARDS):
        forward()
    return (time.thread_time() - started) / FORWARDS


def summary(
    made: dict[str, Contestant], off: dict[str, float], entering: list[float]
) -> dict[str, Any]:
    """Ratios, and where they come from."""
    pairs = zip(made[UNSTEERED].seconds, made[AGAIN].seconds, strict=True)
    unit = [(a + b) / 2 for a, b in pairs]
    fastest = min(*made[UNSTEERED].seconds, *made[AGAIN].seconds)
    rows = {}
    for name, contestant in made.items():
        # Against the other of the two, where it is itself one of them.
        base = {UNSTEERED: AGAIN, AGAIN: UNSTEERED}.get(name)
        against = made[base].seconds if base else unit
        ratios = [t / u for t, u in zip(contestant.seconds, against, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "median": median,
            "quartiles": [low, high],
            "fastest": min(contestant.seconds) / fastest,
            "off": off[name],
        }
    return {
        "unit_seconds": statistics.median(unit),
        "ratios": rows,
        "target": {f"{kind}: equiv": TARGET for kind in (VECTOR, LOREFT)},
        "entering_seconds": statistics.median(entering),
        "setting": {
            "layers": LAYERS,
            "width": WIDTH,
            "batch": [BATCH, SEQ],
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "rounds": len(unit),
            "forwards": FORWARDS,
        },
        "machine": environment(),
    }


def environment() -> dict[str, str]:
    """Processor and versions."""
    versions = {}
    for name in ("torch", "transformers", "pyvene", "pyreft"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": "cpu",
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **versions,
        "torch": torch.__version__,
    }


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    table = RichTable(box=None)
    for column in ("", "median", "quartiles", "fastest", "target", "off"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["ratios"].items():
        low, high = row["quartiles"]
        target = result["target"].get(name)
        table.add_row(
            name,
            f"{row['median']:.3f}",
            f"{low:.3f} – {high:.3f}",
            f"{row['fastest']:.3f}",
            "" if target is None else f"≤ {target}",
            f"{row['off']:.1e}",
        )
    console = Console(width=100, highlight=False)
    console.print(
        f"Unit: one unsteered forward, {1e3 * result['unit_seconds']:.1f} ms; entering "
        f"`equiv.steer` once: {1e3 * result['entering_seconds']:.2f} ms"
    )
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        result = measure(arguments.rounds)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
