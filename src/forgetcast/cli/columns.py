"""Tables of names and figures that fit the terminal: names are shortened, figures are not cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from forgetcast.text import cut, shorten, visible

GAP = 2
"""Cells between columns."""

SHORTEST_NAME = 20
"""Names are not made shorter than this to have more columns beside each other."""

LONGEST_HEADING = 16
"""Of a word in a heading: the name of an arm may be one."""


class Name(str):
    """Heading of a column of names, or a name with what stays beside it: they are shortened in the middle.

    Parameters
    ----------
    text : str
    after : str
        Said after the name, and never cut, such as " (8)".
    """

    after: str

    def __new__(cls, text: str, after: str = "") -> Name:
        """Make a string with an attribute."""
        made = super().__new__(cls, text)
        made.after = after
        return made


class Beginning(str):
    """Heading of a column of texts, which are cut at their ends where they do not fit."""


class Words(str):
    """Heading of a column of sentences, which go on in the next line where they do not fit."""


class FigureTable:
    """A table whose figures are never cut or wrapped, at any width of the terminal.

    Names have what the figures leave, and are shortened in the middle. Where the figures leave too little, the table is
    continued below, with the names again. Cells are plain text: no markup, and control characters are made visible.

    Parameters
    ----------
    headings : str
        `Name`, `Words`, or that of a column of figures.
    title : str
    caption : str
        Said below the table.
    """

    def __init__(self, *headings: str, title: str = "", caption: str = "") -> None:
        self.headings = [_heading(heading) for heading in headings]
        self.title, self.caption = title, caption
        self._rows: list[list[str]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str) -> None:
        """Add a row; cells that are missing at its end are empty."""
        shown = [Name(visible(c), c.after) if isinstance(c, Name) else visible(c) for c in cells]
        self._rows.append(shown + [""] * (len(self.headings) - len(shown)))

    def add_section(self) -> None:
        """Draw a line after the last row."""
        self._sections.add(len(self._rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield an empty line, the title, a table or several, and the caption."""
        yield Text()
        if self.title:
            yield Text(visible(self.title), style="table.title")
        for i, columns in enumerate(self._blocks(options.max_width)):
            if i:
                yield Text()
            yield self._table(columns, self._widths(columns, options.max_width))
        if self.caption:
            yield Text(visible(self.caption), style="table.caption")

    def _cells(self, column: int) -> list[str]:
        return [row[column] for row in self._rows]

    def _longest(self, column: int) -> int:
        """Return the width of the longest cell and of what is said after one, in cells of the terminal."""
        cells = self._cells(column)
        after = max((cell_len(cell.after) for cell in cells if isinstance(cell, Name)), default=0)
        return after + max(map(cell_len, cells), default=0)

    def _least(self, column: int) -> int:
        """Return the least width of a column: that of its figures, or of names as short as they get."""
        heading = max(map(cell_len, self.headings[column].split()), default=0)
        longest = self._longest(column)
        return max(heading, min(longest, SHORTEST_NAME) if self._flexible(column) else longest)

    def _flexible(self, column: int) -> bool:
        return isinstance(self.headings[column], Name | Beginning | Words)

    def _blocks(self, width: int) -> Iterator[list[int]]:
        """Yield the columns of each table: as many as fit beside the leading names."""
        leading = [0] if self._flexible(0) else []
        block = leading.copy()
        for column in range(len(leading), len(self.headings)):
            if len(block) > len(leading) and _total([self._least(c) for c in (*block, column)]) > width:
                yield block
                block = leading.copy()
            block.append(column)
        yield block

    def _widths(self, columns: Sequence[int], width: int) -> list[int]:
        """Return the width of each column: first figures, then headings in one line and whole names, as far as room."""
        least = [self._least(c) for c in columns]
        wanted = [max(self._longest(c), cell_len(self.headings[c])) for c in columns]
        spare = max(width - _total(least), 0)
        for flexible in (False, True):
            growing = [i for i, c in enumerate(columns) if self._flexible(c) == flexible]
            for rank, i in enumerate(sorted(growing, key=lambda i: wanted[i] - least[i])):
                more = min(wanted[i] - least[i], spare // (len(growing) - rank))
                least[i] += more
                spare -= more
        return least

    def _table(self, columns: Sequence[int], widths: Sequence[int]) -> Table:
        """Return the table of some columns."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        shown = []
        for column, width in zip(columns, widths, strict=True):
            cells, heading = self._cells(column), self.headings[column]
            justify: JustifyMethod = "left" if self._flexible(column) else "right"
            table.add_column(Text(self.headings[column]), width=width, overflow="fold", justify=justify)
            if isinstance(heading, Name):
                cells = _fitted(cells, width)
            elif isinstance(heading, Beginning):
                cells = [cut(cell, width) for cell in cells]
            shown.append(cells)
        for i, row in enumerate(zip(*shown, strict=True)):
            table.add_row(*map(Text, row), end_section=i in self._sections)
        return table


def _heading(heading: str) -> str:
    """Return a heading whose words are not too long."""
    kind = type(heading)
    return kind(" ".join(shorten(visible(heading).split(" "), LONGEST_HEADING)))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _fitted(cells: Sequence[str], width: int) -> list[str]:
    """Shorten names, and leave what is said after them."""
    after = [cell.after if isinstance(cell, Name) else "" for cell in cells]
    room = width - max(map(cell_len, after), default=0)
    return [name + said for name, said in zip(shorten(cells, max(room, 1)), after, strict=True)]
