"""An analysis in the terminal: tables whose columns line up by cells, and a conversation before it is extracted."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, Prediction, TokenAnalysis, Totals, text_before
from chat_logits.display.text import quoted

GREY, UNEXPECTED, NOT_STORED = "bright_black", "yellow", "bold red"
NARROW, WIDE = 60, 110  # cells: narrower terminals show no numbers, wider ones also tail and entropy
CONTEXT, PLACE = 30, 6  # cells of a chosen token's place with the text before it, and without
NOTEBOOK_WIDTH = 110  # cells


class PipeConsole(Console):
    """A console that leaves a closed pipe to the command, instead of ending the process itself."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def default_console() -> Console:
    """Standard output. A notebook is taken for a terminal: it shows colours, and a table stays one text."""
    if Console().is_jupyter:
        as_terminal = {"force_jupyter": False, "force_terminal": True, "color_system": "standard"}
        return PipeConsole(highlight=False, width=NOTEBOOK_WIDTH, **as_terminal)
    return PipeConsole(highlight=False)


@dataclass(frozen=True)
class Column:
    """A column of a table and its width in cells."""

    title: str
    width: int


# --- tables ---


def print_table(columns: list[Column], rows: Iterable[list[str | Text]], console: Console) -> None:
    """Print rows of cells under their titles, each cell cut to its column's width."""
    rule = sum(column.width for column in columns) + 3 * (len(columns) - 1)
    console.print("=" * rule, markup=False, soft_wrap=True)
    console.print(_line([column.title for column in columns], columns), soft_wrap=True)
    console.print("-" * rule, markup=False, soft_wrap=True)
    for cells in rows:
        console.print(_line(cells, columns), soft_wrap=True)


def _line(cells: list[str | Text], columns: list[Column]) -> Text:
    fitted = [fit(cell, column.width) for cell, column in zip(cells, columns, strict=True)]
    line = Text(" | ").join(fitted)
    line.rstrip()
    return line


def fit(cell: str | Text, width: int) -> Text:
    """The cell at exactly ``width`` columns, cut with an ellipsis where it is longer."""
    cell = Text(cell) if isinstance(cell, str) else cell
    if cell_len(cell.plain) > width:
        kept = len(set_cell_size(cell.plain, width - 1).rstrip())
        cell = Text.assemble(cell[:kept], Text("…"))
    return Text.assemble(cell, " " * (width - cell_len(cell.plain)))


# --- tokens ---


def print_token_table(tokens: list[TokenAnalysis], top_n: int, console: Console) -> None:
    """Print "Detailed Token Analysis:", a line a token. A terminal gets lines that fit it, a pipe whole ones."""
    console.print("Detailed Token Analysis:", markup=False, style="bold", soft_wrap=True)
    columns = _token_columns(tokens, top_n, console, 0)
    print_table(columns, (_token_cells(token, columns) for token in tokens), console)


def print_chosen_tokens(chosen: list[TokenAnalysis], tokens: list[TokenAnalysis], top_n: int, console: Console) -> None:
    """As ``print_token_table``, for some of a conversation's ``tokens``, with where each of them stands."""
    console.print("Detailed Token Analysis:", markup=False, style="bold", soft_wrap=True)
    width = table_width(console)
    place = 0 if width < NARROW else PLACE if width < WIDE else CONTEXT
    columns = _token_columns(chosen, top_n, console, place + 3 if place else 0)
    places = [where(token.position, text_before(token.position, tokens), place) for token in chosen]
    rows = ([*_token_cells(token, columns), found] for token, found in zip(chosen, places, strict=True))
    if place:
        print_table([*columns, Column("Where", place)], rows, console)
    else:
        print_table(columns, (row[:-1] for row in rows), console)


def table_width(console: Console) -> float:
    """The terminal's width in cells; a pipe has no end."""
    return console.width if console.is_terminal else math.inf


def where(position: int, before: str, width: int = CONTEXT) -> str:
    """A token's place and the end of the text before it, ``#41 …the␣end``, in ``width`` cells, or the place alone."""
    number, before = f"#{position} …", before[-width:] if width else ""
    while before and cell_len(number + quoted(before, space=" ")[1:-1]) > width:
        before = before[1:]
    return number + quoted(before, space=" ")[1:-1] if before else number[:-2]


def _token_columns(tokens: list[TokenAnalysis], top_n: int, console: Console, reserved: int) -> list[Column]:
    """The columns that fit; ``reserved`` cells are left for others."""
    needed = max((cell_len(predictions_cell(token).plain) for token in tokens), default=0)
    title = f"Extracted Predictions (Top {top_n})"
    width = table_width(console)
    if width < NARROW + reserved:
        token = max(8, int(width) // 3)
        return [Column("Real Token", token), Column(title, max(8, int(width) - token - 3 - reserved))]
    numbers = _numbers_title(width >= WIDE + reserved)
    token = 30 if width >= 100 + reserved else 18
    room = width - token - len(numbers) - 6 - reserved
    return [
        Column("Real Token", token),
        Column(title, int(min(max(needed, 30), max(20, room)))),
        Column(numbers, len(numbers)),
    ]


def _numbers_title(is_wide: bool) -> str:
    return "Own p   Rank   Tail   Entropy" if is_wide else "Own p   Rank"


def _token_cells(token: TokenAnalysis, columns: list[Column]) -> list[str | Text]:
    predictions = predictions_cell(token, columns[1].width)
    cells = [Text(quoted(token.text), style=_style(token)), predictions]
    if token.status != EXTRACTED:
        predictions.stylize(GREY)
    return [*cells, _numbers(token, columns[2].title == _numbers_title(True))] if len(columns) > 2 else cells


def _style(token: TokenAnalysis) -> str:
    if token.status != EXTRACTED:
        return GREY
    return NOT_STORED if token.rank is None else UNEXPECTED if token.rank > 1 else ""


def predictions_cell(token: TokenAnalysis, width: int | None = None) -> Text:
    """The predictions, ``"The"(0.85), "A"(0.10)``, as many as fit, the real token's marked; or why there are none."""
    if token.status != EXTRACTED:
        return Text("(prompt)" if token.status == PROMPT else f"({SKIPPED}: {token.reason})")
    cell = Text()
    for rank, prediction in enumerate(token.predictions, start=1):
        mark, style = ("*", "bold green") if rank == token.rank else ("", "")
        entry = f"{prediction_text(prediction)}{mark}"
        separator = ", " if rank > 1 else ""
        if rank > 1 and width is not None and cell_len(cell.plain + separator + entry) > width:
            break
        cell.append(separator)
        cell.append(entry, style)
    return cell


def _numbers(token: TokenAnalysis, is_wide: bool) -> str:
    if token.status != EXTRACTED:
        return ""
    numbers = f"{short_probability(token.probability):>5}   {rank_text(token):>4}"
    return f"{numbers}   {token.tail_mass:>4.2f}   {_entropy(token):>7}" if is_wide else numbers


def _entropy(token: TokenAnalysis) -> str:
    return f"{'≥' if token.entropy_is_bound else ''}{token.entropy:.2f}"


def rank_text(token: TokenAnalysis) -> str:
    """The real token's rank, or ``>k`` where it is not among the k stored ones."""
    return str(token.rank) if token.rank else f">{token.kept}"


def short_probability(probability: float) -> str:
    """Two digits of a probability.

    >>> short_probability(0.854), short_probability(0.00042)
    ('0.85', '4e-04')
    """
    return f"{probability:.2f}" if probability >= 0.005 else f"{probability:.0e}"


def short_perplexity(perplexity: float) -> str:
    """A perplexity in at most ten characters."""
    return f"{perplexity:,.2f}" if perplexity < 999_999.995 else f"{perplexity:.1e}"


def entropy_text(nats: float, is_bound: bool) -> str:
    """An entropy in nats, told as a lower bound where it is one."""
    return f"{'≥ ' if is_bound else ''}{nats:.2f} nats"


def prediction_text(prediction: Prediction | None) -> str:
    """A prediction as text, ``"The"(0.85)``."""
    return f"{quoted(prediction.text)}({short_probability(prediction.probability)})" if prediction else ""


def count_text(count: int, what: str) -> str:
    """A count and what is counted, such as "1 token" or "1,024 tokens"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def print_parts(parts: list[str], console: Console) -> None:
    """Print an answer's numbers: a line, or several where the terminal is narrow."""
    lines = [parts[0]]
    for part in parts[1:]:
        joined = f"{lines[-1]} · {part}"
        lines[-1:] = [joined] if cell_len(joined) <= table_width(console) else [lines[-1], part]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def totals_parts(totals: Totals) -> list[str]:
    """The totals in words."""
    return [
        count_text(totals.num_tokens, "token"),
        f"perplexity {short_perplexity(totals.perplexity)}",
        f"top-1 agreement {totals.top1_rate:.1%}",
        f"mean entropy {entropy_text(totals.mean_entropy, totals.entropy_is_bound)}",
        f"{totals.stored:.1%} of the probability stored",
    ]


# --- before the extraction ---


def print_preview(title: str, tokens: list[TokenAnalysis], console: Console | None = None) -> None:
    """Print a conversation in runs of prompt, extracted and skipped tokens, told apart by word and by colour."""
    console = console or default_console()
    extracted = sum(token.status == EXTRACTED for token in tokens)
    console.print(f"{title}: {len(tokens)} tokens, {extracted} extracted", markup=False, style="bold", soft_wrap=True)
    for (status, reason), run in itertools.groupby(tokens, key=lambda token: (token.status, token.reason)):
        texts = [token.text for token in run]
        line = f"  {status:<9} {len(texts):>5}  {quoted(''.join(texts), space=' ')}"
        line += f"  ({reason})" if status == SKIPPED else ""
        console.print(line, markup=False, style="bold green" if status == EXTRACTED else GREY, soft_wrap=True)
