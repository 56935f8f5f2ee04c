"""The plan of a run in the terminal: one figure per line, with its source."""

from collections.abc import Callable, Sequence

from rich.console import Console

from chat_logits.display.tables import Column, Table, labels, numbers, print_line, print_table, print_title
from chat_logits.display.text import line_of
from chat_logits.extraction.plan import BYTES, COUNT, FLOPS, SECONDS, Figure, Plan

UNKNOWN = "not known"
SOURCE_LEAST, SOURCE_MOST = 24, 100  # cells
PREFIXES = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def print_plan(plan: Plan, console: Console, typed: Callable[[str], str] = str) -> None:
    """Print the figures under their headings; ``typed`` turns options in backquotes into what a user types."""
    over = f" over {line_of(plan.dataset_id)}" if plan.dataset_id else ""
    print_line(f"Plan of {line_of(plan.model_id)}{over}: no weights read, nothing written", console, "bold")
    for title, figures in plan.sections.items():
        print_title(line_of(title), console)
        print_table(_table(title, figures, typed), console)


def _table(title: str, figures: Sequence[Figure], typed: Callable[[str], str]) -> Table:
    sources = [line_of(typed(figure.source)) for figure in figures]
    columns = [
        labels("", [figure.name for figure in figures]),
        numbers("Amount", map(amount_text, figures)),
        Column("From", sources, SOURCE_LEAST, SOURCE_MOST, is_wrapped=True),
    ]
    return Table(title, columns)


def amount_text(figure: Figure) -> str:
    """A figure with its unit, and its standard error.

    >>> amount_text(Figure("output", 1.5e9, BYTES, "", 2e7)), amount_text(Figure("time", 5400, SECONDS, ""))
    ('1.5 ± 0.02 GB', '1.5 h')
    """
    if figure.value is None:
        return UNKNOWN
    return {COUNT: _count_text, BYTES: _scaled, FLOPS: _scaled, SECONDS: _time_text}[figure.unit](figure)


def _count_text(figure: Figure) -> str:
    value = figure.value or 0
    digits = ",.0f" if value == int(value) or value >= 1000 else ",.1f" if value >= 1 else ".2g"
    return f"{value:{digits}} ± {figure.error:{digits}}" if figure.error else f"{value:{digits}}"


def _scaled(figure: Figure) -> str:
    value, unit = figure.value or 0.0, "B" if figure.unit == BYTES else "FLOP"
    prefix, factor = next((one for one in PREFIXES if value >= one[1]), PREFIXES[-1])
    error = f" ± {figure.error / factor:.2g}" if figure.error else ""
    return f"{value / factor:,.1f}{error} {prefix}{unit}"


def _time_text(figure: Figure) -> str:
    value = figure.value or 0.0
    unit, factor = next((one for one in (("h", 3600), ("min", 60)) if value >= one[1]), ("s", 1))
    return f"{value / factor:{',.1f' if value >= 1 else '.2g'}} {unit}"
