"""Steering, LoRA, both and all weights, trained alike on one task over several seeds.

The base knows MAX, MIN and MED. The task is all five operators evenly, with the
meanings of MAX and MIN exchanged: something to relabel, and LAST and RNG to learn.
Every method takes the same steps on the same expressions of its seed; its learning rate
is the best of three on a base and expressions of a seed of their own.

Losses are cross-entropies of the answers of held-out expressions, in nats.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from equiv.tasks.listops import Example, evaluate, generate
from equiv.theory.trained.adapting import (
    Adapted,
    Asked,
    Method,
    adapt,
    asked,
    by_rate,
    overlaps,
    scores,
    unsteered,
)
from equiv.theory.trained.gradient_step import gradient_step
from equiv.theory.trained.joining import joined
from equiv.theory.trained.linearised import kl_to, linearised
from equiv.theory.trained.nets import EVENLY, OLD, Recipe, base_of
from equiv.theory.trained.study import study
from equiv.theory.values import Value

RANK = 4  # of steering and of LoRA
SWEEP = 99  # the seed on which rates are chosen; none that is reported
EXCHANGED = {"[MAX": "[MIN", "[MIN": "[MAX"}
# The largest learning rates of the cycle, three for every method, by what is trained.
FULL_RATES = (1e-3, 3e-3, 1e-2)
LARGE_RATES = (3e-3, 1e-2, 3e-2)  # LoRA, and steering of its size
SMALL_RATES = (1e-2, 3e-2, 1e-1)  # maps of rank `RANK`
VECTOR_RATES = (3e-2, 1e-1, 3e-1)

# What has a figure for every seed.
TABLES = ("loss", "accuracy", "kl", "gradient step", "overlap")

CROSSED = {
    f"{form} {site} {positions}": Method(form, site, RANK, positions)
    for form in ("linear", "loreft")
    for site in ("mlp_out", "block_out")
    for positions in ("all", "last")
}
JOINT = {
    f"joint {constraint}": Method("linear", rank=RANK, lora=RANK, constraint=constraint)
    for constraint in ("none", "output", "input")
}
# At width 64 a joint method trains 22,528 numbers. LoRA and steering alone get as many
# or more: ranks 5 (25,600) and 44 (22,528).
METHODS: Mapping[str, Method] = {
    **CROSSED,
    "silu block_out all": Method("silu", rank=RANK),
    "vector block_out all": Method("vector"),
    "heads attn_heads all": Method("heads", "attn_heads"),
    "all weights": Method(full=True),
    "LoRA": Method(lora=RANK),
    **JOINT,
    "LoRA, joint's size": Method(lora=5),
    "linear, joint's size": Method("linear", rank=44),
    "silu, joint's size": Method("silu", rank=44),
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured; the shipped results come from the defaults."""

    recipe: Recipe = field(default_factory=Recipe)
    steps: int = 120
    batch: int = 32
    validation: int = 2000
    held_out: int = 1000
    fitted: int = 20  # batches that the linear oracle is regressed on
    contrasts: int = 250  # expressions for each side of the gradient step


@study("adapting", minutes=19)
def adapting(seeds: Sequence[int]) -> Mapping[str, Value]:
    """What the claims about methods of adapting read."""
    return measured(seeds, Sizes())


def measured(seeds: Sequence[int], sizes: Sizes) -> Mapping[str, Value]:
    """Rates first, then every seed."""
    tried = rates(sizes)
    return gathered(tried, [of_seed(seed, tried, sizes) for seed in seeds], sizes)


def rates(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Method → rate, as text → validation loss."""
    base = base_of(SWEEP, sizes.recipe)
    data, validation = expressions(SWEEP, sizes), for_rates(SWEEP, sizes.validation)
    tried = {}
    for name, method in METHODS.items():
        losses = by_rate(base, method, data, validation, choices(method), SWEEP)
        tried[name] = {str(rate): found for rate, found in losses.items()}
    return tried


def choices(method: Method) -> tuple[float, ...]:
    """Rates that are tried, three for every method."""
    if method.full:
        return FULL_RATES
    if method.form in ("vector", "heads"):
        return VECTOR_RATES
    return LARGE_RATES if method.lora or method.rank > RANK else SMALL_RATES


def of_seed(
    seed: int, tried: Mapping[str, Mapping[str, float]], sizes: Sizes
) -> dict[str, Value]:
    """Everything that is measured of one seed."""
    base = base_of(seed, sizes.recipe)
    data, test = expressions(seed, sizes), held_out(seed, sizes.held_out)
    trained = {
        name: adapt(base, method, data, rate=best(tried[name]), seed=seed)
        for name, method in METHODS.items()
    }
    scored = {
        name: scores(one, test)
        for name, one in {"base": unsteered(base), **trained}.items()
    }
    return {
        "loss": {name: found["loss"] for name, found in scored.items()},
        "accuracy": {name: found["accuracy"] for name, found in scored.items()},
        "parameters": {name: one.parameters for name, one in trained.items()},
        "overlap": {name: overlaps(trained[name]) for name in JOINT},
        "kl": divergences(base, trained, data[: sizes.fitted], test),
        "gradient step": gradient_step(base, OLD, sizes.contrasts, 10 * seed + 8),
    }


def divergences(
    base: Any,
    trained: Mapping[str, Adapted],
    data: Sequence[Asked],
    test: Asked,
) -> dict[str, float]:
    """KL(all weights ‖ ·) at the answers, of what claim 26 compares."""
    tuned = trained["all weights"]
    others = {"base": unsteered(base)}
    others |= {name: trained[name] for name in trained if name.endswith("out all")}
    for rank, name in ((None, "full rank"), (RANK, f"rank {RANK}")):
        found = linearised(base, tuned.model, data, rank)
        others |= {f"oracle {order}, {name}": one for order, one in found.items()}
    wanted = test.answers(tuned.logits(test))
    return {name: kl_to(wanted, one, test) for name, one in others.items()}


def gathered(
    tried: Mapping[str, Mapping[str, float]],
    found: Sequence[Mapping[str, Value]],
    sizes: Sizes,
) -> dict[str, Value]:
    """One table per quantity, lists in the order of the seeds."""
    return {
        "sizes": {
            "width": sizes.recipe.width,
            "rank": RANK,
            "steps": sizes.steps,
            "batch": sizes.batch,
            "held out": sizes.held_out,
        },
        "validation loss by rate": {name: dict(own) for name, own in tried.items()},
        "parameters": found[0]["parameters"],
        **joined([{table: one[table] for table in TABLES} for one in found]),
    }


def best(losses: Mapping[str, float]) -> float:
    """The rate with the least validation loss."""
    return float(min(losses, key=lambda rate: losses[rate]))


def expressions(seed: int, sizes: Sizes) -> list[Asked]:
    """What every method of a seed is trained on."""
    source = exchanged(generate(EVENLY, 10 * seed + 5))
    return [asked(islice(source, sizes.batch)) for _ in range(sizes.steps)]


def held_out(seed: int, count: int) -> Asked:
    """What methods are measured on."""
    return asked(
        islice(exchanged(generate(EVENLY, 10 * seed + 6, held_out=True)), count)
    )


def for_rates(seed: int, count: int) -> Asked:
    """What rates are chosen on: of the part that is not held out."""
    return asked(islice(exchanged(generate(EVENLY, 10 * seed + 6)), count))


def exchanged(examples: Iterable[Example]) -> Iterator[Example]:
    """Expressions with the values they have when MAX means MIN and MIN means MAX.

    Example:
        >>> next(exchanged([evaluate("[MAX 3 [MIN 4 5 ] ]")])).values
        (None, None, None, None, None, 5, 3)
    """
    for example in examples:
        words = [EXCHANGED.get(token, token) for token in example.tokens]
        yield Example(example.tokens, evaluate(" ".join(words)).values)
