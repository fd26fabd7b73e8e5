"""Claim 49: how much of each layer's update was applied, from outputs alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from equiv.gate.diagnosing import part_of
from equiv.gate.outputs import (
    as_batches,
    centred,
    rows_of,
    stored,
    vocabulary_of,
)
from equiv.gate.sides import Side
from equiv.model.batches import at_most
from equiv.model.guard import measured
from equiv.model.stages import StagedModel, staged
from equiv.report.numbers import figure
from equiv.steering.weights.deltas import as_dense
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.values import ClaimResult, Value, Verdict
from equiv.update.adapters import clean
from equiv.update.low_rank import LowRank
from equiv.update.update import Update

TOKENS = 192
# What went wrong in one layer → its share of the update.
FAULTS = {"skipped": 0.0, "scaled by 15/16": 15 / 16, "flipped": -1.0}
# What least squares once has to tell; 15/16 is nearer to 1 than its error.
AT_ONCE = ("skipped", "flipped")
# How often the least squares are repeated about the c found: each leaves that share of
# the error by which the slopes differ there from those at ½.
REPEATED = 6
# Storage in bfloat16 leaves a few thousandths of the update in the outputs; shifts
# that are so nearly dependent would blow it up to the shares themselves.
DEPENDENT = 1e3


@claim(
    49,
    title="outputs alone tell how much of each layer's update was applied",
    formula=(
        "c = ½ + J⁺ (z − z(½)), J_l = ∂z/∂c_l at W + ΔW/2; then c ← c + J⁺ (z − z(c))"
    ),
    assumptions="the layers' midpoint shifts J_l are independent over the inputs",
    source="this project",
    falsified_by="a fault whose share is no nearer to the fault's than to 1",
    derivation="""
        z(c), the outputs with the share c_l of every layer's update, is smooth in c; at
        c = ½ its derivatives are the layers' midpoint shifts. Between 0 and 1 their
        linear combination is right to third order, so that least squares on the
        outputs has the c that was applied as its answer, up to that and to rounding:
        enough to tell a layer that was skipped or flipped. The same about the c found,
        with the slopes as they are, takes the error down further, to rounding.

        If some combination of the J_l is zero on these inputs, c is not determined
        along it. The condition number of the J_l, each scaled to length one, says so.

        `equiv.diagnose` takes the slopes anew in every step, and has standard errors.
    """,
)
def shares_from_outputs(setting: Setting) -> ClaimResult:
    """Right and wrong merges, stored and run in bfloat16, told from their outputs."""
    parts = parts_of(setting.update)
    model, update = setting.model, setting.update
    few = at_most(setting.inputs, TOKENS, setting.seed)
    groups = rows_of(few, vocabulary_of(model))
    with measured(model), staged(model, as_batches(groups), torch.float64) as cut:
        outputs = Outputs(cut, update, parts)
        slopes = outputs.slopes([0.5] * len(parts))
        condition = condition_of(slopes)
        if not condition < DEPENDENT:
            return ClaimResult(
                Verdict.INCONCLUSIVE,
                "the layers' midpoint shifts are dependent on these inputs, condition "
                f"number {figure(condition, 2)}: shares are not identifiable",
                {"condition number": condition},
            )
        cases = []
        for fault, part, applied in merges(len(parts)):
            side = Side("merged", model, scaled(update, parts, applied))
            seen = flat(stored(side, groups, torch.bfloat16))
            cases.append(Case(fault, part, *solved(outputs, slopes, seen)))
    return judge(cases, list(parts), condition)


@dataclass(frozen=True)
class Case:
    """A merge: its fault, in which part, and the shares found, once and repeated."""

    fault: str
    part: int
    once: list[float]
    repeated: list[float]


def merges(count: int) -> Iterator[tuple[str, int, list[float]]]:
    """(fault, part, share of each part): a right merge, and faults at both ends."""
    yield "right", -1, [1.0] * count
    for fault, share in FAULTS.items():
        for part in sorted({0, count - 1}):
            yield fault, part, [share if i == part else 1.0 for i in range(count)]


def solved(
    outputs: "Outputs", slopes: Tensor, seen: Tensor
) -> tuple[list[float], list[float]]:
    """C by least squares from the midpoint, and by the same repeated."""
    c = torch.full((slopes.shape[1],), 0.5, dtype=torch.float64)
    found = []
    for _ in range(1 + REPEATED):
        left = seen - outputs.at(c.tolist())
        c = c + least_squares(slopes, left)
        found.append(c.tolist())
    return found[0], found[-1]


def least_squares(slopes: Tensor, left: Tensor) -> Tensor:
    """J⁺ of what is left, [parts]."""
    sizes = slopes.norm(dim=0)
    found = torch.linalg.lstsq(slopes / sizes, left[:, None]).solution
    return found[:, 0] / sizes


def judge(cases: Sequence[Case], names: list[str], condition: float) -> ClaimResult:
    """Whether every fault is nearer to what it is than to a right merge."""
    right = [x for case in cases for i, x in enumerate(case.repeated) if i != case.part]
    spread = max(abs(share - 1) for share in right)
    once = {f: [c.once[c.part] for c in cases if c.fault == f] for f in FAULTS}
    last = {f: [c.repeated[c.part] for c in cases if c.fault == f] for f in FAULTS}
    conditions: dict[str, Value] = {"condition number": condition}
    told = ", ".join(f"{fault} {spanned(own)}" for fault, own in last.items())
    says = f"a right layer's share is {spanned(right)}, {told}"
    lost = [f for f in FAULTS if not apart(last[f], FAULTS[f])]
    late = [f for f in AT_ONCE if not apart(once[f], FAULTS[f])]
    if set(lost) & set(AT_ONCE):
        verdict = Verdict.FAILS
        says = f"{' and '.join(lost)} not told from a right merge: {says}"
    else:
        verdict = Verdict.CONDITIONAL
        if lost or spread >= (1 - FAULTS["scaled by 15/16"]) / 2:
            conditions["15/16 is not told"] = spread
        if late:
            conditions["told only when repeated"] = late
    return ClaimResult(
        verdict,
        says,
        conditions,
        {
            "shares by fault, repeated": last,
            "shares by fault, once": once,
            "largest error of a right layer": spread,
            "separation: distance from 1 in units of that error": {
                fault: min(abs(x - 1) for x in own) / spread
                for fault, own in last.items()
            },
            "faulty parts": sorted({names[c.part] for c in cases if c.part >= 0}),
            "condition number": condition,
        },
    )


def apart(found: Sequence[float], share: float) -> bool:
    """Whether all are nearer to the fault's share than to 1."""
    return all(abs(x - share) < abs(x - 1) for x in found)


def spanned(shares: Sequence[float]) -> str:
    """The least and the largest."""
    ends = (f"{end(shares):.2f}".replace("-0.00", "0.00") for end in (min, max))
    return " to ".join(dict.fromkeys(ends)).replace("-", "−")


class Outputs:
    """The model's outputs by the share of each part of an update, in float64."""

    def __init__(
        self, cut: StagedModel, update: Update, parts: Mapping[str, Sequence[str]]
    ) -> None:
        self._cut = cut
        self._deltas = {n: as_dense(delta) for n, delta in update.deltas.items()}
        self._part = {n: i for i, names in enumerate(parts.values()) for n in names}

    def at(self, shares: Sequence[Tensor | float]) -> Tensor:
        """All outputs in one row, each token's less their mean."""
        moved = {n: shares[self._part[n]] * d for n, d in self._deltas.items()}
        return flat([run(self._cut, moved, i) for i in range(len(self._cut.batches))])

    def slopes(self, shares: Sequence[float]) -> Tensor:
        """J, [outputs, parts], by one `jvp` for every part."""
        return torch.stack([self._slope(shares, i) for i in range(len(shares))], 1)

    def _slope(self, shares: Sequence[float], part: int) -> Tensor:
        def outputs(step: Tensor) -> Tensor:
            return self.at([c + step * (i == part) for i, c in enumerate(shares)])

        zero = torch.zeros((), dtype=torch.float64)
        return jvp(outputs, (zero,), (torch.ones_like(zero),))[1]


def condition_of(slopes: Tensor) -> float:
    """Of columns scaled to length one; infinite where a part moves nothing."""
    sizes = slopes.norm(dim=0)
    if not bool(sizes.all()):
        return float("inf")
    return float(torch.linalg.cond(slopes / sizes))


def run(cut: StagedModel, moved: Mapping[str, Tensor], batch: int) -> Tensor:
    """The output with something added to the weights."""
    hidden = None
    for stage in cut.stages:
        own = cut.tensors(stage)
        tensors = {n: t + moved[n] if n in moved else t for n, t in own.items()}
        hidden, _ = cut.run(stage, tensors, hidden, batch)
    assert hidden is not None
    return hidden


def flat(logits: Sequence[Tensor]) -> Tensor:
    """All logits in one row, each token's less their mean."""
    return torch.cat([centred(part).flatten() for part in logits])


def parts_of(update: Update) -> dict[str, list[str]]:
    """The names of an update's parameters, by layer."""
    parts: dict[str, list[str]] = {}
    for name in update.deltas:
        parts.setdefault(part_of(clean(name)), []).append(name)
    return parts


def scaled(
    update: Update, parts: Mapping[str, Sequence[str]], shares: Sequence[float]
) -> Update:
    """The update with a share of each part."""
    deltas = {}
    for names, share in zip(parts.values(), shares, strict=True):
        for name in names:
            delta = update.deltas[name]
            low = isinstance(delta, LowRank)
            deltas[name] = delta.scaled(share) if low else delta.double() * share
    return Update(deltas, update.base_norms, update.source)
