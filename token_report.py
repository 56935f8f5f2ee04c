"""An analysis as a table in the terminal, and a conversation before it is extracted."""

import itertools
import math
import unicodedata

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from token_analysis import EXTRACTED, PROMPT, SKIPPED, TokenAnalysis

PROMPT_END = 4  # prompt tokens shown before each answer
TOKEN_WIDTH, PREDICTIONS_WIDTH, OWN_WIDTH = 30, 60, 15
ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}


class PipeConsole(Console):
    """A console that leaves a closed pipe to the command, instead of ending the process itself."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_token_table(tokens: list[TokenAnalysis], top_n: int, console: Console | None = None) -> None:
    """Print "Detailed Token Analysis:", a line a token. A terminal gets lines that fit it, a pipe whole ones."""
    console = console or PipeConsole(highlight=False)
    shown = [token for i, token in enumerate(tokens) if _is_shown(tokens, i)]
    widths = _column_widths(shown, console)
    rule = sum(widths) + 6
    console.print("Detailed Token Analysis:", markup=False, style="bold")
    console.print("=" * rule, markup=False, soft_wrap=True)
    header = ("Real Token", f"Extracted Predictions (Top {top_n})", "Own p   Rank")
    console.print(_line(*(Text(cell) for cell in header), widths), soft_wrap=True)
    console.print("-" * rule, markup=False, soft_wrap=True)
    for token in shown:
        console.print(_token_line(token, widths), soft_wrap=True)


def _is_shown(tokens: list[TokenAnalysis], i: int) -> bool:
    ahead = tokens[i : i + PROMPT_END + 1]
    return any(token.status != PROMPT for token in ahead)


def _column_widths(tokens: list[TokenAnalysis], console: Console) -> tuple[int, int, int]:
    """Cells of the three columns."""
    needed = max((cell_len(_predictions(token).plain) for token in tokens), default=0)
    needed = max(needed, PREDICTIONS_WIDTH // 2)
    if not console.is_terminal:
        return TOKEN_WIDTH, needed, OWN_WIDTH
    token_width = TOKEN_WIDTH if console.width >= 100 else 18
    return token_width, min(needed, max(20, console.width - token_width - OWN_WIDTH - 6)), OWN_WIDTH


def _token_line(token: TokenAnalysis, widths: tuple[int, int, int]) -> Text:
    predictions = _predictions(token, widths[1])
    if token.status == EXTRACTED:
        own = Text(f"{_short_probability(token.log_prob):>5}   {_rank(token):>4}")
        return _line(Text(quoted(token.text)), predictions, own, widths)
    line = _line(Text(quoted(token.text)), predictions, Text(""), widths)
    line.stylize("bright_black")
    return line


def _predictions(token: TokenAnalysis, width: int | None = None) -> Text:
    """The predictions, ``"The"(0.85), "A"(0.10)``, as many as fit, the real token's marked; or why there are none."""
    if token.status != EXTRACTED:
        return Text("(prompt)" if token.status == PROMPT else f"({SKIPPED}: {token.reason})")
    cell = Text()
    for rank, prediction in enumerate(token.predictions, start=1):
        mark, style = ("*", "bold green") if rank == token.rank else ("", "")
        entry = f"{quoted(prediction.text)}({prediction.probability:.2f}){mark}"
        separator = ", " if rank > 1 else ""
        if rank > 1 and width is not None and cell_len(cell.plain + separator + entry) > width:
            break
        cell.append(separator)
        cell.append(entry, style)
    return cell


def _rank(token: TokenAnalysis) -> str:
    return str(token.rank) if token.rank else f">{token.kept}"


def _short_probability(log_prob: float) -> str:
    probability = math.exp(log_prob)
    return f"{probability:.2f}" if probability >= 0.005 else f"{probability:.0e}"


def _line(token: Text, predictions: Text, own: Text, widths: tuple[int, int, int]) -> Text:
    cells = [_fit(cell, width) for cell, width in zip((token, predictions, own), widths, strict=True)]
    line = Text(" | ").join(cells)
    line.rstrip()
    return line


def _fit(cell: Text, width: int) -> Text:
    """The cell at exactly ``width`` columns, cut with an ellipsis where it is longer."""
    if cell_len(cell.plain) > width:
        kept = len(set_cell_size(cell.plain, width - 1).rstrip())
        cell = Text.assemble(cell[:kept], "…")
    return Text.assemble(cell, " " * (width - cell_len(cell.plain)))


def print_preview(title: str, tokens: list[TokenAnalysis], console: Console | None = None) -> None:
    """Print a conversation in runs of prompt, extracted and skipped tokens, told apart by word and by colour."""
    console = console or PipeConsole(highlight=False)
    extracted = sum(token.status == EXTRACTED for token in tokens)
    console.print(f"{title}: {len(tokens)} tokens, {extracted} extracted", markup=False, style="bold", soft_wrap=True)
    for (status, reason), run in itertools.groupby(tokens, key=lambda token: (token.status, token.reason)):
        texts = [token.text for token in run]
        line = f"  {status:<9} {len(texts):>5}  {quoted(''.join(texts), space=' ')}"
        line += f"  ({reason})" if status == SKIPPED else ""
        console.print(line, markup=False, style="bold green" if status == EXTRACTED else "bright_black", soft_wrap=True)


def quoted(text: str, space: str = "␣") -> str:
    """The text in quotes, on one line, with spaces visible and anything a terminal would act on escaped.

    >>> quoted(" a\n")
    '"␣a\\n"'
    """
    shown = "".join(space if character == " " else _visible(character) for character in text)
    if shown and unicodedata.combining(shown[0]):
        shown = f"◌{shown}"
    return f'"{shown}"'


def _visible(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a partial character, PEP 383
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
