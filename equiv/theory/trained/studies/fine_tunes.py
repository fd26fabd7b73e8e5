"""The study `fine_tunes`: what two fine-tunes of each seed's net do to its activations.

Measured on held-out expressions, for an update of all weights, for a LoRA, for a random
update of the norms of either (`control`), and for the W_d of the former alone. Results
are nested by what they are of; innermost stands one value per layer, in a list with one
entry per seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from equiv.shift.activations import Shift, shifts
from equiv.theory.trained.controls import CONTROLS, NORM
from equiv.theory.trained.gains import gains
from equiv.theory.trained.joining import joined
from equiv.theory.trained.nets import Nets, held_out, nets
from equiv.theory.trained.oracle_shape import coverage, directions, participation
from equiv.theory.trained.output_changes import OutputChange, output_changes
from equiv.theory.trained.readings import READS, misfit, truncated
from equiv.theory.trained.study import study
from equiv.theory.values import Value
from equiv.update.update import Update

SITES = ("attn_out", "resid_mid", "mlp_in", "mlp_out", "block_out")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are what the shipped results come from.

    Attributes:
        sequences: For shifts and fits.
        few: For gains and changes of the output, and for fits by a descent.
        ranks: Of the affine fits; `None` for full rank.
        mlp_rank: Of the low-rank MLP, and of what it is held against.
    """

    sequences: int = 768
    few: int = 128
    ranks: tuple[int | None, ...] = (1, 8, None)
    mlp_rank: int = 8


@study("fine_tunes", minutes=25)
def fine_tunes(seeds: Sequence[int]) -> Mapping[str, Value]:
    """The results that claims 17, 21, 24, 27, 29, 42 and 47 read."""
    return joined([of_nets(nets(seed)) for seed in seeds])


def of_nets(made: Nets, sizes: Sizes = Sizes()) -> dict[str, Value]:
    """What is measured of the nets of one seed."""
    updates = {
        "all weights": Update.between(made.base, made.full),
        "LoRA": Update.from_peft(made.lora, made.base),
    }
    down = updates["all weights"].restricted(names="*.down_proj.weight")
    measured = {
        name: _of_update(made, update, sizes) for name, update in updates.items()
    }
    return {
        "accuracy": made.accuracy,
        "relative norm": {n: u.relative_norm(made.base) for n, u in updates.items()},
        "width": made.base.config.hidden_size,
        **{
            key: {name: found[key] for name, found in measured.items()}
            for key in measured["LoRA"]
        },
        "misfit of W_d alone": _misfits(_shifts(made, down, sizes.sequences), sizes),
        "gain": _gains(made, sizes),
    }


def _of_update(made: Nets, update: Update, sizes: Sizes) -> dict[str, Value]:
    found = {"update": _shifts(made, update, sizes.sequences)}
    drawn = {name: draw(update, made.seed) for name, draw in CONTROLS.items()}
    for name, control in drawn.items():
        found[name] = _shifts(made, control, sizes.sequences)
    return {
        **_of_shifts(made, update, found["update"], sizes),
        "spread": {
            name: _per_layer(by_key, lambda n, k=by_key: _spread(k, n))
            for name, by_key in found.items()
        },
        "size": {
            name: [_size(by_key, layer) for layer in _layers(by_key)]
            for name, by_key in found.items()
        },
        "control": _of_shifts(made, drawn[NORM], found[NORM], sizes),
    }


Found = Mapping[tuple[int, str], Shift]


def _of_shifts(
    made: Nets, update: Update, found: Found, sizes: Sizes
) -> dict[str, Value]:
    """What is measured of trained and of drawn updates alike."""
    few = _shifts(made, update, 3 * sizes.few)
    return {
        "misfit": _misfits(found, sizes),
        "coverage": {
            "propagated": _per_layer(found, lambda n: coverage(found, n, local=False)),
            "local": _per_layer(found, lambda n: coverage(found, n, local=True)),
        },
        "by form": _by_form(few, sizes.mlp_rank),
        "output": _output(output_changes(made.base, update, held_out(sizes.few))),
    }


def _shifts(made: Nets, update: Update, sequences: int) -> Found:
    found = shifts(
        made.base, update, held_out(sequences), sites=SITES, dtype=torch.float64
    )
    return {(shift.layer, shift.site): shift for shift in found}


def _layers(found: Found) -> range:
    return range(1 + max(layer for layer, _ in found))


def _per_layer(found: Found, figures: Any) -> dict[str, list[float]]:
    """A mapping of figures for each layer, as a mapping of lists over layers."""
    rows = [figures(layer) for layer in _layers(found)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _misfits(found: Found, sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Site read → rank → what is left, per layer."""
    return {
        site: {
            str(rank or "full"): [
                misfit(found, layer, site, rank) for layer in _layers(found)
            ]
            for rank in sizes.ranks
        }
        for site in READS
    }


def _by_form(found: Found, rank: int) -> dict[str, list[float]]:
    """What forms of one rank leave of the block's shift when they read it."""
    layers = _layers(found)
    return {
        "affine": [misfit(found, n, "block_out", rank) for n in layers],
        "SiLU": [misfit(found, n, "block_out", rank, "mlp") for n in layers],
        "truncated oracle": [truncated(found, n, rank) for n in layers],
    }


def _spread(found: Found, layer: int) -> dict[str, float]:
    delta = _delta(found, layer)
    return {"participation": participation(delta), "k90": directions(delta)}


def _size(found: Found, layer: int) -> float:
    return float(_delta(found, layer).norm())


def _delta(found: Found, layer: int) -> Tensor:
    shift = found[layer, "block_out"]
    return shift.exact[shift.mask]


def _gains(made: Nets, sizes: Sizes) -> dict[str, list[float]]:
    """Per layer: means over tokens, and correlations of logarithms with −log ρ."""
    found = gains(made.base, held_out(sizes.few), made.seed)
    logs = [{k: v.log() for k, v in vars(gain).items()} for gain in found]
    return {
        "rho": [float(log["rho"].mean().exp()) for log in logs],
        "gain": [float(log["gain"].mean().exp()) for log in logs],
        "excess": [float(log["excess"].mean().exp()) for log in logs],
        "gain with 1/rho": [_correlation(log["gain"], -log["rho"]) for log in logs],
        "excess with 1/rho": [_correlation(log["excess"], -log["rho"]) for log in logs],
    }


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    return torch.from_numpy(stats.rankdata(values.numpy()))


def _output(found: Mapping[float, OutputChange]) -> dict[str, Value]:
    """Ratios of sums by scale, and how well each figure ranks tokens at full size."""
    whole = found[max(found)]
    ranked = {"exact": whole.exact, "first order": whole.first_order}
    return {
        "scales": list(found),
        "exact over KL": [float(f.exact.sum() / f.kl.sum()) for f in found.values()],
        "first order over KL": [
            float(f.first_order.sum() / f.kl.sum()) for f in found.values()
        ],
        "rank correlation": {
            name: _correlation(_ranks(figure), _ranks(whole.kl))
            for name, figure in {**ranked, "stream": whole.stream}.items()
        },
    }
