"""The network between two sites, as a function of what is added at the first.

Symbols
    Δ   what is added where a steer writes, a row per token, [written, d]
    F   Δ ↦ the activation at a later site, rows of the tokens that count, [kept, e]
    J   its derivative, at Δ = 0 or another: J v by `jvp`, Jᵀ w by `vjp`, no matrix

Inside a block, behind its attention, J maps every token for itself; through attention
it maps all tokens of a sequence together. Every product runs the stages between the two
sites anew, batch by batch, so memory holds one batch's activations.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vjp

from equiv.errors import ForwardModeError
from equiv.model.sites import Site, Steer
from equiv.model.stages import Stage, StagedModel
from equiv.shift.measures import counted, has_tokens
from equiv.steering.fits.sinks import fitted_tokens, stream_of
from equiv.steering.jacobian.later import Later

T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """The stages from a steer's layer to a later site, with their tensors.

    Attributes:
        cut: The model.
        inside: The stages and their parameters and buffers.
        site: Where the steer reads and writes, as `Site.key`.
        at: Name of the later site among the last stage's activations.
    """

    cut: StagedModel
    inside: tuple[tuple[Stage, Mapping[str, Tensor]], ...]
    site: str
    at: str

    def activation(
        self, batch: int, hidden: Tensor | None, steer: Steer | None = None
    ) -> Tensor:
        """The later site's activation, with something added on the way."""
        found: dict[str, Tensor] = {}
        for stage, tensors in self.inside:
            hidden, found = self.cut.run(stage, tensors, hidden, batch, steer=steer)
            steer = None
        return found[self.at]


def way(cut: StagedModel, layer: int, site: str, later: Later) -> Way:
    """The way from a layer's steer to a later site."""
    end, name = later.place(cut, layer)
    numbers = [stage.layer for stage in cut.stages]
    begin, last = numbers.index(layer), numbers.index(end)
    inside = tuple((s, cut.tensors(s)) for s in cut.stages[begin : last + 1])
    return Way(cut, inside, site, name)


@dataclass(frozen=True)
class Part:
    """One batch on its way.

    Attributes:
        batch: Which batch.
        hidden: The first stage's input; `None` for a module without blocks.
        mask: Tokens that are written, bool.
        keep: Tokens at which the later site counts: some of those that are written,
            or, where it is in another stack, tokens of that.
        shape: Of the activation where the steer writes.
        read: What the steer reads, [written, d].
        height: ‖h‖ of the activation where it writes, [written].
        base: The later site's activation at Δ = 0, [kept, e].
        crosses: Whether the later site is in another stack than the steer.
    """

    batch: int
    hidden: Tensor | None
    mask: Tensor
    keep: Tensor
    shape: torch.Size
    read: Tensor
    height: Tensor
    base: Tensor
    crosses: bool = False

    @property
    def kept(self) -> Tensor:
        """Which of the written rows count at the later site, bool [written].

        All of an encoder's, for a site of the decoder.
        """
        if self.crosses or not _by_token(self.shape, self.mask):
            return torch.ones_like(self.height, dtype=torch.bool)
        rows = self.keep[self.mask]
        return rows.repeat_interleave(len(self.height) // len(rows))

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """The sequence that each written row, and each row that counts, belongs to."""
        numbers = torch.arange(len(self.mask), device=self.mask.device)
        rows = numbers.reshape(-1, *[1] * (self.mask.ndim - 1))
        pooled = len(self.base) < int(self.keep.sum())
        pairs = (
            (rows.expand_as(self.mask)[self.mask], len(self.height)),
            (
                numbers if pooled else rows.expand_as(self.keep)[self.keep],
                len(self.base),
            ),
        )
        found = [own.repeat_interleave(count // len(own)) for own, count in pairs]
        return found[0], found[1]

    def spread(self, delta: Tensor) -> Tensor:
        """Rows [written, d] as an activation, zero where no token counts."""
        if not _by_token(self.shape, self.mask) or bool(self.mask.all()):
            return delta.reshape(self.shape)
        rows = delta.reshape(-1, *self.shape[self.mask.ndim :])
        return delta.new_zeros(self.shape).index_put((self.mask,), rows)


def part_of(
    road: Way,
    batch: int,
    hidden: Tensor | None,
    *,
    first_position: bool | None = None,
) -> Part:
    """One batch, with what is read and written on the unsteered way.

    Args:
        road: The way.
        batch: Which batch.
        hidden: The first stage's input.
        first_position: Whether the later site counts at first tokens; see
            `equiv.steering.fits.sinks`.
    """
    stage, tensors = road.inside[0]
    _, sites = road.cut.run(stage, tensors, hidden, batch)
    site, mask = Site(road.site), road.cut.mask(stage, batch)
    found, last = road.activation(batch, hidden), road.inside[-1][0]
    crosses = last.encodes != stage.encodes
    stream = found if crosses else stream_of(sites, site.read)
    counting = road.cut.mask(last, batch)
    keep = fitted_tokens(counting, stream, first_position=first_position)
    written = counted(sites[site.write], mask)
    return Part(
        batch,
        hidden,
        mask,
        keep,
        sites[site.write].shape,
        counted(sites[site.read], mask),
        torch.linalg.vector_norm(written, dim=-1),
        counted(found, keep),
        crosses,
    )


def _by_token(shape: torch.Size, mask: Tensor) -> bool:
    return has_tokens(mask.new_empty(shape), mask)


@dataclass(frozen=True)
class Passage:
    """F and J over some batches, rows of all of them one below the other.

    Attributes:
        road: The way.
        parts: The batches.
        origin: The Δ at which J is taken; `None` for 0.
    """

    road: Way
    parts: tuple[Part, ...]
    origin: Tensor | None = None

    def around(self, delta: Tensor) -> "Passage":
        """The same with J taken at Δ."""
        return replace(self, origin=delta.contiguous())  # a vector is expanded

    @property
    def read(self) -> Tensor:
        """What the steer reads, [written, d]."""
        return torch.cat([part.read for part in self.parts])

    @property
    def height(self) -> Tensor:
        """‖h‖ where it writes, [written]."""
        return torch.cat([part.height for part in self.parts])

    @property
    def kept(self) -> Tensor:
        """Which of the written rows count at the later site, bool [written]."""
        return torch.cat([part.kept for part in self.parts])

    @property
    def size(self) -> tuple[int, int]:
        """Shape [written, d] of Δ."""
        return sum(len(p.height) for p in self.parts), self.parts[0].shape[-1]

    def missing(self, tuned: Mapping[int, Tensor]) -> Tensor:
        """What the later site lacks of a tuned activation, rows [kept, e]."""
        return torch.cat([counted(tuned[p.batch], p.keep) - p.base for p in self.parts])

    def moved(self, delta: Tensor) -> Tensor:
        """F(Δ) − F(0): what adding Δ does, [kept, e]."""
        return torch.cat(
            [self._value(part, own) - part.base for part, own in self._split(delta)]
        )

    def push(self, delta: Tensor) -> Tensor:
        """J Δ, [kept, e]."""
        pairs = zip(self._origins(), self._split(delta), strict=True)
        return torch.cat([self._push(part, at, own) for (part, at), (_, own) in pairs])

    def pull(self, rows: Tensor) -> Tensor:
        """Jᵀ of rows [kept, e], [written, d]."""
        split = rows.split([len(part.base) for part in self.parts])
        pairs = zip(self._origins(), split, strict=True)
        return torch.cat([self._pull(part, at, own) for (part, at), own in pairs])

    def _origins(self) -> Iterable[tuple[Part, Tensor]]:
        origin = self.origin
        return self._split(
            self.height.new_zeros(self.size) if origin is None else origin
        )

    def _split(self, delta: Tensor) -> Iterable[tuple[Part, Tensor]]:
        rows = delta.split([len(part.height) for part in self.parts])
        return zip(self.parts, rows, strict=True)

    def _value(self, part: Part, delta: Tensor) -> Tensor:
        added = part.spread(delta)
        steer: Steer = {Site(self.road.site).write: lambda _: added}
        found = self.road.activation(part.batch, part.hidden, steer)
        return counted(found, part.keep)

    def _push(self, part: Part, at: Tensor, along: Tensor) -> Tensor:
        def value(delta: Tensor) -> Tensor:
            return self._value(part, delta)

        return self._derived(lambda: jvp(value, (at,), (along,))[1])

    def _pull(self, part: Part, at: Tensor, rows: Tensor) -> Tensor:
        def value(delta: Tensor) -> Tensor:
            return self._value(part, delta)

        return self._derived(lambda: vjp(value, at)[1](rows)[0])

    def _derived(self, run: Callable[[], T]) -> T:
        try:
            return run()
        except NotImplementedError as error:
            raise ForwardModeError(
                "PyTorch has no derivative for an operation between "
                f"{Site(self.road.site).write} and {self.road.at}: {error}"
            ) from error
