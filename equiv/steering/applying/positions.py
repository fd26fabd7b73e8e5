"""Which tokens are steered, said in words.

Words count a sequence's own tokens in its prompt: padding, left or right, does not
count and is not chosen. The prompt is what a first forward is given, all of it in a
forward without a cache; what is generated comes after it.

    all                   every token
    prompt, generated     one of the two
    first N, last N       of the prompt
    last                  the prompt's last token
    first 2 + generated   sums: what any term chooses
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.errors import ArgumentError

WORDS = "all, prompt, generated, last, first N, last N, or a sum such as first 2 + last"
_TERM = re.compile(r"(all|prompt|generated|last)|(first|last) +([1-9][0-9]*)")


@dataclass(frozen=True)
class Positions:
    """What the words choose.

    Attributes:
        prompt: Whether all of the prompt.
        generated: Whether all that is generated.
        first: How many of the prompt's first tokens.
        last: How many of the prompt's last tokens.

    Example:
        >>> Positions.parse("first 3 + last")
        Positions(prompt=False, generated=False, first=3, last=1)
    """

    prompt: bool = False
    generated: bool = False
    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, words: object) -> "Positions":
        """From words.

        Raises:
            ArgumentError: If they are none of those above.
        """
        terms = words.split("+") if isinstance(words, str) else []
        found = [_TERM.fullmatch(term.strip()) for term in terms]
        if not found or None in found:
            raise ArgumentError(f"Expected `positions` in {WORDS}; got {words!r}.")
        named = {match[1] for match in found if match}
        counts = {
            end: max((int(m[3]) for m in found if m and m[2] == end), default=0)
            for end in ("first", "last")
        }
        return cls(
            prompt=bool(named & {"all", "prompt"}),
            generated=bool(named & {"all", "generated"}),
            first=counts["first"],
            last=max(counts["last"], int("last" in named)),
        )

    @property
    def everything(self) -> bool:
        """Whether every token is chosen; then padding is steered too, to no effect."""
        return self.prompt and self.generated

    def of_prompt(self, real: Tensor) -> Tensor:
        """The chosen tokens of a prompt.

        Args:
            real: The tokens that are no padding, bool [batch, seq].

        Returns:
            Bool [batch, seq].

        Example:
            >>> real = torch.tensor([[False, True, True, True]])
            >>> Positions(first=1, last=1).of_prompt(real)
            tensor([[False,  True, False,  True]])
        """
        if self.prompt:
            return real
        number = real.cumsum(1)  # 1 for the first token, n for the last
        count = real.sum(1, keepdim=True)
        return real & ((number <= self.first) | (number > count - self.last))


def window(prompt: Tensor, generated: bool, start: int | Tensor, length: int) -> Tensor:
    """What is chosen among some columns of a sequence.

    Args:
        prompt: What is chosen in the prompt, bool [batch, width].
        generated: Whether what comes after it is chosen.
        start: The first column, counted from the start of the prompt.
        length: How many columns.

    Returns:
        Bool [batch, length].

    Example:
        >>> prompt = torch.tensor([[True, False, True]])
        >>> window(prompt, False, start=2, length=3)
        tensor([[ True, False, False]])
    """
    width = prompt.shape[1]
    if isinstance(start, int) and (start, length) == (0, width):
        return prompt
    after = torch.full_like(prompt[:, :1], generated).expand(-1, length)
    if width == 0 or (isinstance(start, int) and start >= width):
        return prompt.new_full((prompt.shape[0], length), generated)
    columns = start + torch.arange(length, device=prompt.device)
    return torch.where(columns < width, prompt[:, columns.clamp(max=width - 1)], after)
