"""The tables of reports: one row below the other where they fit; no name and no figure is cut where they do not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from itda.errors import one_line

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

CONTEXT = 100  # columns of a token in its context at most
LEAST = 20  # columns for text beside figures; with fewer, it stands below them
GAP, INDENT = 3, 4  # columns between two others, and before text that stands below


def columns(
    *numbers: str, label: str = "label in context", first: str = "", left: Collection[str] = (), folds: bool = False
) -> Columns:
    """A table of right-aligned columns, after one of names if `first` and before one of text if `label`.

    Those of `numbers` that are in `left` are aligned to the left; text that `folds` takes more lines where the others
    leave it little room.
    """
    return Columns([first] * bool(first) + [*numbers], {first, *left}, bool(first), label, folds)


def room(options: ConsoleOptions, used: int, most: int = CONTEXT) -> int:
    """Columns for text beside `used` others; where these leave too few, for text below them."""
    free = options.max_width - used
    return min(most, free) if free >= LEAST else max(LEAST, min(most, options.max_width - INDENT))


class Columns:
    """A table that is drawn as wide as the terminal, and no wider.

    One that is too wide has its text below the figures of every row; without text, it is cut into several below each
    other, which begin with the same column of names.
    """

    def __init__(self, heads: list[str], left: set[str], named: bool, label: str, folds: bool) -> None:
        self._left, self._named, self._label, self._folds = left, named, bool(label), folds
        self._heads = heads + [label] * bool(label)
        self._rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        """One more row, of a cell for each column."""
        from rich.text import Text

        self._rows.append([cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in cells])

    def __rich_console__(self, console: object, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        every = range(len(self._heads))
        figures = every[: len(every) - self._label]
        least = LEAST if self._folds else self._width(every[-1]) if self._label else 0
        if self._fits([*figures], options, least + GAP * self._label):
            yield self._drawn(every)
        elif self._label:
            yield from self._stacked(figures, options)
        else:
            for number, group in enumerate(self._groups(figures, options)):
                if number:
                    yield Text()
                yield self._drawn(group)

    def _width(self, i: int) -> int:
        """Columns of the widest cell of column `i`."""
        from rich.cells import cell_len

        lines = (line for row in self._rows for line in row[i].plain.split("\n"))
        return max([cell_len(one_line(self._heads[i])), *map(cell_len, lines)])

    def _fits(self, some: list[int], options: ConsoleOptions, more: int = 0) -> bool:
        return sum(map(self._width, some)) + GAP * (len(some) - 1) + more <= options.max_width

    def _groups(self, every: Iterable[int], options: ConsoleOptions) -> Iterator[list[int]]:
        """As many columns at a time as fit, after that of the names."""
        names, *rest = every if self._named else [-1, *every]
        begin = [names] if self._named else []
        group = [*begin]
        for i in rest:
            if len(group) > len(begin) and not self._fits([*group, i], options):
                yield group
                group = [*begin]
            group.append(i)
        yield group

    def _drawn(self, some: Iterable[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table, some = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False), list(some)
        for i in some:
            text = self._label and i == len(self._heads) - 1
            folds = (text and self._folds) or (self._named and i == 0)  # names are whole, whatever it takes
            justify: Literal["left", "right"] = "left" if text or self._heads[i] in self._left else "right"
            overflow: Literal["fold", "ellipsis"] = "fold" if folds else "ellipsis"
            table.add_column(Text(one_line(self._heads[i])), justify=justify, no_wrap=not folds, overflow=overflow)
        for row in self._rows:
            table.add_row(*(row[i] for i in some))
        return table

    def _stacked(self, figures: Iterable[int], options: ConsoleOptions) -> RenderResult:
        """Of every row the figures, and below them its text; before them its name, if it is too long for their line."""
        from rich.padding import Padding
        from rich.text import Text

        figures = [*figures]
        alone = self._named and not self._fits(figures, options)
        beside = figures[alone:]
        heads = [Text(one_line(head), style="bold") for head in self._heads]
        for number, row in enumerate([heads, *self._rows]):
            if alone:
                yield Text.assemble(row[0], overflow="fold")
            if beside:
                yield Padding(self._line(row, beside), (0, 0, 0, INDENT if alone else 0))
            if row[-1].plain:
                yield Padding(Text.assemble(row[-1], overflow="fold"), (0, 0, 0, INDENT))
            if not number:
                yield Text("─" * min(options.max_width, sum(map(self._width, figures)) + GAP * (len(figures) - 1)))

    def _line(self, row: list[Text], some: list[int]) -> Text:
        """The cells `some` of a row, each as wide as its column."""
        from rich.text import Text

        line = Text(overflow="fold")
        for number, i in enumerate(some):
            blank = " " * (self._width(i) - row[i].cell_len)
            before, after = ("", blank) if self._heads[i] in self._left else (blank, "")
            line.append(" " * GAP * bool(number) + before).append_text(row[i]).append(after)
        line.rstrip()
        return line
