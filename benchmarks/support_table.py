"""Which families are supported, each cell measured on a small random model in float64.

    python -m benchmarks.support_table [--family NAME ...] [--json FILE] [--md FILE]

For every family, with an update of every parameter, against forwards of W + tΔW that
use neither the library's table of sites nor its engine:

- sites: how many the family has, and how far what is captured there is from what a
  plain hook sees;
- derivative: how far the first-order shift is from a central difference, worst site;
- order, midpoint: in the size of the update, of what the first-order shift misses from
  the base and from the midpoint, worst site; 2 and 3 where it is the derivative;
- superposition: how far the sum of what each block adds to the output's first-order
  shift is from the whole;
- probe: by how much vectors miss the place where they should land, relative to the
  stream, the worst of every claim of `equiv.model.probe`;
- steer: the same of a vector added by `equiv.steer` at each site;
- generate: tokens generated under steering with a cache are those without.

All differences are relative.
"""

import argparse
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equiv
from benchmarks.support_witness import (
    Key,
    Places,
    at_scale,
    central_difference,
    places_of,
)
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.inputs import from_inputs
from equiv.model.probe import landings
from equiv.model.sites import FLOW
from equiv.model.stages import staged
from equiv.shift.superposition import superposition
from equiv.steering.forms.vector import Vector
from equiv.testing.models import EVERY_FAMILY, example, transformer

RELATIVE_NORM = 0.02  # of the update, to the weights
SCALES = (1 / 16, 1 / 32)  # small enough for the next term of the series to be alone
# What DeBERTa hands to every block beside the stream; an update of it is refused.
BESIDE = ("deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm")
STEP = 1 / 64  # of the central difference: 1e-4 of the weights to the fourth power


@dataclass(frozen=True)
class Row:
    """What was measured of one family; see the module."""

    family: str
    sites: tuple[str, ...]
    captured: float
    derivative: float
    order: float
    midpoint: float
    superposition: float
    probe: float
    steer: float
    generate: bool | None

    @property
    def green(self) -> bool:
        """Whether every cell is as it should be."""
        return (
            max(self.captured, self.superposition, self.probe, self.steer) < 1e-11
            and self.derivative < 1e-6
            and abs(self.order - 2) < 0.1
            and abs(self.midpoint - 3) < 0.1
            and self.generate is not False
        )


class Family:
    """One family's small model, its update and its inputs.

    Args:
        family: One of `EVERY_FAMILY`.
        seed: Draws the weights, the update and the inputs.
        relative_norm: Of the update, to the weights.
        **config: Settings of the model's configuration class.
    """

    def __init__(
        self,
        family: str,
        seed: int = 0,
        relative_norm: float = RELATIVE_NORM,
        **config: Any,
    ) -> None:
        self.family = family
        self.model = transformer(family, seed=seed, **config)
        self.places = places_of(family, self.model.config)
        self.call = example(self.model, seed=seed)
        drawn = equiv.Update.random(self.model, relative_norm, seed=seed)
        self.deltas = {
            name: delta if isinstance(delta, Tensor) else delta.dense()
            for name, delta in drawn.deltas.items()
            if not name.startswith(BESIDE)
        }
        self.update = equiv.Update.from_dict(self.deltas)
        blocks = find_blocks(self.model)
        assert blocks is not None
        self.blocks = blocks
        self.sites = tuple(
            site
            for site in FLOW
            if all(site in blocks.sites_of(i) for i in blocks.layers_with(site))
        )

    def row(self) -> Row:
        """Everything about it."""
        captured, derivative, orders, midpoints = self.calculus()
        with measured(self.model):
            batches = from_inputs(self.model, self.call)
            with staged(self.model, batches, torch.float64) as cut:
                summed = superposition(cut, self.update)[0].relative_difference
                landed = max(landing.error for landing in landings(cut))
        return Row(
            self.family,
            self.sites,
            captured,
            derivative,
            min(orders, key=lambda order: -abs(order - 2)),
            min(midpoints, key=lambda order: -abs(order - 3)),
            math.nan if summed is None else summed,
            landed,
            max(self.steered()),
            self.generates(),
        )

    def at(self, t: float) -> dict[Key, Tensor]:
        """Activations at W + tΔW, by plain hooks."""
        return at_scale(self.model, self.places, self.deltas, self.call, t)

    def shifts(self, t: float) -> Iterator[tuple[Key, Any]]:
        """Shifts of t times the update, by the engine."""
        update = self.update.scaled(t)
        for shift in equiv.shifts(
            self.model, update, self.call, sites=self.sites, dtype=torch.float64
        ):
            yield (shift.layer, shift.site), shift

    def calculus(self) -> tuple[float, float, list[float], list[float]]:
        """Captured and derivative, worst site; orders at the base and the midpoint."""
        base = self.at(0.0)
        slope = central_difference(
            self.model, self.places, self.deltas, self.call, STEP
        )
        captured, derivative = [], []
        missed: dict[float, dict[Key, tuple[float, float]]] = {}
        for t in SCALES:
            moved, missed[t] = self.at(t), {}
            for key, shift in self.shifts(t):
                exact = moved[key] - base[key]
                missed[t][key] = (
                    float((exact - shift.first_order).norm()),
                    float((exact - shift.midpoint).norm()),
                )
                captured.append(_off(shift.base, base[key]))
                derivative.append(_off(shift.first_order / t, slope[key]))
        pairs = [
            (missed[SCALES[0]][key], found) for key, found in missed[SCALES[1]].items()
        ]
        orders = [[math.log2(a[i] / b[i]) for a, b in pairs] for i in (0, 1)]
        return max(captured), max(derivative), orders[0], orders[1]

    def steered(self) -> Iterator[float]:
        """How far a vector at each site is from where it should be, in the stream."""
        base = self.at(0.0)
        for layer in (
            (1,) if self.blocks.encoder is None else (1, self.blocks.first + 1)
        ):
            for site in self.blocks.sites_of(layer):
                yield from self._steered(base, layer, site)

    def _steered(
        self, base: Mapping[Key, Tensor], layer: int, site: str
    ) -> Iterator[float]:
        known = (layer, site) if (layer, site) in base else (layer, "block_out")
        width = base[known].shape[-1]
        v = torch.randn(width, generator=torch.Generator().manual_seed(1)).double()
        with equiv.steer(self.model, {(layer, site): Vector(v)}):
            found = self.at(0.0)
        yield _off(found[0, "block_out"], base[0, "block_out"])
        yield from self._landed(base, found, site, v, layer)

    def _landed(
        self,
        base: Mapping[Key, Tensor],
        found: Mapping[Key, Tensor],
        site: str,
        v: Tensor,
        layer: int,
    ) -> Iterator[float]:
        def moved(name: str) -> Tensor:
            return found[layer, name] - base[layer, name]

        size = base[layer, "block_out"].norm()
        through = {"attn_out", "cross_out", "resid_mid", "mlp_out"}
        if site == "block_out":
            yield float((moved("block_out") - v).norm() / size)
        elif site in through and self.blocks.architecture.plain_add:
            # What is added to the stream, beside what later sub-layers make of it.
            mlp = moved("mlp_out")
            arrived = moved("block_out") - mlp
            if site == "attn_out" and (layer, "cross_out") in base:
                arrived = arrived - moved("cross_out")
            if site == "mlp_out" and self._sees_steered(layer, site):
                arrived = arrived + mlp
            yield float((arrived - v).norm() / size)
        else:
            yield float(not bool(moved("block_out").norm() > 0))

    def _sees_steered(self, layer: int, site: str) -> bool:
        """Whether the plain hook, added later, is on the module that is steered."""
        own = self.blocks.known(layer).places[site]
        encodes = layer < self.blocks.first
        places = (self.places.encoder if encodes else None) or self.places
        return (own[0], own[1]) == _side(places, site)

    def generates(self) -> bool | None:
        """Whether steering with a cache gives the tokens it gives without."""
        if not self.model.can_generate():
            return None
        width = self.model.get_input_embeddings().embedding_dim
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(2))
        v = Vector(3 * drawn)
        call = {**self.call, "max_new_tokens": 5, "do_sample": False}
        if "input_ids" in call:
            call["attention_mask"] = torch.ones_like(call["input_ids"])
        layers = dict.fromkeys((0, self.blocks.first))
        with equiv.steer(self.model, {(layer, "block_out"): v for layer in layers}):
            cached = self.model.generate(**call, pad_token_id=0, eos_token_id=None)
            plain = self.model.generate(
                **call, pad_token_id=0, eos_token_id=None, use_cache=False
            )
        return bool(torch.equal(cached, plain))


def _side(places: Places, site: str) -> tuple[str, str]:
    path = places.sites[site]
    return path.rstrip("<"), "input" if path.endswith("<") else "output"


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def markdown(rows: Iterable[Row]) -> str:
    """The table of the README."""
    lines = [
        "| family | sites | captured | derivative | order | midpoint | superposition "
        "| probe | steer | generate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens = {True: "same tokens", False: "**differs**", None: "–"}[row.generate]
        cells = (
            row.family if row.green else f"**{row.family}**",
            str(len(row.sites)),
            f"{row.captured:.0e}",
            f"{row.derivative:.0e}",
            f"{row.order:.2f}",
            f"{row.midpoint:.2f}",
            f"{row.superposition:.0e}",
            f"{row.probe:.0e}",
            f"{row.steer:.0e}",
            tokens,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="*", default=sorted(EVERY_FAMILY))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    chosen = parser.parse_args()
    rows = [Family(family).row() for family in chosen.family]
    table = markdown(rows)
    print(table)
    print(f"{sum(row.green for row in rows)} of {len(rows)} families green")
    if chosen.json:
        content = {
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "rows": [{**asdict(row), "green": row.green} for row in rows],
        }
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    if chosen.md:
        chosen.md.write_text(table)
    if not all(row.green for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
