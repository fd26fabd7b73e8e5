"""What the engine is asked for, and what it hands out: points and traces.

Symbols as in `propagate.py`: f(s) an activation with the update scaled by s, f′(s) its
derivative; g(s), g′(s) the same with the stage's input held at the base.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from equiv.model.sites import Sites
from equiv.model.stages import Stage
from equiv.shift.derivative import JVP


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
        way: Tells how tangents were had, here or below; once they were.
        experts: scale → the experts chosen, bool [tokens, experts], propagated; empty
            where none are, and where nothing moved.
    """

    stage: Stage
    batch: int
    moved: bool
    touched: bool
    values: Mapping[float, Sites]
    tangents: Mapping[float, Sites]
    local_values: Mapping[float, Sites]
    local_tangents: Mapping[float, Sites]
    way: Callable[[], str] = lambda: JVP
    experts: Mapping[float, Tensor] = field(default_factory=dict)

    @property
    def derivative(self) -> str:
        """How tangents were had: "jvp", "double backward" or "central"."""
        return self.way()


class OnDemand(Mapping[float, Sites]):
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
