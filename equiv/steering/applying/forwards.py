"""What is known of a forward that begins: its rows, its columns, and its prompt.

What a forward is given is the prompt where there is no cache yet, and generated where
there is one. Inside `generate` the prompt is what `generate` was given, whatever it
does with it: with a cache or without, in chunks, or with each row repeated for beams
or several answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equiv.errors import ArgumentError
from equiv.model.batches import MAIN
from equiv.steering.applying.positions import Positions, window

SOUNDS = "input_features"  # what Whisper's encoder reads
Chosen = Positions | Tensor  # in words, or as a mask, bool [batch, seq]


@dataclass
class Generation:
    """A call of `generate` that runs now.

    Attributes:
        rows: Sequences it was given.
        width: Columns of its prompt, cached ones included; `None` before it is known.
        mask: Its attention mask [rows, width], if it was given one.
        real: The tokens of its prompt that are no padding, [batch, width], for the
            rows of its forwards; noted down by the first.
    """

    rows: int
    width: int | None
    mask: Tensor | None
    real: Tensor | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], *, decodes: bool = False) -> "Generation":
        """From the arguments of `generate` by name.

        Args:
            arguments: They.
            decodes: Whether it is of a decoder behind an encoder: its prompt is what
                its first forward is given, its start token if nothing else.
        """
        mask = arguments.get("attention_mask")
        # As `generate` prefers them.
        names = ("inputs_embeds", "inputs", "input_ids", SOUNDS)
        found = [n for n in names if arguments.get(n) is not None]
        shape = (arguments[found[0]] if found else torch.empty(1)).shape
        if decodes or found[:1] == [SOUNDS]:
            return cls(shape[0], None, None)
        if mask is not None:  # of all columns, where only the new ones are given
            return cls(shape[0], mask.shape[1], mask)
        return cls(shape[0], shape[1] if found else None, None)

    def repeated(self, value: Tensor, batch: int) -> Tensor:
        """Rows repeated as `generate` repeats them; as they are if it does not."""
        if value.shape[0] != self.rows or batch % self.rows:
            return value
        return value.repeat_interleave(batch // self.rows, dim=0)


@dataclass(frozen=True)
class Forward:
    """A forward of the backbone that begins.

    Attributes:
        batch: Rows.
        length: Columns it was given.
        start: Columns that were cached before.
        mask: The attention mask it was given, of whatever kind.
        device: Where its inputs are.
        generation: The call of `generate` that it is part of.
    """

    batch: int
    length: int
    start: int | Tensor
    mask: object
    device: torch.device
    generation: Generation | None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        generation: Generation | None,
        positions: int | None = None,
    ) -> "Forward | None":
        """From the arguments by name; `None` if it is given no tokens.

        Args:
            arguments: They.
            generation: The call of `generate` that it is part of.
            positions: How many an encoder of sounds makes of what it is given.
        """
        found = [arguments[n] for n in MAIN if arguments.get(n) is not None]
        sounds = arguments.get(SOUNDS)
        if found:
            main, length = found[0], found[0].shape[1]
        elif sounds is not None and positions is not None:
            main, length = sounds, positions
        else:
            return None
        cache = arguments.get("past_key_values")
        return cls(
            batch=main.shape[0],
            length=length,
            start=0 if cache is None else cache.get_seq_length(),
            mask=arguments.get("attention_mask"),
            device=main.device,
            generation=generation,
        )

    def rows(self, value: Tensor, name: str) -> Tensor:
        """What is said per row of the caller's, for the rows of this forward.

        Raises:
            ArgumentError: If it is for another number of rows.
        """
        own, value = self.generation, value.to(self.device)
        if own is not None:
            value = own.repeated(value, self.batch)
        if value.shape[0] != self.batch:
            raise ArgumentError(
                f"Expected `{name}` for the {own.rows if own else self.batch} rows of "
                f"the batch, got {value.shape[0]}."
            )
        return value

    def picked(self, chosen: Chosen) -> Tensor | bool:
        """The tokens of this forward that are chosen, bool [batch, length].

        Returns:
            A mask, or a truth value where it is known to be the same for all tokens.

        Raises:
            ArgumentError: If a mask does not fit, or padding cannot be told.
        """
        if isinstance(chosen, Tensor):
            return self._masked(chosen)
        if chosen.everything:
            return True
        if self.generation is None:
            return self._alone(chosen)
        real = self._prompt(self.generation)
        if isinstance(self.start, int) and self.start >= real.shape[1]:
            return chosen.generated
        prompt = chosen.of_prompt(real)
        return window(prompt, chosen.generated, self.start, self.length)

    def _alone(self, chosen: Positions) -> Tensor | bool:
        """Outside `generate`: all is prompt without a cache, else all is generated."""
        if isinstance(self.start, int):
            if self.start > 0:
                return chosen.generated
            return chosen.of_prompt(self._real(self.length))
        # A cache that counts on the device: no branch, for nothing should wait for it.
        prompt = chosen.of_prompt(self._real(self.length))
        after = torch.full_like(prompt, chosen.generated)
        return torch.where(self.start == 0, prompt, after)

    def _masked(self, mask: Tensor) -> Tensor:
        mask = self.rows(mask, "positions")
        whole = self.generation.width if self.generation else self.length
        first = isinstance(self.start, int) and self.start == 0
        if first and whole is not None and mask.shape[1] < whole:
            raise ArgumentError(
                f"Expected `positions` for the {whole} columns of the prompt, got "
                f"{mask.shape[1]}."
            )
        return window(mask, False, self.start, self.length)

    def _prompt(self, generation: Generation) -> Tensor:
        """The tokens of the prompt of `generate` that are no padding."""
        if generation.real is None:
            if generation.mask is not None:
                given = generation.mask != 0
                generation.real = self.rows(given, "attention_mask")
            else:
                width = generation.width
                generation.real = self._real(self.length if width is None else width)
        return generation.real

    def _real(self, width: int) -> Tensor:
        """Which of the first columns are no padding."""
        if self.mask is None:
            return torch.ones(self.batch, width, dtype=torch.bool, device=self.device)
        found = self.mask if isinstance(self.mask, Tensor) else torch.empty(())
        if found.ndim == 2 and found.shape[1] >= width:
            return found[:, :width].to(self.device) != 0
        raise ArgumentError(
            f"Expected an attention mask [batch, {width}], which tells padding, since "
            "`positions` counts tokens; got "
            f"{tuple(found.shape) or type(self.mask).__name__}. Pass `attention_mask` "
            "to the model, or to `generate`."
        )
