"""What every tool is compared on: a model, tokens, steering, and what a row says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equiv
from equiv.demo import loading
from equiv.steering.forms.form import Steering

ROUNDINGS = 64  # of the largest logit: a few for each of the operations of four layers
Steers = Mapping[tuple[int, str], Steering]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: Which file, made by whom.
        difference: Largest difference of any logit.
        allowed: What rounding allows; `None` where the tool itself rounds more.
        moved: How far the steering moves the unsteered model's logits.
    """

    what: str
    difference: float
    allowed: float | None
    moved: float

    @property
    def holds(self) -> bool:
        """Whether the two are the same, and could have been told apart."""
        limit = self.allowed
        return limit is None or (self.difference <= limit and self.moved > 100 * limit)


class World:
    """The demo's model, tokens, steering drawn from a seed, and a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Any = loading.load_base()
        self.width = self.model.config.hidden_size
        self.generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (1, 12), generator=self.generator)
        with torch.no_grad():
            self.unsteered = self.model(self.ids).logits

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def vector(self) -> equiv.Vector:
        """A fixed vector."""
        return equiv.Vector(self.drawn(self.width))

    def loreft(self) -> equiv.LoReFT:
        """A LoReFT of rank 4."""
        rows = torch.linalg.qr(self.drawn(self.width, 4))[0].T.contiguous()
        return equiv.LoReFT(rows, rows + 0.3 * self.drawn(4, self.width), self.drawn(4))

    def affine(self) -> equiv.Affine:
        """An affine map of rank 2."""
        down, up = 0.05 * self.drawn(2, self.width), self.drawn(self.width, 2)
        return equiv.Affine(down, up, self.drawn(self.width))

    def adapter(self) -> equiv.LowRankMLP:
        """A low-rank MLP without biases, rank 4."""
        return equiv.LowRankMLP(
            0.1 * self.drawn(4, self.width), self.drawn(self.width, 4)
        )

    @torch.no_grad()
    def steered(self, steering: Steers) -> Tensor:
        """Logits under `equiv.steer`."""
        with equiv.steer(self.model, steering):
            return self.model(self.ids).logits

    def row(
        self, what: str, theirs: Tensor, ours: Tensor, *, exact: bool = True
    ) -> Row:
        """Two models' logits, compared; `exact` unless the tool itself rounds more."""
        largest = float(theirs.abs().max())
        limit = ROUNDINGS * torch.finfo(torch.float32).eps * largest
        moved = float((theirs - self.unsteered).abs().max())
        difference = float((theirs.float() - ours.float()).abs().max())
        return Row(what, difference, limit if exact else None, moved)
