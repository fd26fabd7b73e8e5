"""ListOps: nested list expressions with digits, generated from a seed.

An expression is written in tokens with spaces between them, `[MAX 3 [MIN 4 5 ] 1 ]`,
and its value is a digit. Operators:

    MAX, MIN    largest, smallest argument
    MED         lower median: the argument at place ⌊(n−1)/2⌋ when sorted
    SM          sum modulo 10
    LAST        the last argument
    RNG         largest minus smallest

Here an expression has at most 12 tokens (operators, digits and closing brackets) and
at most one level of nesting below the root.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MAX_TOKENS = 12
MAX_ARGUMENTS = 5
HELD_OUT_SHARE = 16  # one expression in this many is held out

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: sorted(values)[(len(values) - 1) // 2],
    "SM": lambda values: sum(values) % 10,
    "LAST": lambda values: values[-1],
    "RNG": lambda values: max(values) - min(values),
}


@dataclass(frozen=True)
class Example:
    """One expression.

    Attributes:
        tokens: Its tokens.
        values: Per token, the value of the bracket that it closes, else `None`.
    """

    tokens: tuple[str, ...]
    values: tuple[int | None, ...]

    @property
    def text(self) -> str:
        """Tokens with spaces between them."""
        return " ".join(self.tokens)

    @property
    def answer(self) -> int:
        """The value of the whole expression."""
        value = self.values[-1]
        assert value is not None
        return value

    @property
    def operator(self) -> str:
        """The root's operator."""
        return self.tokens[0].removeprefix("[")

    @property
    def is_nested(self) -> bool:
        """Whether there is an expression inside the expression."""
        return sum(token.startswith("[") for token in self.tokens) > 1


def evaluate(text: str) -> Example:
    """Parse an expression and find the value of every bracket.

    Raises:
        ValueError: If the brackets do not match or a token is unknown.

    Example:
        >>> evaluate("[MAX 3 [MIN 4 5 ] 1 ]").values
        (None, None, None, None, None, 4, None, 4)
        >>> evaluate("[MED 9 1 5 7 ]").answer, evaluate("[SM 9 8 ]").answer
        (5, 7)
    """
    tokens = tuple(text.split())
    values: list[int | None] = []
    stack: list[tuple[str, list[int]]] = []
    for place, token in enumerate(tokens):
        value = None
        if token.startswith("["):
            stack.append((token.removeprefix("["), []))
        elif not stack:
            raise ValueError(f"Expected an operator at token {place}, got {token!r}.")
        elif token == "]":
            operator, arguments = stack.pop()
            value = OPERATORS[operator](arguments)
            if stack:
                stack[-1][1].append(value)
        else:
            stack[-1][1].append(int(token))
        values.append(value)
    if stack or not tokens:
        raise ValueError(f"Expected {len(stack)} more closing brackets in {text!r}.")
    return Example(tokens, tuple(values))


def generate(
    operators: Sequence[str], seed: int, *, held_out: bool = False
) -> Iterator[Example]:
    """Endless expressions with these operators; held-out ones never occur elsewhere.

    Example:
        >>> first = next(generate(["MAX"], seed=0))
        >>> first.operator, len(first.tokens) <= MAX_TOKENS
        ('MAX', True)
    """
    source = random.Random(seed)
    while True:
        text = " ".join(_expression(source, operators, MAX_TOKENS, nested=True))
        if is_held_out(text) == held_out:
            yield evaluate(text)


def is_held_out(text: str) -> bool:
    """Whether an expression belongs to the held-out part, by a hash of its text."""
    digest = hashlib.sha256(text.encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def _expression(
    source: random.Random, operators: Sequence[str], room: int, *, nested: bool
) -> list[str]:
    """Tokens of an expression that takes at most `room`, which is at least 4."""
    count = source.randint(2, min(MAX_ARGUMENTS, room - 2))
    tokens = [f"[{source.choice(list(operators))}"]
    left = room - 2  # tokens left for arguments
    for place in range(count):
        waiting = count - place - 1
        spare = left - waiting
        if nested and spare >= 4 and source.random() < 0.35:
            inner = _expression(source, operators, min(spare, 7), nested=False)
            tokens += inner
            left -= len(inner)
        else:
            tokens.append(str(source.randint(0, 9)))
            left -= 1
    return [*tokens, "]"]
