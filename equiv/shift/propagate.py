"""One pass over the stages carries base, tangent and tuned activations together.

Symbols
    f(s)        an activation of the model with the update scaled by s
    f′(s)       its derivative with respect to s, by `torch.func.jvp`: the first-order
                shift in direction ΔW, linearised at W + sΔW
    point       a scale s at which f(s), and perhaps f′(s), is wanted

Every point is a stream of its own with input h(s) and tangent h′(s):

    h(s), h′(s) ← jvp(stage, (W + sΔW, h(s)), (ΔW, h′(s)))

so base and first order are the point 0, the midpoint derivative is the point ½, and
the tuned model is the point 1. *Local* values hold the stage's input at the base:
g(s) = stage(W + sΔW, h(0)), g′(s) = its derivative in W alone.

Below the first stage that the update touches nothing moves: such stages run once.
Low-rank updates enter as W x + s · left (right x) and are never made dense.

The head runs at a scale only when that scale is asked for: logits are as wide as the
vocabulary, and those of all points at once would not fit into memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from equiv.model.factors import UnusedFactorsError
from equiv.model.sites import Sites
from equiv.model.stages import Stage, StagedModel
from equiv.shift.blame import blamed, hidden, refusal
from equiv.shift.derivative import (
    CENTRAL,
    DOUBLE_BACKWARD,
    JVP,
    NoForwardRuleError,
    NoReverseRuleError,
    forward,
    twice_backward,
)
from equiv.shift.differences import differenced, step_of, with_neighbours
from equiv.shift.stage_update import StageUpdate
from equiv.shift.traces import BASE, MIDPOINT, TUNED, OnDemand, Point, Trace
from equiv.update.update import Update

T = TypeVar("T")


@dataclass
class _Stream:
    """Inputs of the next stage for one batch: h(s) and h′(s) by scale."""

    base: Tensor | None = None
    hidden: dict[float, Tensor] = field(default_factory=dict)
    tangent: dict[float, Tensor] = field(default_factory=dict)
    moved: bool = False
    derivative: str = JVP


def propagate(
    cut: StagedModel,
    update: Update,
    points: Sequence[Point] = (BASE, MIDPOINT, TUNED),
    *,
    low: Sequence[str] = (),
    local: Sequence[Point] = (),
    derivative: str = "forward",
) -> Iterator[tuple[Stage, dict[str, Tensor], Iterator[Trace]]]:
    """Stream (stage, its tensors, one `Trace` per batch) from bottom to top.

    Args:
        cut: The model, cut into stages.
        update: An update that fits the model.
        points: The scales wanted, propagated; 0 is always run.
        low: Names whose low-rank factors are applied beside the weight.
        local: The scales wanted, local.
        derivative: "forward", or "central" for differences: see `differences.py`.

    The traces of a stage must be used up before the next stage is asked for.

    Raises:
        ForwardModeError: If an operation of the model has no derivative.
    """
    if derivative != CENTRAL:
        yield from _passes(cut, update, points, low, local)
        return
    step = step_of(update, cut.model, cut.dtype)
    near, near_local = with_neighbours(points, step), with_neighbours(local, step)
    for stage, tensors, traces in _passes(cut, update, near, low, near_local):
        found = (differenced(trace, points, local, step) for trace in traces)
        yield stage, tensors, found


def _passes(
    cut: StagedModel,
    update: Update,
    points: Sequence[Point],
    low: Sequence[str],
    local: Sequence[Point],
) -> Iterator[tuple[Stage, dict[str, Tensor], Iterator[Trace]]]:
    streams = [_Stream() for _ in cut.batches]
    wanted, wanted_local = _with_base(points), _with_base(local) if local else ()
    allowed = set(low)
    for stage in cut.stages:
        tensors = cut.tensors(stage)
        pass_ = _Pass(cut, stage, tensors, update, allowed, wanted, wanted_local)
        yield stage, tensors, (pass_.trace(i, streams[i]) for i in range(len(streams)))


def _with_base(points: Sequence[Point]) -> tuple[Point, ...]:
    known = any(point.scale == 0 for point in points)
    return tuple(points) if known else (Point(0.0), *points)


class _Pass:
    """One stage over all batches."""

    def __init__(
        self,
        cut: StagedModel,
        stage: Stage,
        tensors: dict[str, Tensor],
        update: Update,
        allowed: set[str],
        points: tuple[Point, ...],
        local: tuple[Point, ...],
    ) -> None:
        self.cut, self.stage, self.tensors = cut, stage, tensors
        self.update, self.allowed = update, allowed
        self.points, self.local = points, local
        self.delta = StageUpdate(cut, stage, update, allowed)
        # Few points: keep W + sΔW between batches. Many: form it anew, to save memory.
        self.keep = len(points) <= 3
        self.shifted: dict[float, dict[str, Tensor]] = {}
        self.noted = cut.notebooks(stage, tensors)
        self.blame = ""  # what has no forward rule here, once that is known

    def trace(self, batch: int, stream: _Stream) -> Trace:
        if not self.delta and not stream.moved:
            return self._unmoved(batch, stream)
        if self.stage.name == "head":
            return self._head(batch, stream)
        return self._retried(lambda: self._trace(batch, stream))

    def _retried(self, run: Callable[[], T]) -> T:
        try:
            return run()
        except UnusedFactorsError as unused:
            # The weight is used in some way that a hook cannot see: make it dense.
            self.allowed -= unused.names
            self.delta = StageUpdate(self.cut, self.stage, self.update, self.allowed)
            self.shifted.clear()
            return run()

    def _trace(self, batch: int, stream: _Stream) -> Trace:
        values: dict[float, Sites] = {}
        tangents: dict[float, Sites] = {}
        local_values: dict[float, Sites] = {}
        local_tangents: dict[float, Sites] = {}
        hidden: dict[float, Tensor] = {}
        tangent: dict[float, Tensor] = {}
        experts: dict[float, Tensor] = {}
        for point in self.points:
            s = point.scale
            h = stream.hidden.get(s, stream.base)
            dh = stream.tangent.get(s)
            if point.tangent:
                out, values[s], dout, tangents[s] = self._jvp(batch, s, h, dh)
                tangent[s] = dout
            else:
                out, values[s] = self._forward(batch, s, h)
            hidden[s] = out
            if (chosen := self.cut.chosen.get(self.stage.layer)) is not None:
                experts[s] = chosen
        for point in self.local:
            self._local(
                batch, stream, point, local_values, local_tangents, values, tangents
            )
        trace = Trace(
            self.stage,
            batch,
            True,
            bool(self.delta),
            values,
            tangents,
            local_values,
            local_tangents,
            partial(str, self._way(stream)),
            experts,
        )
        stream.base, stream.hidden, stream.tangent = hidden[0.0], hidden, tangent
        stream.moved = True
        return trace

    def _head(self, batch: int, stream: _Stream) -> Trace:
        values, tangents = self._asked(
            batch, self.points, stream.base, stream.hidden, stream.tangent
        )
        local = self.local if self.delta else ()
        local_values, local_tangents = self._asked(batch, local, stream.base, {}, {})
        touched = bool(self.delta)
        return Trace(
            self.stage,
            batch,
            True,
            touched,
            values,
            tangents,
            local_values,
            local_tangents,
            lambda: self._way(stream),
        )

    def _way(self, stream: _Stream) -> str:
        """How tangents were had up to here."""
        if self.blame:
            stream.derivative = DOUBLE_BACKWARD
        return stream.derivative

    def _asked(
        self,
        batch: int,
        points: Sequence[Point],
        base: Tensor | None,
        hidden: Mapping[float, Tensor],
        tangent: Mapping[float, Tensor],
    ) -> tuple[OnDemand, OnDemand]:
        """(values, tangents) of the head at some points; only the base's are kept."""

        def both(s: float) -> tuple[Sites, Sites]:
            h, dh = hidden.get(s, base), tangent.get(s)
            _, sites, _, dsites = self._retried(lambda: self._jvp(batch, s, h, dh))
            return sites, dsites

        at_base = cache(lambda: both(0.0))
        sloped = [point.scale for point in points if point.tangent]

        def value(s: float) -> Sites:
            if s == 0.0 and s in sloped:
                return at_base()[0]
            h = hidden.get(s, base)
            return self._retried(lambda: self._forward(batch, s, h))[1]

        def slope(s: float) -> Sites:
            return (at_base() if s == 0.0 else both(s))[1]

        return (
            OnDemand([point.scale for point in points], value),
            OnDemand(sloped, slope),
        )

    def _unmoved(self, batch: int, stream: _Stream) -> Trace:
        out, sites = self.cut.run(self.stage, self.tensors, stream.base, batch)
        stream.base = out
        values = {point.scale: sites for point in self.points}
        return Trace(self.stage, batch, False, False, values, {}, {}, {})

    def _local(
        self,
        batch: int,
        stream: _Stream,
        point: Point,
        local_values: dict[float, Sites],
        local_tangents: dict[float, Sites],
        values: dict[float, Sites],
        tangents: dict[float, Sites],
    ) -> None:
        s = point.scale
        if not self.delta:
            return
        known = s in values and (s in tangents or not point.tangent)
        if not stream.moved and known:  # nothing came from below: local is propagated
            local_values[s] = values[s]
            if point.tangent:
                local_tangents[s] = tangents[s]
        elif point.tangent:
            _, local_values[s], _, local_tangents[s] = self._jvp(
                batch, s, stream.base, None
            )
        else:
            _, local_values[s] = self._forward(batch, s, stream.base)

    def _at(self, s: float) -> dict[str, Tensor]:
        """The moving dense parameters at W + sΔW."""
        if s == 0.0:
            return {name: self.tensors[name] for name in self.delta.dense}
        if s in self.shifted:
            return self.shifted[s]
        made = {
            name: torch.add(self.tensors[name], change, alpha=s)
            for name, change in self.delta.dense.items()
        }
        if self.keep:
            self.shifted[s] = made
        return made

    def _forward(self, batch: int, s: float, h: Tensor | None) -> tuple[Tensor, Sites]:
        low = self.delta.low if s != 0.0 else {}
        tensors = {**self.tensors, **self._at(s)}
        return self.cut.run(self.stage, tensors, h, batch, low=low, scale=s, at=s)

    def _jvp(
        self, batch: int, s: float, h: Tensor | None, dh: Tensor | None
    ) -> tuple[Tensor, Sites, Tensor, Sites]:
        moving_h = dh is not None

        def stage_at(
            t: Tensor, moving: dict[str, Tensor], x: dict[str, Tensor]
        ) -> tuple[Tensor, Sites]:
            return self.cut.run(
                self.stage,
                {**self.tensors, **moving},
                x["h"] if moving_h else h,
                batch,
                low=self.delta.low,
                scale=t,
                at=s,
            )

        device = next(iter(self.tensors.values())).device
        t = torch.tensor(s, dtype=self.cut.dtype, device=device)
        primals = (t, {**self._at(s), **self.noted}, {"h": h} if moving_h else {})
        still = {name: torch.zeros_like(value) for name, value in self.noted.items()}
        directions = (
            torch.ones_like(t),
            {**self.delta.dense, **still},
            {"h": dh} if moving_h else {},
        )
        (out, sites), (dout, dsites) = self._derived(stage_at, primals, directions)
        return out, sites, dout, dsites

    def _derived(
        self, run: Callable[..., tuple[Tensor, Sites]], primals: Any, along: Any
    ) -> tuple[tuple[Tensor, Sites], tuple[Tensor, Sites]]:
        """Values and tangents, by forward mode unless an operation has none."""
        if not self.blame:
            try:
                return forward(run, primals, along)
            except NoForwardRuleError as error:
                self.blame = blamed(error, self.cut.model)
                if error.hidden:
                    raise hidden(self.blame) from error
        try:
            return twice_backward(run, primals, along)
        except NoReverseRuleError as error:
            raise refusal(self.blame, str(error)) from error
