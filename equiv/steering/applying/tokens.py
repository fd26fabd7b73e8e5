"""Which steer of a bank each token of the running forward gets."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import ArgumentError
from equiv.model.calls import Note, note_calls
from equiv.steering.applying.forwards import Chosen, Forward, Generation


class Tokens:
    """Which steer of a bank each token of the running forward gets.

    Attributes:
        chosen: Per steer of the bank, the tokens that it is for.
        rows: Which steer each row of the batch gets, [batch], −1 for none; `None`
            where the bank has but one.
    """

    def __init__(
        self, chosen: Sequence[Chosen], rows: Sequence[int] | None = None
    ) -> None:
        self.chosen = tuple(chosen)
        self.rows = None if rows is None else torch.tensor(rows, dtype=torch.long)
        self._used = [0] if rows is None else sorted(set(rows) - {-1})
        self._generations: list[Generation] = []  # the innermost last
        self._now: tuple[Tensor, list[int]] | None = None
        self._decodes = False
        self._positions: int | None = None

    def follow(
        self, model: nn.Module, backbone: nn.Module, *, decodes: bool = False
    ) -> Callable[[], None]:
        """Follow the forwards of a Hugging Face model, and its `generate`.

        Args:
            model: The model.
            backbone: The part of it that holds the blocks: every forward passes it,
                also those that reach `model.forward` past its hooks, as PEFT's do.
            decodes: Whether that is the decoder behind an encoder.

        Returns:
            A function that ends it.
        """
        self._decodes = decodes
        if not decodes:
            config = getattr(backbone, "config", None)
            self._positions = getattr(config, "max_source_positions", None)
        stack = ExitStack()
        stack.callback(note_calls(backbone, "forward", _Forwards(self)))
        if hasattr(model, "generate"):
            stack.callback(note_calls(model, "generate", _Generations(self)))
        return stack.close

    def fix(self) -> None:
        """Let rows and masks be those of every forward, whatever it is given."""
        masks = [c if isinstance(c, Tensor) else True for c in self.chosen]
        self._now = numbered(self.rows, masks, self._used), self._used

    def begin_generation(self, arguments: Mapping[str, Any]) -> None:
        """A call of `generate` begins."""
        found = Generation.of(arguments, decodes=self._decodes)
        self._generations.append(found)

    def end_generation(self) -> None:
        """A call of `generate` is over."""
        self._generations.pop()

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A forward of the backbone begins.

        Raises:
            ArgumentError: If rows or masks do not fit it.
        """
        generation = self._generations[-1] if self._generations else None
        forward = Forward.of(arguments, generation, self._positions)
        if forward is None:
            return  # the model says so itself
        rows = None if self.rows is None else forward.rows(self.rows, "index")
        masks = [forward.picked(chosen) for chosen in self.chosen]
        used = [number for number in self._used if masks[number] is not False]
        self._now = numbered(rows, masks, used), used

    def end(self) -> None:
        """The forward is over."""
        self._now = None

    def now(self, h: Tensor) -> tuple[list[int], Tensor]:
        """The steers that this forward uses, and the index for `h`: one of them or −1.

        Raises:
            ArgumentError: If the rows or tokens of `h` are others.
        """
        if self._now is None:
            raise ArgumentError(
                "`positions` and `index` are of a forward of the whole model, but a "
                "part of it ran alone, or once more for a checkpointed gradient."
            )
        index, used = self._now
        if index.shape != h.shape[: index.ndim]:
            raise ArgumentError(
                f"Expected activations of shape {tuple(index.shape)} × features, as "
                f"`positions` and `index` have it, got {tuple(h.shape)}."
            )
        return used, index.to(h.device)


def numbered(
    rows: Tensor | None, masks: Sequence[Tensor | bool], used: Sequence[int]
) -> Tensor:
    """The number of the steer that each row or token gets, −1 for none.

    Args:
        rows: Number of each row, [batch]; `None` for 0 everywhere.
        masks: Per number the tokens it is for, bool [batch, *rest], or all or none.
        used: The numbers that are left to choose from.

    Example:
        >>> mask = torch.tensor([[True, False], [True, False]])
        >>> numbered(torch.tensor([1, 0]), [True, mask], [0, 1])
        tensor([[ 1, -1],
                [ 0,  0]])
    """
    shaped = [mask for mask in masks if isinstance(mask, Tensor)]
    if not shaped and rows is None:
        return torch.tensor(0 if used else -1)
    if not shaped and rows is not None:
        left = sorted(set(range(len(masks))) - set(used))
        for number in left:  # most often none: then the rows are as they came
            rows = torch.where(rows == number, -1, rows)
        return rows
    first = shaped[0]
    own = torch.tensor([0]) if rows is None else rows
    own = own.to(first.device).reshape(-1, *[1] * (first.ndim - 1))
    index = torch.full(first.shape, -1, device=first.device)
    for number in used:
        index = torch.where(masks[number] & (own == number), number, index)
    return index


class _Forwards(Note):
    """Tells of the forwards of the backbone."""

    listens = True

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def begin(self, arguments: Mapping[str, Any]) -> None:
        self.tokens.begin(arguments)

    def end(self) -> None:
        self.tokens.end()


class _Generations(Note):
    """Tells of the calls of `generate`."""

    listens = True

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def begin(self, arguments: Mapping[str, Any]) -> None:
        self.tokens.begin_generation(arguments)

    def end(self) -> None:
        self.tokens.end_generation()
