"""Words on a console: wrapped at its width, a figure kept together with its unit."""

import re
import textwrap
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# Longer lines are hard to read, however wide the window is.
WIDEST = 100
_NO_BREAK = "\u00a0"
# The spaces in "81 %", "0.17 ×", "t = 0.17" and "░░ ≤ 10 %".
_INSIDE_FIGURES = re.compile(
    r" (?=[%×])|(?<=\bt) (?=[=≥])|(?<=[=≥≤]) (?=\d)|(?<=[·░▒▓█]{2}) "
)


def joined(text: str) -> str:
    """The text with spaces that no line breaks at inside its figures.

    Example:
        >>> [len(word) for word in joined("81 % at t = 0.17").split(" ")]
        [4, 2, 8]
    """
    return _INSIDE_FIGURES.sub(_NO_BREAK, text)


@dataclass(frozen=True)
class Prose:
    """One paragraph.

    Example:
        >>> Console(width=16).print(Prose("as far as up to t = 0.17, all"))
        as far as up to
        t = 0.17, all
    """

    text: str
    style: str = ""
    indent: str = ""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Lines that end in no space; breaks in the text are kept."""
        width = min(options.max_width, WIDEST)
        lines = [
            wrapped
            for line in joined(self.text).split("\n")
            for wrapped in _wrapped(line, width, self.indent)
        ]
        yield Text("\n".join(lines).replace(_NO_BREAK, " "), style=self.style)


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    inner = indent + " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line.strip(),
        width,
        initial_indent=inner,
        subsequent_indent=inner,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]
