"""A conversation token by token in the terminal, for one model or two, and a preview before it is extracted."""

import itertools
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.divergence import ComparisonTotals, Source, TokenComparison
from chat_logits.analysis.tokens import (
    EXTRACTED,
    PROMPT,
    SKIPPED,
    TokenAnalysis,
    Totals,
    near_answers,
    text_before,
    whole_characters,
)
from chat_logits.display.formats import (
    entropy_text,
    prediction_text,
    rank_text,
    short_nats,
    short_perplexity,
    short_probability,
)
from chat_logits.display.tables import (
    GAP,
    Column,
    default_console,
    draw,
    fit,
    fitting_width,
    line_width,
    print_line,
    print_parts,
    print_title,
    where,
)
from chat_logits.display.text import line_of, quoted
from chat_logits.words import count_text

GREY, UNEXPECTED, NOT_STORED = "bright_black", "yellow", "bold red"
OWN_NUMBERS, ALL_NUMBERS = "Own p   Rank", "Own p   Rank   Tail   Entropy"
NARROW, WIDE = 60, 110  # cells: narrower terminals show no numbers, wider ones also tail and entropy
CONTEXT, PLACE = 30, 6  # cells for a chosen token's place with the text before it, and without
APART = "≠"  # marks that the two models' most probable tokens differ
FULL, PLACED = 70, 80  # cells below which comparisons show no Δ log p, and no text before chosen tokens

Cell = str | Text


# --- one model ---


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print "Detailed Token Analysis:" with row and model, a line per token, and the totals.

    Lines fit their place; tokens chosen by ``only`` are shown with their place.
    """
    source = source_text(analysis.dataset_id, analysis.model_id)
    print_line(f"Detailed Token Analysis: row {analysis.sample_index} of {source}", console, "bold")
    width = fitting_width(console)
    if analysis.only is None:
        _draw_tokens(analysis.table, analysis.top_n, width, console)
    else:
        place = 0 if width < NARROW else PLACE if width < WIDE else CONTEXT
        reserved = place + GAP if place else 0
        _draw_tokens(analysis.shown, analysis.top_n, width, console, reserved, analysis.tokens)
    print_parts(totals_parts(analysis.totals), console)


def _draw_tokens(
    tokens: list[TokenAnalysis],
    top_n: int,
    width: float,
    console: Console,
    reserved: int = 0,
    all_tokens: Sequence[TokenAnalysis] = (),
) -> None:
    """Print the tokens' table; ``reserved`` cells of its ``width`` are for their places among ``all_tokens``."""
    token, predictions, title = _token_widths(tokens, width, reserved)
    columns = [
        _column("Real Token", token, (Text(quoted(each.text), style=_style(each)) for each in tokens)),
        _column(
            _top_title("Extracted Predictions", tokens, top_n, predictions),
            predictions,
            (_predictions(t, predictions) for t in tokens),
        ),
    ]
    if title:
        columns.append(_column(title, len(title), (_numbers(each, title == ALL_NUMBERS) for each in tokens)))
    draw([*columns, *_places(tokens, all_tokens, reserved)], console)


def _token_widths(tokens: list[TokenAnalysis], width: float, reserved: int) -> tuple[int, int, str]:
    """Cells for the tokens and for the predictions, and the title of the numbers, "" if there is no room for them."""
    if width < NARROW + reserved:
        token = max(8, int(width) // 3)
        return token, max(8, int(width) - token - GAP - reserved), ""
    title = ALL_NUMBERS if width >= WIDE + reserved else OWN_NUMBERS
    token = 30 if width >= 100 + reserved else 18
    needed = max((cell_len(predictions_cell(each).plain) for each in tokens), default=0)
    room = width - token - len(title) - 2 * GAP - reserved
    return token, int(min(max(needed, 30), max(20, room))), title


def _column(title: str, width: int, cells: Iterable[Cell]) -> tuple[Column, int]:
    return Column(title, list(cells), width, width), width


def _places(
    tokens: list[TokenAnalysis], all_tokens: Sequence[TokenAnalysis], reserved: int
) -> list[tuple[Column, int]]:
    """The column of the tokens' places, or none."""
    if not reserved:
        return []
    width = reserved - GAP
    cells = (where(each.position, text_before(each.position, all_tokens), width) for each in tokens)
    return [_column("Where", width, cells)]


def _style(token: TokenAnalysis) -> str:
    if token.status != EXTRACTED:
        return GREY
    return NOT_STORED if token.rank is None else UNEXPECTED if token.rank > 1 else ""


def _predictions(token: TokenAnalysis, width: int) -> Text:
    cell = predictions_cell(token, width)
    if token.status != EXTRACTED:
        cell.stylize(GREY)
    return cell


def predictions_cell(token: TokenAnalysis, width: int | None = None) -> Text:
    """The predictions, ``"The"(0.85), "A"(0.10)``, as many as fit, the target marked; or why there are none."""
    if token.status != EXTRACTED:
        return Text("(prompt)" if token.status == PROMPT else f"({SKIPPED}: {token.reason})")
    return _joined_predictions(token, width)[0]


def _joined_predictions(token: TokenAnalysis, width: int | None) -> tuple[Text, int]:
    """The predictions of an extracted token that fit, at least the first one, and their number."""
    cell = Text()
    for rank, prediction in enumerate(token.predictions, start=1):
        mark, style = ("*", "bold green") if rank == token.rank else ("", "")
        entry = f"{prediction_text(prediction)}{mark}"
        separator = ", " if rank > 1 else ""
        if rank > 1 and width is not None and cell_len(cell.plain + separator + entry) > width:
            return cell, rank - 1
        cell.append(separator)
        cell.append(entry, style)
    return cell, len(token.predictions)


def _top_title(name: str, tokens: list[TokenAnalysis], top_n: int, width: int) -> str:
    """The heading of predictions in ``width`` cells: how many of the ``top_n`` most probable ones are shown.

    If some are left out for lack of room, it gives the fewest and the most shown for a token.
    """
    extracted = [token for token in tokens if token.status == EXTRACTED]
    counts = [(_joined_predictions(token, width)[1], len(token.predictions)) for token in extracted]
    cut = [shown for shown, stored in counts if shown < stored]
    top = f"Top {top_n}"
    if cut:
        fewest, most = min(cut), max(shown for shown, _ in counts)
        top = f"Top {fewest}{f'–{most}' * (most > fewest)} of {top_n}"
    titles = f"{name} ({top})", f"{name.split()[-1]}, {top}", top, name
    return next((title for title in titles if cell_len(title) <= width), name)


def _numbers(token: TokenAnalysis, is_wide: bool) -> str:
    if token.status != EXTRACTED:
        return ""
    assert token.probability is not None
    numbers = f"{short_probability(token.probability):>5}   {rank_text(token):>4}"
    entropy = f"{'≥' if token.entropy_is_bound else ''}{token.entropy:.2f}"
    return f"{numbers}   {token.tail_mass:>4.2f}   {entropy:>7}" if is_wide else numbers


def totals_parts(totals: Totals) -> list[str]:
    """An answer's totals as text."""
    return [
        count_text(totals.num_tokens, "token"),
        f"perplexity {short_perplexity(totals.perplexity)}",
        f"top-1 agreement {totals.top1_rate:.1%}",
        f"mean entropy {entropy_text(totals.mean_entropy, totals.entropy_is_bound)}",
        f"{totals.stored:.1%} of the probability stored",
    ]


# --- two models ---


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a line per token with both models' predictions, the end of a prompt before each answer, and the totals.

    Lines fit their place; tokens chosen by ``only`` are shown with their place.
    """
    rows = f"row {comparison.sample_index} of ", f"row {comparison.other_sample_index} of "
    print_sources("Detailed Token Comparison", comparison.first, comparison.other, console, rows)
    width = fitting_width(console)
    if comparison.only is None:
        near = near_answers([pair.first.status for pair in comparison.tokens])
        pairs, place = list(itertools.compress(comparison.tokens, near)), 0
    else:
        pairs, place = comparison.shown, CONTEXT if width >= WIDE else CONTEXT // 2 if width >= PLACED else 0
    reserved = place + GAP if place else 0
    tokens = [pair.first for pair in comparison.tokens]
    columns = _pair_columns(pairs, comparison.top_n, width - reserved)
    draw([*columns, *_places([pair.first for pair in pairs], tokens, reserved)], console)
    print_parts(comparison_parts(comparison.totals), console)


def print_sources(title: str, first: Source, other: Source, console: Console, rows: tuple[str, str] = ("", "")) -> None:
    """Print a title, and the two datasets with their models; ``rows`` are words before the datasets."""
    print_title(f"{title}:", console)
    for name, row, source in zip(("First", "Other"), rows, (first, other), strict=True):
        line = f"{name}: {row}{source_text(source.logit_dataset_id, source.model_id)}"
        console.print(fit(line, int(min(line_width(console), cell_len(line)))), soft_wrap=True)


def source_text(dataset_id: str, model_id: str) -> str:
    """A dataset and its model as text."""
    return f"{line_of(dataset_id)}, model {line_of(model_id)}"


def comparison_parts(totals: ComparisonTotals) -> list[str]:
    """A comparison's totals as text."""
    return [
        count_text(totals.num_tokens, "token"),
        f"mean KL ≥ {totals.mean_kl:.4f} nats",
        f"top-1 agreement {totals.agreement:.1%}",
        f"perplexity {short_perplexity(totals.perplexity)} and {short_perplexity(totals.other_perplexity)}",
        f"mean |Δ log p| {totals.mean_change:.3f} nats",
    ]


def _pair_columns(pairs: list[TokenComparison], top_n: int, width: float) -> list[tuple[Column, int]]:
    """The columns that fit in ``width`` cells."""
    title = "      KL  Δ log p" if width >= FULL else "      KL"
    token = 30 if width >= WIDE else 14 if width >= FULL else max(6, int(width) // 5)
    needed = [cell_len(predictions_cell(each).plain) for pair in pairs for each in (pair.first, pair.other)]
    room = max(6, (width - token - len(title) - 3 * GAP) / 2)
    predictions = int(min(max([20, *needed]), room))
    firsts, others = zip(*(_pair_predictions(pair, predictions) for pair in pairs), strict=True) if pairs else ((), ())
    return [
        _column("Target Token", token, (Text(quoted(pair.first.text), style=_pair_style(pair)) for pair in pairs)),
        _column(_top_title("First", [pair.first for pair in pairs], top_n, predictions), predictions, firsts),
        _column(_top_title("Other", [pair.other for pair in pairs], top_n, predictions), predictions, others),
        _column(title, len(title), (_pair_numbers(pair, width >= FULL) for pair in pairs)),
    ]


def _pair_style(pair: TokenComparison) -> str:
    return GREY if not pair.is_extracted else "" if pair.agrees else UNEXPECTED


def _pair_predictions(pair: TokenComparison, width: int) -> tuple[Cell, Cell]:
    if not pair.is_extracted:
        return Text(predictions_cell(pair.first).plain, style=GREY), ""
    return predictions_cell(pair.first, width), predictions_cell(pair.other, width)


def _pair_numbers(pair: TokenComparison, is_full: bool) -> str:
    if not pair.is_extracted:
        return ""
    assert pair.log_prob_change is not None
    kl = f"{' ' if pair.agrees else APART} {pair.kl:>6.3f}"
    return f"{kl}  {short_nats(pair.log_prob_change, '+'):>7}" if is_full else kl


# --- before the extraction ---


def print_preview(title: str, tokens: list[TokenAnalysis], console: Console | None = None) -> None:
    """Print a conversation in runs of prompt, extracted and skipped tokens, marked by word and by colour."""
    console = console or default_console()
    extracted = sum(token.status == EXTRACTED for token in tokens)
    print_title(f"{title}: {count_text(len(tokens), 'token')}, {extracted:,} extracted", console)
    for (status, reason), run in itertools.groupby(tokens, key=lambda token: (token.status, token.reason)):
        texts = [token.text for token in run]
        line = f"  {status:<9} {len(texts):>5}  {quoted(whole_characters(texts), space=' ')}"
        line += f"  ({reason})" if status == SKIPPED else ""
        console.print(line, markup=False, style="bold green" if status == EXTRACTED else GREY, soft_wrap=True)
