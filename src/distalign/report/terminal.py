"""Tables that fit a terminal: whole columns, as many as there is room for, and never half a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Texts:
    """A column: what stands above it, and a text for every row."""

    heading: str
    cells: Sequence[Text | str]
    right: bool = True


@dataclass(frozen=True)
class Fitting:
    """A table whose first column names the rows; of the others, the most important first, those that fit are shown.

    With `wide` the rest follows in further tables below it, at any width. `line_after` is the row after which a line is
    drawn. `note` stands below.
    """

    names: Texts
    columns: Sequence[Texts]
    title: str = ""
    note: str = ""
    line_after: int | None = None

    def at(self, width: int, *, wide: bool = False) -> Group:
        """The tables for a terminal of that many characters."""
        parts = list(self._parts(width))
        shown, hidden = (parts, []) if wide else (parts[:1], [column for part in parts[1:] for column in part])
        tables = [self._table(part) for part in shown]
        titles = [Text(self.title, "bold")] if self.title else []
        notes = [self.note] if self.note else []
        if hidden:
            names = ", ".join(column.heading.partition("\n")[0] for column in hidden)
            notes.append(f"with --wide: {names}")
        return Group(*titles, *tables, *(Text(note, "dim italic") for note in notes))

    def _parts(self, width: int) -> Iterable[list[Texts]]:
        """The columns, in parts that each fit beside the names; a column too wide for any is a part by itself."""
        measure = Console(width=10_000)
        part: list[Texts] = []
        for column in self.columns:
            if part and measure.measure(self._table([*part, column])).maximum > width:
                yield part
                part = []
            part.append(column)
        yield part

    def _table(self, columns: Sequence[Texts]) -> Table:
        table = Table(box=box.HORIZONTALS)
        # However narrow the terminal, a row keeps its name.
        longest = max((len(str(cell)) for cell in self.names.cells), default=0)
        table.add_column(Text(self.names.heading), no_wrap=True, min_width=longest)
        for column in columns:
            # One that no terminal of this width has room for is broken between words.
            whole = len(columns) > 1
            table.add_column(Text(column.heading), justify="right" if column.right else "left", no_wrap=whole)
        for row, cells in enumerate(zip(*(column.cells for column in (self.names, *columns)), strict=True)):
            texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
            table.add_row(*texts, end_section=row == self.line_after)
        return table
