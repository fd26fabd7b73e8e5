"""Whether the derivative is that of what the model computes, on a few tokens.

Some operations have a rule that is wrong, or none and say nothing: a custom operation
whose tangent is zero, a `detach`, a `no_grad`. At every site of every stage the shift
by forward mode is compared with a central difference along the update, token by token.
A token tells against a derivative if the two differ by more than a share that no
smooth model's difference is off by, and the model is straight there: the differences
ahead and behind agree, and those of a smaller step. Where many tokens do, the innermost
module that they tell against is named.

What is wrong by less is found by the Taylor test, whose order is then 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiv.errors import ForwardModeError
from equiv.model.batches import Batch, at_most
from equiv.model.sites import Sites, activation_of
from equiv.model.stages import Stage, StagedModel, staged
from equiv.shift.blame import silent
from equiv.shift.derivative import derived
from equiv.shift.differences import step_of
from equiv.shift.measures import counted
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import StageUpdate
from equiv.shift.traces import Point, Trace
from equiv.update.update import Update

TOKENS = 32
# By how much of the shift at a token the two may differ. A difference's own error is
# below a thousandth even in float32; a rule off by less is for the Taylor test.
TOLERANCE = 0.05
# Of the tokens that move, how many must tell against a derivative: a routing decision
# or a kink may spoil one or two.
MANY = 0.1
# Roundings in an activation, in units of the precision: its difference has them too.
ROUNDINGS = 100.0


# A second, smaller step, that a suspicion has to stand too.
FINER = 1 / 8


@dataclass(frozen=True)
class Slopes:
    """An activation at one site, its claimed derivative, and differences of it.

    All are [tokens, features]; `ahead` and `behind` one per step.
    """

    base: Tensor
    claimed: Tensor
    steps: Sequence[float]
    ahead: Sequence[Tensor]
    behind: Sequence[Tensor]

    def off(self) -> float | None:
        """How far the claim is off, as a share of the shift; `None` if it is right."""
        central = [(a + b) / 2 for a, b in zip(self.ahead, self.behind, strict=True)]
        eps = torch.finfo(self.base.dtype).eps
        floor = ROUNDINGS * eps / self.steps[-1] * _norms(self.base)
        shift = _norms(central[-1])
        size = torch.maximum(_norms(self.claimed), shift)
        gap = _norms(self.claimed - central[-1])
        wrong = (size > floor) & (gap > TOLERANCE * size + floor)
        for at, ahead, behind in zip(central, self.ahead, self.behind, strict=True):
            # A kink or a jump, or a bend within the step: no difference is right here.
            # What is claimed may be far larger than they are, and is no measure.
            wrong &= _norms(ahead - behind) <= TOLERANCE * shift + floor
            wrong &= _norms(at - central[-1]) <= TOLERANCE * shift + floor
        if int(wrong.sum()) <= MANY * int((size > floor).sum()):
            return None
        return float(gap[wrong].norm() / size[wrong].norm())


def check_derivative(
    model: nn.Module,
    update: Update,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    low: Sequence[str],
) -> None:
    """Refuse a model whose derivative is not that of what it computes.

    Args:
        model: The model, ready to be measured.
        update: An update that fits it.
        batches: Inputs, of which a few tokens are used.
        dtype: Compute dtype.
        low: Names whose low-rank factors are applied beside the weight.

    Raises:
        ForwardModeError: If so, or if an operation has no derivative.
    """
    few = at_most(batches, TOKENS, 0)
    with staged(model, few, dtype, low_names=low) as cut:
        step = step_of(update, model, dtype)
        if _found(cut, update, low, (step,)) is not None:
            certain = _found(cut, update, low, (step, step * FINER))
            if certain is not None:
                raise certain


def _found(
    cut: StagedModel, update: Update, low: Sequence[str], steps: Sequence[float]
) -> ForwardModeError | None:
    """The error for the first stage whose derivative is wrong, by these steps."""
    beside = [Point(sign * step) for step in steps for sign in (1, -1)]
    points = (Point(0.0, True), *beside)
    below: dict[int, Trace] = {}
    for stage, tensors, traces in propagate(cut, update, points, low=low):
        for trace in traces:
            off = _first_off(cut, trace, steps)
            if off is not None:
                beneath = below.get(trace.batch)
                alone = _Stage(cut, stage, tensors, update, beneath, steps)
                return _named(alone, trace, off)
            below[trace.batch] = trace
    return None


def _first_off(cut: StagedModel, trace: Trace, steps: Sequence[float]) -> float | None:
    """How far the first site of a stage is off whose derivative is wrong."""
    if not trace.moved:
        return None
    tangents = trace.tangents[0.0]
    values = {scale: trace.values[scale] for scale in trace.values}
    sites = dict.fromkeys((*trace.stage.sites, trace.stage.output))
    found = (
        _slopes(values, tangents, site, _mask(cut, trace, tangents[site]), steps).off()
        for site in sites
    )
    return next((off for off in found if off is not None), None)


def _mask(cut: StagedModel, trace: Trace, x: Tensor) -> Tensor:
    """The tokens that count among those of an activation: of either stack, or both."""
    own, source = cut.mask(trace.stage, trace.batch), cut.batches[trace.batch].source
    if source is not None and x.shape[:2] != own.shape:
        both = torch.cat([source, own], dim=1)
        return both if x.shape[:2] == both.shape else source
    return own


def _slopes(
    values: Mapping[float, Sites],
    tangents: Sites,
    site: str,
    mask: Tensor,
    steps: Sequence[float],
) -> Slopes:
    """Slopes at one site, from values at 0 and at ± every step."""
    base = values[0.0][site]
    ahead = [(values[step][site] - base) / step for step in steps]
    behind = [(base - values[-step][site]) / step for step in steps]

    def rows(x: Tensor) -> Tensor:
        return counted(x, mask)

    return Slopes(
        rows(base),
        rows(tangents[site]),
        steps,
        [rows(x) for x in ahead],
        [rows(x) for x in behind],
    )


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


class _Stage:
    """One stage run alone, with the outputs of every module in it."""

    def __init__(
        self,
        cut: StagedModel,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        update: Update,
        below: Trace | None,
        steps: Sequence[float],
    ) -> None:
        self.cut, self.stage, self.tensors, self.steps = cut, stage, tensors, steps
        self.change = StageUpdate(cut, stage, update, set()).dense
        self.below = below
        self.noted = cut.notebooks(stage, dict(tensors))

    def outputs(self, trace: Trace) -> Iterator[tuple[str, Slopes]]:
        """(module, its slopes) in the order in which calls end, inner ones first."""
        batch = trace.batch
        hidden, coming = self._arriving()
        at = {name: self.tensors[name] for name in self.change}

        def run(x: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Sites:
            tensors = {**self.tensors, **own}
            with _recorded(self.cut.model) as seen:
                self.cut.run(self.stage, tensors, x.get("h"), batch)
            return dict(seen)

        still = {name: torch.zeros_like(value) for name, value in self.noted.items()}
        primals = (hidden, {**at, **self.noted})
        along = (coming, {**self.change, **still})
        base, claimed = derived(run, primals, along)
        values = {0.0: base}
        for t in (sign * step for step in self.steps for sign in (1, -1)):
            moved = (_moved(x, v, t) for x, v in zip(primals, along, strict=True))
            values[t] = run(*moved)
        for name in base:
            mask = _mask(self.cut, trace, base[name])
            yield name, _slopes(values, claimed, name, mask, self.steps)

    def _arriving(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What comes from below and its derivative, as "h", if anything does."""
        if self.below is None:
            return {}, {}
        site = self.below.stage.output
        h = self.below.values[0.0][site]
        moved = self.below.moved
        dh = self.below.tangents[0.0][site] if moved else torch.zeros_like(h)
        return {"h": h}, {"h": dh}


def _moved(
    at: Mapping[str, Tensor], along: Mapping[str, Tensor], t: float
) -> dict[str, Tensor]:
    return {name: torch.add(x, along[name], alpha=t) for name, x in at.items()}


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every call of a module returns, where that is one activation."""
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def note(module: nn.Module, _arguments: object, out: object) -> None:
            found = activation_of(out)
            if found is not None:
                seen[f"`{name}` ({type(module).__name__}), call {len(seen)}"] = (
                    found.clone()  # an operation in place may come next
                )

        return note

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(hook_of(name))
                stack.callback(handle.remove)
        yield seen


def _named(stage: _Stage, trace: Trace, off: float) -> ForwardModeError:
    """The error that names the innermost module that is wrong."""
    for name, slopes in stage.outputs(trace):
        found = slopes.off()
        if found is not None:
            return silent(name.rpartition(",")[0], found)
    kind = trace.stage.name
    where = f"block {trace.stage.layer}" if kind == "block" else f"the {kind}"
    return silent(f"{where} of {type(stage.cut.model).__name__}", off)
