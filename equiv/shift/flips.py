"""Tokens that an update sends to other experts, gathered from the bottom up.

The derivative of a mixture of experts holds inside the routing, and where the routing
changes the output jumps. Compared are the experts that the base model chooses on its
own stream and those that the tuned model chooses on its own: what happens below moves a
token to other experts as much as the router's own update does.

A token is *flipped* at a block if its set of experts there, or at any block below,
changes. One that is not may still attend to one that is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiv.model.routing import flipped
from equiv.shift.traces import Trace


@dataclass
class FlipCount:
    """Tokens whose experts change at one layer, and there or at a layer below."""

    here: int = 0
    so_far: int = 0
    tokens: int = 0


@dataclass
class Flips:
    """Who has flipped up to here; fed trace by trace, before it is asked.

    Attributes:
        mixtures: The layers that choose experts.
        scales: The scales of the update whose routing is held against the base's;
            `None` for all that were run.
        counts: Layer → how many tokens flip.
    """

    mixtures: Collection[int] = ()
    scales: Sequence[float] | None = (1.0,)
    counts: dict[int, FlipCount] = field(default_factory=dict)
    # (batch, whether its tokens are an encoder's) → layer → flipped so far, bool like
    # the mask
    _so_far: dict[tuple[int, bool], dict[int, Tensor]] = field(default_factory=dict)

    def add(self, trace: Trace, mask: Tensor) -> None:
        """Take in one batch of one stage; `mask` has the tokens that count."""
        layer = trace.stage.layer
        if layer not in self.mixtures:
            return
        here = self._here(trace, mask)
        if here is None:
            return
        below = self._flipped(trace)
        so_far = here if below is None else here | below
        self._so_far.setdefault(_tokens(trace), {})[layer] = so_far
        count = self.counts.setdefault(layer, FlipCount())
        count.here += int(here.sum())
        count.so_far += int(so_far.sum())
        count.tokens += int(mask.sum())

    def kept(self, trace: Trace, mask: Tensor) -> Tensor | None:
        """The tokens that count and no block up to this stage has flipped.

        Returns:
            Bool like `mask`; `None` where no block up to here chooses experts.
        """
        so_far = self._flipped(trace)
        return None if so_far is None else mask & ~so_far

    def _flipped(self, trace: Trace) -> Tensor | None:
        found = self._so_far.get(_tokens(trace), {})
        last = max((i for i in found if i <= trace.stage.layer), default=None)
        return None if last is None else found[last]

    def _here(self, trace: Trace, mask: Tensor) -> Tensor | None:
        """Whose experts change at this very block; `None` where that is not known."""
        if not trace.moved:
            return torch.zeros_like(mask)
        chosen = trace.experts.get(0.0)
        if chosen is None or len(chosen) != mask.numel():
            return None  # its router does not say whom it chooses for which token
        base = {0: chosen}
        scales = trace.experts if self.scales is None else self.scales
        moved = [flipped(base, {0: trace.experts[s]})[0] for s in scales]
        return torch.stack(moved).any(0).reshape(mask.shape) & mask


def _tokens(trace: Trace) -> tuple[int, bool]:
    """Whose tokens a stage passes on."""
    return trace.batch, trace.stage.encodes
