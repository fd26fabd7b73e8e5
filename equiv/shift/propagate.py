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

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import jvp

from equiv.errors import ForwardModeError
from equiv.model.factors import UnusedFactorsError, takes_factors
from equiv.model.sites import Sites
from equiv.model.stages import Stage, StagedModel
from equiv.update.low_rank import LowRank
from equiv.update.update import Update

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A scale of the update, and whether the derivative is wanted there."""

    scale: float
    tangent: bool = False


BASE, MIDPOINT, TUNED = Point(0.0, True), Point(0.5, True), Point(1.0)


@dataclass(frozen=True)
class Trace:
    """What one stage does to one batch.

    Attributes:
        stage: The stage.
        batch: Index of the batch.
        moved: Whether the update has any effect up to here; if not, every point has
            the base's activations and tangents are absent.
        values: scale → site → f(s), [batch, seq, d].
        tangents: scale → site → f′(s).
        local_values: scale → site → g(s); empty unless asked for.
        local_tangents: scale → site → g′(s).
        touched: Whether the update touches this stage's own parameters.
    """

    stage: Stage
    batch: int
    moved: bool
    touched: bool
    values: Mapping[float, Sites]
    tangents: Mapping[float, Sites]
    local_values: Mapping[float, Sites]
    local_tangents: Mapping[float, Sites]


class _OnDemand(Mapping[float, Sites]):
    """Scale → sites, computed when asked for and not kept."""

    def __init__(self, scales: Sequence[float], run: Callable[[float], Sites]) -> None:
        self._scales, self._run = tuple(scales), run

    def __getitem__(self, scale: float) -> Sites:
        if scale not in self._scales:
            raise KeyError(scale)
        return self._run(scale)

    def __contains__(self, scale: object) -> bool:
        return scale in self._scales

    def __iter__(self) -> Iterator[float]:
        return iter(self._scales)

    def __len__(self) -> int:
        return len(self._scales)


@dataclass
class _Stream:
    """Inputs of the next stage for one batch: h(s) and h′(s) by scale."""

    base: Tensor | None = None
    hidden: dict[float, Tensor] = field(default_factory=dict)
    tangent: dict[float, Tensor] = field(default_factory=dict)
    moved: bool = False


def low_rank_names(model: nn.Module, update: Update) -> list[str]:
    """Names of the update's entries that can be applied beside their weights.

    A tied weight is used by more than one module; its update has to be dense.
    """
    modules = dict(model.named_modules())
    own = dict(model.named_parameters())
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, delta in update.deltas.items()
        if isinstance(delta, LowRank)
        and name.endswith(".weight")
        and uses[id(own[name])] == 1
        and takes_factors(modules[name.rpartition(".")[0]])
    ]


class _StageUpdate:
    """The update of one stage in the compute dtype: dense part and factors."""

    def __init__(self, cut: StagedModel, stage: Stage, update: Update, low: set[str]):
        own = {
            name: update.deltas[name] for name in stage.names if name in update.deltas
        }
        self.dense: dict[str, Tensor] = {}
        self.low: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in own.items():
            if isinstance(delta, LowRank) and name in low:
                self.low[name] = (delta.left.to(cut.dtype), delta.right.to(cut.dtype))
            else:
                full = delta.dense() if isinstance(delta, LowRank) else delta
                self.dense[name] = full.to(cut.dtype)

    def __bool__(self) -> bool:
        return bool(self.dense or self.low)


def propagate(
    cut: StagedModel,
    update: Update,
    points: Sequence[Point] = (BASE, MIDPOINT, TUNED),
    *,
    low: Sequence[str] = (),
    local: Sequence[Point] = (),
) -> Iterator[tuple[Stage, dict[str, Tensor], Iterator[Trace]]]:
    """Stream (stage, its tensors, one `Trace` per batch) from bottom to top.

    Args:
        cut: The model, cut into stages.
        update: An update that fits the model.
        points: The scales wanted, propagated; 0 is always run.
        low: Names whose low-rank factors are applied beside the weight.
        local: The scales wanted, local.

    The traces of a stage must be used up before the next stage is asked for.

    Raises:
        ForwardModeError: If an operation of the model has no forward-mode derivative.
    """
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
        self.delta = _StageUpdate(cut, stage, update, allowed)
        # Few points: keep W + sΔW between batches. Many: form it anew, to save memory.
        self.keep = len(points) <= 3
        self.shifted: dict[float, dict[str, Tensor]] = {}
        self.noted = cut.notebooks(stage, tensors)

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
            self.delta = _StageUpdate(self.cut, self.stage, self.update, self.allowed)
            self.shifted.clear()
            return run()

    def _trace(self, batch: int, stream: _Stream) -> Trace:
        values: dict[float, Sites] = {}
        tangents: dict[float, Sites] = {}
        local_values: dict[float, Sites] = {}
        local_tangents: dict[float, Sites] = {}
        hidden: dict[float, Tensor] = {}
        tangent: dict[float, Tensor] = {}
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
        )

    def _asked(
        self,
        batch: int,
        points: Sequence[Point],
        base: Tensor | None,
        hidden: Mapping[float, Tensor],
        tangent: Mapping[float, Tensor],
    ) -> tuple[_OnDemand, _OnDemand]:
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
            _OnDemand([point.scale for point in points], value),
            _OnDemand(sloped, slope),
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
        try:
            values, tangents = jvp(stage_at, primals, directions)[:2]
        except NotImplementedError as error:
            raise ForwardModeError(_no_derivative(self.stage, str(error))) from error
        except RuntimeError as error:
            if "transform" not in str(error):
                raise
            raise ForwardModeError(
                f"{self.stage.name} {self.stage.layer} does something that PyTorch "
                f"cannot differentiate forward: {error}"
            ) from error
        (out, sites), (dout, dsites) = values, tangents
        return out, sites, dout, dsites


def _no_derivative(stage: Stage, message: str) -> str:
    found = re.search(r"forward AD with (\S+)", message)
    operation = f"`{found[1]}`" if found else "an operation"
    return (
        f"PyTorch has no forward-mode derivative for {operation}, which {stage.name} "
        f"{stage.layer} uses. Use an implementation of it made of operations that have "
        "one."
    )
