"""Tables on a console that lose nothing: what is too wide goes on further down."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from equiv.report.prose import Prose

_PADDING = 2  # a space on both sides of a cell


@dataclass(frozen=True)
class Grid:
    """A titled table whose first column names the rows.

    Columns that do not fit the console's width follow below the others, under the same
    names: rich would shorten their figures.

    Example:
        >>> rows = [["0", "0.44", "0.36"], ["1", "0.28", "0.3"]]
        >>> grid = Grid("Radius", ["layer", "attn_out", "mlp_in"], rows)
        >>> Console(width=20).print(grid)  # doctest: +NORMALIZE_WHITESPACE
        Radius
         layer  attn_out
         0          0.44
         1          0.28
        <BLANKLINE>
         layer  mlp_in
         0        0.36
         1         0.3
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Text]]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """The title, then as many tables as the width asks for."""
        yield Prose(self.title, style="bold")
        for i, columns in enumerate(self._parts(options.max_width)):
            if i:
                yield Text("")
            yield self._table(columns)

    def _parts(self, width: int) -> Iterator[list[int]]:
        """Columns that fit the width together; the first is in every part."""
        widths = [
            _PADDING + max(_width(line[i]) for line in self._lines())
            for i in range(len(self.header))
        ]
        part: list[int] = []
        for i in range(1, len(widths)):
            if part and sum(widths[j] for j in (0, *part, i)) > width:
                yield [0, *part]
                part = []
            part.append(i)
        yield [0, *part]

    def _lines(self) -> Iterator[Sequence[str | Text]]:
        yield self.header
        yield from self.rows

    def _table(self, columns: Sequence[int]) -> Table:
        table = Table(box=None)
        for i in columns:
            justify = "right" if i else "left"
            # Only a single column wider than the console is ever folded.
            table.add_column(self.header[i], justify=justify, overflow="fold")
        for row in self.rows:
            cells = [row[i] for i in columns]
            if any(Text.assemble(cell).plain for cell in cells[1:]):
                table.add_row(*cells)
        return table


def _width(cell: str | Text) -> int:
    """Columns that a cell takes; a name may have several lines."""
    return max(line.cell_len for line in Text.assemble(cell).split("\n"))
