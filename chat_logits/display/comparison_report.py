"""A comparison in the terminal: tables whose columns line up by cells, and the totals below."""

import itertools

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from chat_logits.analysis.divergence import ApartConversation, ApartToken, ComparisonTotals, Source, TokenComparison
from chat_logits.analysis.histograms import Histogram
from chat_logits.analysis.tokens import Prediction, near_answers, text_before
from chat_logits.display.fitted_table import Part, labels, numbers, print_fitting, shares, short_nats
from chat_logits.display.text import quoted
from chat_logits.display.token_report import (
    CONTEXT,
    GREY,
    UNEXPECTED,
    WIDE,
    Column,
    count_text,
    fit,
    prediction_text,
    predictions_cell,
    print_parts,
    print_table,
    short_perplexity,
    short_probability,
    table_width,
    where,
)

APART = "≠"  # where the two models hold different tokens the most probable
PLACE = 60  # cells of the text before a token, at most
ROOMY = 130  # cells: terminals from here on show also log-probabilities of tokens far apart, and longer texts
PLACED = 80  # cells: terminals below show no text before them
PREDICTED = 12  # cells that a text and its probability need
FULL = 70  # cells: terminals below show no Δ log p
GAP = 3  # cells between two columns


def print_sources(title: str, first: Source, other: Source, console: Console) -> None:
    """Print a title and which two datasets, of which models, are compared."""
    console.print(f"{title}:", markup=False, style="bold", soft_wrap=True)
    for name, source in (("First", first), ("Other", other)):
        dataset, model = (quoted(text, space=" ")[1:-1] for text in (source.logit_dataset_id, source.model_id))
        line = f"{name}: {dataset}, model {model}"
        console.print(fit(line, int(min(table_width(console), cell_len(line)))), soft_wrap=True)


def totals_parts(totals: ComparisonTotals) -> list[str]:
    """The totals in words."""
    return [
        count_text(totals.num_tokens, "token"),
        f"mean KL ≥ {totals.mean_kl:.4f} nats",
        f"top-1 agreement {totals.agreement:.1%}",
        f"perplexity {short_perplexity(totals.perplexity)} and {short_perplexity(totals.other_perplexity)}",
        f"mean |Δ log p| {totals.mean_change:.3f} nats",
    ]


# --- one conversation ---


def print_conversation(comparison, console: Console) -> None:
    """Print a ``Comparison``: a line a token, the end of a prompt before each answer, and the totals.

    A terminal gets lines that fit it, a pipe whole ones.
    """
    print_sources("Detailed Token Comparison", comparison.first, comparison.other, console)
    if comparison.only is None:
        shown = _without_long_prompts(comparison.tokens)
        columns = _token_columns(shown, comparison.top_n, table_width(console))
        print_table(columns, (_token_cells(pair, columns) for pair in shown), console)
    else:
        _print_chosen(comparison, console)
    print_parts(totals_parts(comparison.totals), console)


def _print_chosen(comparison, console: Console) -> None:
    """The tokens with the largest KL and, where there is room for it, where each of them stands."""
    width = table_width(console)
    place = CONTEXT if width >= WIDE else CONTEXT // 2 if width >= PLACED else 0
    columns = _token_columns(comparison.shown, comparison.top_n, width - (place + GAP if place else 0))
    tokens = [pair.first for pair in comparison.tokens]
    rows = (
        [*_token_cells(pair, columns), where(pair.first.position, text_before(pair.first.position, tokens), place)]
        for pair in comparison.shown
    )
    if place:
        print_table([*columns, Column("Where", place)], rows, console)
    else:
        print_table(columns, (row[:-1] for row in rows), console)


def _without_long_prompts(tokens: list[TokenComparison]) -> list[TokenComparison]:
    return list(itertools.compress(tokens, near_answers([pair.first.status for pair in tokens])))


def _token_columns(tokens: list[TokenComparison], top_n: int, width: float) -> list[Column]:
    """The columns that fit in ``width`` cells."""
    needed = [cell_len(predictions_cell(token).plain) for pair in tokens for token in (pair.first, pair.other)]
    apart = len(_numbers_title(width >= FULL))
    token = 30 if width >= WIDE else 14 if width >= FULL else max(6, int(width) // 5)
    room = max(6, (width - token - apart - 3 * GAP) / 2)
    predictions = int(min(max([20, *needed]), room))
    titles = (f"First (Top {top_n})", f"Other (Top {top_n})")
    return [
        Column("Real Token", token),
        *(Column(title, predictions) for title in titles),
        Column(_numbers_title(width >= FULL), apart),
    ]


def _numbers_title(is_wide: bool) -> str:
    return "      KL  Δ log p" if is_wide else "      KL"


def _token_cells(pair: TokenComparison, columns: list[Column]) -> list[str | Text]:
    text = quoted(pair.first.text)
    if not pair.is_extracted:
        return [Text(text, style=GREY), Text(predictions_cell(pair.first).plain, style=GREY), "", ""]
    predictions = (predictions_cell(token, columns[1].width) for token in (pair.first, pair.other))
    apart = f"{' ' if pair.agrees else APART} {pair.kl:>6.3f}"
    if columns[3].title == _numbers_title(True):
        apart += f"  {short_nats(pair.log_prob_change, '+'):>7}"
    return [Text(text, style="" if pair.agrees else UNEXPECTED), *predictions, apart]


# --- two datasets ---


def print_datasets(comparison, console: Console) -> None:
    """Print a ``DatasetComparison``: counts, histogram, the tokens and conversations furthest apart, totals."""
    print_sources("Dataset Comparison", comparison.first, comparison.other, console)
    counts = [
        f"{count_text(comparison.num_conversations, 'conversation')} compared",
        f"{comparison.only_in_first:,} only in the first",
        f"{comparison.only_in_other:,} only in the other",
        f"{comparison.num_different:,} with other tokens, left out",
    ]
    print_parts(counts, console)
    _print_histogram(comparison.histogram, console)
    _print_tokens(comparison.tokens, console)
    _print_conversations(comparison.conversations, console)
    print_parts(totals_parts(comparison.totals), console)


def _print_histogram(histogram: Histogram, console: Console) -> None:
    names = [f"{low:g} and more" if high is None else f"{low:g} to {high:g}" for low, high, _ in histogram.bins]
    tokens = numbers("Tokens", [f"{count:,}" for count in histogram.counts])
    print_fitting([labels("KL (nats)", names), tokens, shares("Share", histogram.counts)], ["Share"], console)


def _print_tokens(tokens: list[ApartToken], console: Console) -> None:
    console.print("Tokens where they part most:", markup=False, style="bold", soft_wrap=True)
    columns = _apart_columns(table_width(console))
    print_table(columns, (_apart_cells(token, columns) for token in tokens), console)


def _apart_columns(width: float) -> list[Column]:
    is_roomy = width >= ROOMY
    text = 20 if is_roomy else int(min(14, max(6, (width - 7 - 3 * GAP) / 3)))
    logs = "     KL    log p    other" if is_roomy else "     KL"
    columns = [*(Column(title, text) for title in ("Real Token", "First", "Other")), Column(logs, len(logs))]
    left = width - sum(column.width for column in columns) - 4 * GAP
    return [*columns, Column("Where", int(min(PLACE, left)))] if width >= PLACED else columns


def _apart_cells(token: ApartToken, columns: list[Column]) -> list[str]:
    predictions = (token.prediction, token.other_prediction)
    logs = f"{token.kl:>7.3f}  {short_nats(token.log_prob):>7}  {short_nats(token.other_log_prob):>7}"
    cells = [
        quoted(token.text),
        *(_predicted(prediction, columns[1].width) for prediction in predictions),
        logs[: columns[3].width],
    ]
    return [*cells, _place(token, columns[4].width)] if len(columns) > 4 else cells


def _predicted(prediction: Prediction | None, width: int) -> str:
    """Text and probability; a long text is cut, the probability is not. Few cells have the text alone."""
    whole = prediction_text(prediction)
    if cell_len(whole) <= width:
        return whole
    if width < PREDICTED:
        return quoted(prediction.text)
    probability = f"({short_probability(prediction.probability)})"
    return fit(quoted(prediction.text), width - len(probability)).plain + probability


def _place(token: ApartToken, width: int) -> str:
    """The row, the token's place in it and the end of the text before, in ``width`` cells."""
    place, text = f"row {token.sample_index} #{token.position} ", quoted(token.before, space=" ")[1:-1]
    while text and cell_len(text) > width - len(place) - 1:
        text = text[1:]
    return f"{place}…{text}"


def _print_conversations(conversations: list[ApartConversation], console: Console) -> None:
    console.print("Conversations where they part most:", markup=False, style="bold", soft_wrap=True)
    parts = [
        numbers("Row", [f"{found.sample_index}" for found in conversations]),
        numbers("Mean KL", [f"{found.mean_kl:.3f}" for found in conversations]),
        numbers("Tokens", [f"{found.num_tokens:,}" for found in conversations]),
        numbers("Perplexity", [short_perplexity(found.perplexity) for found in conversations]),
        numbers("Other's", [short_perplexity(found.other_perplexity) for found in conversations]),
        Part("Question", [quoted(found.question, space=" ") for found in conversations], 8, 80),
    ]
    print_fitting(parts, ["Tokens", "Other's", "Perplexity"], console)
