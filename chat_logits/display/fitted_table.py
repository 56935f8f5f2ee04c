"""Tables in the terminal that are as wide as their place, and no wider."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from chat_logits.display.token_report import Column, print_table

PIPE_WIDTH = 160  # cells, where there is no terminal to fit
BAR, LEAST_BAR = 50, 9  # cells of a share and its bar
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Part:
    """A table's column before its width is known: ``least`` cells, or as many up to ``most`` as are left to it.

    ``cells`` are its texts, or what gives them for a width.
    """

    title: str
    cells: list[str] | Callable[[int], list[str]]
    least: int
    most: int


def numbers(title: str, cells: Iterable[str]) -> Part:
    """A column of numbers, which stand at its right end and are never cut."""
    cells = list(cells)
    width = max(map(cell_len, [title, *cells]))
    return Part(f"{title:>{width}}", [f"{cell:>{width}}" for cell in cells], width, width)


def labels(title: str, cells: list[str]) -> Part:
    """A column of short texts, which are never cut."""
    width = max(map(cell_len, [title, *cells]))
    return Part(title, cells, width, width)


def shares(title: str, counts: list[int]) -> Part:
    """A column of each count's share of all, with a bar as long as the count is beside the largest one."""
    total, largest = max(1, sum(counts)), max(1, *counts)

    def cells(width: int) -> list[str]:
        return [f"{count / total:>6.1%} {bar(count / largest, width - 7)}".rstrip() for count in counts]

    return Part(title, cells, max(LEAST_BAR, len(title)), BAR)


def print_fitting(parts: list[Part], spare: Iterable[str], console: Console) -> None:
    """Print a table as wide as its place, without the columns titled ``spare``, in this order, until the others fit."""
    width = fitting_width(console)
    for title in spare:
        if _least(parts) > width:
            parts = [part for part in parts if part.title.strip() != title]
    left, columns = max(0, width - _least(parts)), []
    for i, part in enumerate(parts):
        growing = sum(other.most > other.least for other in parts[i:])
        more = min(part.most - part.least, left // max(1, growing))
        left -= more
        columns.append(Column(part.title, part.least + more))
    found = [
        part.cells(column.width) if callable(part.cells) else part.cells
        for part, column in zip(parts, columns, strict=True)
    ]
    print_table(columns, zip(*found, strict=True), console)


def _least(parts: list[Part]) -> int:
    return sum(part.least for part in parts) + 3 * (len(parts) - 1)


def fitting_width(console: Console) -> int:
    """The cells that a table may take."""
    return console.width if console.is_terminal else PIPE_WIDTH


def print_line(text: str, console: Console, style: str = "") -> None:
    """Print a line, or in a terminal the several that it needs there."""
    console.print(Text(text, style), soft_wrap=not console.is_terminal)


def bar(share: float, width: int) -> str:
    """A share of 1 as a bar of at most ``width`` cells, in eighths of a cell.

    >>> bar(0.5, 4), bar(0.4, 4)
    ('██', '█▋')
    """
    full, eighths = divmod(round(share * width * 8), 8)
    return ("█" * full + EIGHTHS[eighths]).rstrip()


def short_nats(nats: float, sign: str = "") -> str:
    """A logarithm in at most seven cells; that of a masked token can be −10³⁸.

    >>> short_nats(-12.345), short_nats(-3.4e38), short_nats(0.5, "+")
    ('-12.35', '-3e+38', '+0.50')
    """
    return f"{nats:{sign}.2f}" if abs(nats) < 999.5 else f"{nats:{sign}.0e}"
