"""Tables, described once and drawn in two ways: by rich to fit the terminal, and as rows of a page."""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.text import Text

from chat_logits.display.text import line_of

PIPE_WIDTH = 160  # cells, without a terminal and without the environment variable COLUMNS
NOTEBOOK_WIDTH, LEAST_WIDTH = 110, 20  # cells
BAR, LEAST_BAR = 50, 9  # cells of a share and its bar
EIGHTHS = " ▏▎▍▌▋▊▉"
WORDS_LEAST = 0.4  # share of a place's cells that whole words must fill; else the first word is cut
GAP = 3  # cells between two columns
LEAST_CONTEXT = 8  # cells of the text before a token; in less room it is left out
LINES = Box("    \n  | \n----\n  | \n    \n    \n  | \n    \n")  # as the README shows them


class PipeConsole(Console):
    """A console that leaves a closed pipe to the command, instead of ending the process itself."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def default_console() -> Console:
    """Standard output. A notebook is treated as a terminal: it shows colours, and a table stays one text."""
    if Console().is_jupyter:
        as_terminal: dict[str, Any] = {"force_jupyter": False, "force_terminal": True, "color_system": "standard"}
        return PipeConsole(highlight=False, width=NOTEBOOK_WIDTH, **as_terminal)
    return PipeConsole(highlight=False)


# --- descriptions ---

Cells = Sequence[str | Text]


@dataclass(frozen=True)
class Column:
    """A table's column: at least ``least`` cells wide, and up to ``most`` if there is room.

    ``cells`` are its texts, or a function that gives them for a width. Numbers are right-aligned. In the terminal, a
    column that ``is_joined`` shares a column with the one before it, two spaces apart, and one that ``is_wrapped``
    breaks longer texts into several lines instead of cutting them.
    """

    title: str
    cells: Cells | Callable[[int], Cells]
    least: int
    most: int
    is_number: bool = False
    is_joined: bool = False
    is_wrapped: bool = False

    def cells_at(self, width: int) -> Cells:
        """The texts for a width in cells."""
        return self.cells(width) if callable(self.cells) else self.cells


@dataclass(frozen=True)
class Table:
    """A table with a title. In a narrow terminal, the columns named ``spare`` are left out, in this order."""

    title: str
    columns: list[Column]
    spare: tuple[str, ...] = ()

    @property
    def rows(self) -> list[tuple[str | Text, ...]]:
        """Its cells at their widest, row by row."""
        return list(zip(*(column.cells_at(column.most) for column in self.columns), strict=True))


def numbers(title: str, cells: Iterable[str], least: int = 0, is_joined: bool = False) -> Column:
    """A column of numbers, which are never cut."""
    cells = list(cells)
    width = max(least, *map(cell_len, [title, *cells]))
    return Column(title, cells, width, width, is_number=True, is_joined=is_joined)


def labels(title: str, cells: Iterable[str]) -> Column:
    """A column of short texts, which are never cut."""
    cells = list(cells)
    width = max(map(cell_len, [title, *cells]))
    return Column(title, cells, width, width)


def shares(title: str, counts: Sequence[int]) -> Column:
    """A column of each count's share of all, with a bar relative to the largest count."""
    total, largest = max(1, sum(counts)), max(1, *counts)

    def cells(width: int) -> list[str]:
        return [f"{count / total:>6.1%} {bar(count / largest, width - 7)}".rstrip() for count in counts]

    return Column(title, cells, max(LEAST_BAR, len(title)), BAR)


def bar(share: float, width: int) -> str:
    """A share of 1 as a bar of at most ``width`` cells, in eighths of a cell.

    >>> bar(0.5, 4), bar(0.4, 4)
    ('██', '█▋')
    """
    full, eighths = divmod(round(share * width * 8), 8)
    return ("█" * full + EIGHTHS[eighths]).rstrip()


def where(position: int, before: str, width: int) -> str:
    """A token's place and the end of the text before it, ``#41 …the end``, in ``width`` cells, or the place alone."""
    number = f"#{position} …"
    room = width - cell_len(number)
    end = text_end(before, room) if room >= LEAST_CONTEXT else ""
    return number + end if end else f"#{position}"


def text_end(text: str, width: int) -> str:
    """As much of a text's end, escaped, as fits in ``width`` cells, from the beginning of a word if one is near.

    >>> text_end("leads to the start", 11)
    'the start'
    """
    end = text[-width:] if width > 0 else ""
    while end and cell_len(line_of(end)) > width:
        end = end[1:]
    before = text[: len(text) - len(end)]
    if before and end and not (before[-1].isspace() or end[0].isspace()):
        _cut, *words = re.split(r"\s+", end, maxsplit=1)
        end = words[0] if words and cell_len(line_of(words[0])) >= width * WORDS_LEAST else end
    return line_of(end)


# --- in the terminal ---


def print_table(table: Table, console: Console) -> None:
    """Print a table to fit its place."""
    width, columns = fitting_width(console), table.columns
    for title in table.spare:
        if _least(columns) > width:
            columns = [column for column in columns if column.title != title]
    columns = _joined(columns)
    left, fitted = max(0, width - _least(columns)), []
    for i, column in enumerate(columns):
        growing = sum(other.most > other.least for other in columns[i:])
        more = min(column.most - column.least, left // max(1, growing))
        left -= more
        fitted.append((column, column.least + more))
    draw(fitted, console)


def _least(columns: list[Column]) -> int:
    columns = _joined(columns)
    return sum(column.least for column in columns) + GAP * (len(columns) - 1)


def _joined(columns: list[Column]) -> list[Column]:
    joined: list[Column] = []
    for column in columns:
        if column.is_joined and joined:
            pairs = zip(_padded(joined.pop()), _padded(column), strict=True)
            title, *cells = (f"{left}  {right}" for left, right in pairs)
            column = numbers(title, cells)
        joined.append(column)
    return joined


def _padded(column: Column) -> list[str]:
    return [f"{cell:>{column.least}}" for cell in (column.title, *column.cells_at(column.least))]


def draw(columns: Sequence[tuple[Column, int]], console: Console) -> None:
    """Print columns at these widths in cells; longer cells are cut, and lines do not end in spaces."""
    rule = sum(width for _, width in columns) + GAP * (len(columns) - 1)
    table = rich.table.Table(box=LINES, show_edge=False, pad_edge=False, header_style="", width=rule)
    for column, width in columns:
        justify: JustifyMethod = "right" if column.is_number else "left"
        cut: Any = {"overflow": "fold"} if column.is_wrapped else {"overflow": "ellipsis", "no_wrap": True}
        table.add_column(Text(column.title), width=width, justify=justify, **cut)
    for row in zip(*(column.cells_at(width) for column, width in columns), strict=True):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print("=" * rule, markup=False, soft_wrap=True)
    for segments in console.render_lines(table, console.options.update(width=rule), pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)


def fit(text: str | Text, width: int) -> Text:
    """The text in at most ``width`` cells; a longer one is cut with an ellipsis."""
    fitted = Text(text) if isinstance(text, str) else text.copy()
    fitted.truncate(width, overflow="ellipsis")
    return fitted


def line_width(console: Console) -> float:
    """The cells that a line may take: the terminal's width; unlimited in a pipe."""
    return console.width if console.is_terminal else math.inf


def fitting_width(console: Console) -> int:
    """The cells that a table may take: the terminal's width; in a pipe COLUMNS if set, else ``PIPE_WIDTH``."""
    if console.is_terminal:
        return console.width
    asked = os.environ.get("COLUMNS", "")
    return max(LEAST_WIDTH, int(asked)) if asked.isdecimal() else PIPE_WIDTH


def print_title(title: str, console: Console) -> None:
    """Print a table's title, uncut."""
    console.print(title, markup=False, style="bold", soft_wrap=True)


def print_line(text: str, console: Console, style: str = "") -> None:
    """Print a line; a terminal wraps it."""
    console.print(Text(text, style), soft_wrap=not console.is_terminal)


def print_parts(parts: list[str], console: Console) -> None:
    """Print totals in a line, or in several if the terminal is narrow."""
    lines = [parts[0]]
    for part in parts[1:]:
        joined = f"{lines[-1]} · {part}"
        lines[-1:] = [joined] if cell_len(joined) <= line_width(console) else [lines[-1], part]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
