"""Whole datasets in the terminal: a summary, a comparison, a verification. Pages draw some of the same tables."""

import itertools
import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from chat_logits.analysis.dataset_comparison import DatasetComparison
from chat_logits.analysis.divergence import DivergentConversation, DivergentToken
from chat_logits.analysis.reference_output import SHIFTS
from chat_logits.analysis.summary import ConversationSummary, DatasetSummary, Histogram, TokenLoss, VocabularyLoss
from chat_logits.analysis.tokens import Prediction
from chat_logits.analysis.verification import Verification
from chat_logits.display.formats import (
    chosen_parts,
    chosen_text,
    entropy_text,
    prediction_text,
    short_nats,
    short_perplexity,
    short_probability,
)
from chat_logits.display.tables import (
    BAR,
    GAP,
    LEAST_BAR,
    Column,
    Table,
    bar,
    fit,
    fitting_width,
    labels,
    numbers,
    print_line,
    print_parts,
    print_table,
    shares,
    where,
)
from chat_logits.display.text import line_of, quoted, visible
from chat_logits.display.token_tables import comparison_parts, print_sources
from chat_logits.words import count_text

ROOMY, NARROW = 110, 60  # cells from which a summary's tokens get more room, and below which they get less
INDENT = 15  # cells before a summary's totals
PLACE, LEAST_PLACE = 60, 16  # cells for a token's place
PREDICTED = 12  # cells that a text and its probability need
SHOWN_CAUSES = 5
MEASURES = {
    "kl_mean": "KL(true || stored), mean",
    "kl_row": "KL, largest mean of a row",
    "kl_position": "KL, largest of a position",
    "logsumexp": "logsumexp, largest error",
    "token_log_probs": "token_log_probs, largest error",
    "in_order": "nucleus ids equal in order, share",
}


# --- a summary ---


def print_summary(summary: DatasetSummary, console: Console) -> None:
    """Print all of a summary, its largest losses and disk use last, in lines that fit the terminal."""
    _print_totals(summary, console)
    tables = [
        _calibration_table(summary),
        _nats_table(summary),
        _kept_table(summary.kept),
        *conversation_tables(summary),
        losses_table(summary.largest_losses, fitting_width(console)),
        vocabulary_table(summary.vocabulary_losses),
        *([_sizes_table(summary)] if summary.columns else []),
    ]
    for table in tables:
        console.print()
        print_line(table.title, console, "bold")
        print_table(table, console)


def _print_totals(summary: DatasetSummary, console: Console) -> None:
    width = fitting_width(console)
    console.print(fit(Text(f"Summary of {line_of(summary.dataset_id)}", style="bold"), width), soft_wrap=True)
    console.print(fit(f"{'Model':<{INDENT}}{quoted(summary.model_id, space=' ')}", width), soft_wrap=True)
    at_least = "at least " if summary.top5_is_bound else ""
    entropy = entropy_text(summary.mean_entropy, summary.entropy_is_bound)
    lines = {
        "Conversations": chosen_text(summary.num_conversations, summary.chosen_from),
        **_left_out(summary),
        "Tokens": f"{summary.num_tokens:,} extracted",
        "Target tokens": f"mean NLL {summary.mean_nll:.4f} nats, perplexity {short_perplexity(summary.perplexity)}",
        "": f"top-1 {summary.top1_rate:.1%}, top-5 {at_least}{summary.top5_rate:.1%}, "
        f"{summary.in_nucleus_rate:.1%} in the nucleus",
        "Predictions": f"mean entropy {entropy}, {summary.stored:.1%} of the probability stored",
    }
    if summary.num_bytes is not None:
        lines["Disk"] = f"{summary.bytes_per_token:.1f} bytes per token, {summary.num_bytes:,} bytes"
    for name, text in lines.items():
        for i, part in enumerate(Text(text).wrap(console, width - INDENT)):
            console.print(Text(f"{'' if i else name:<{INDENT}}{part.plain.rstrip()}"), soft_wrap=True)


def _left_out(summary: DatasetSummary) -> dict[str, str]:
    """Turns that were not extracted, if any."""
    turns = count_text(summary.turns_left_out, "turn")
    return {"Left out": f"{turns} marked not to be trained on"} if summary.turns_left_out else {}


def _calibration_table(summary: DatasetSummary) -> Table:
    bins, title = summary.calibration, "Right; ┃ where it would be Mean p"

    def bars(width: int) -> list[str]:
        return [
            ""
            if each.accuracy is None or each.confidence is None
            else _calibration_bar(each.accuracy, each.confidence, width)
            for each in bins
        ]

    columns = [
        labels("Probability", [f"{each.low:.1f} – {each.high:.1f}" for each in bins]),
        numbers("Tokens", [f"{each.count:,}" for each in bins]),
        numbers("Mean p", [f"{each.confidence:.3f}" if each.count else "" for each in bins]),
        numbers("Right", [f"{each.accuracy:.3f}" if each.count else "" for each in bins]),
        Column(title, bars, LEAST_BAR, BAR),
    ]
    error = f"expected calibration error {summary.calibration_error:.3f}"
    return Table(f"Calibration of the most probable token ({error})", columns, (title, "Tokens"))


def _calibration_bar(accuracy: float, confidence: float, width: int) -> str:
    cells = list(bar(accuracy, width).ljust(width))
    cells[min(width - 1, int(confidence * width))] = "┃"
    return "".join(cells)


def _nats_table(summary: DatasetSummary) -> Table:
    edges = summary.entropies.edges
    names = [f"{low:>4} – {high}" for low, high in itertools.pairwise(edges)]
    columns = [
        labels("Nats", [*names, f"{edges[-1]:>4} –"]),
        shares(f"Entropy{' ≥' * summary.entropy_is_bound}", summary.entropies.counts),
        shares("Surprisal", summary.surprisals.counts),
    ]
    return Table("Entropy of the predictions and surprisal of the target tokens", columns)


def kept_groups(kept: Histogram) -> list[tuple[str, int]]:
    """Groups of numbers of kept entries by powers of two, such as "3 – 4", with their counts of positions.

    The last group is ``top_k`` alone, since there the nucleus may have been cut by ``top_k``.
    """
    top_k = len(kept.counts) - 1
    ends = sorted({0, *(2**i for i in range(top_k.bit_length()) if 2**i < top_k), top_k - 1, top_k})
    groups = [range(low + 1, high + 1) for low, high in itertools.pairwise([-1, *ends])]
    names = [f"{group[0]}" if len(group) == 1 else f"{group[0]} – {group[-1]}" for group in groups]
    return [(name, sum(kept.counts[i] for i in group)) for name, group in zip(names, groups, strict=True)]


def _kept_table(kept: Histogram) -> Table:
    names, counts = zip(*kept_groups(kept), strict=True)
    columns = [labels("Entries", names), numbers("Tokens", [f"{n:,}" for n in counts]), shares("Share", counts)]
    return Table(f"Nucleus entries kept, of {len(kept.counts) - 1} at most", columns, ("Share",))


def _sizes_table(summary: DatasetSummary) -> Table:
    sizes = [each.num_bytes for each in summary.columns]
    means = [each.bytes_per_token for each in summary.columns]
    columns = [
        labels("Column", [*(each.column for each in summary.columns), "all"]),
        numbers("Bytes", [f"{size:,}" for size in [*sizes, summary.num_bytes]]),
        numbers("Per token", [f"{mean:.2f}" for mean in [*means, summary.bytes_per_token]]),
        Column("Share", lambda width: [*shares("Share", sizes).cells_at(width), ""], LEAST_BAR, BAR),
    ]
    return Table("Bytes by column, compressed", columns, ("Share", "Bytes"))


def conversation_tables(summary: DatasetSummary) -> list[Table]:
    """The conversations with the least and the largest perplexity."""
    kinds = {"Most confident": summary.most_confident, "Least confident": summary.least_confident}
    return [_conversations_table(f"{kind} conversations, by perplexity", each) for kind, each in kinds.items()]


def _conversations_table(title: str, conversations: list[ConversationSummary]) -> Table:
    columns = [
        numbers("Row", [f"{each.sample_index}" for each in conversations]),
        numbers("Source row", [f"{each.source_index}" for each in conversations]),
        numbers("Tokens", [f"{each.num_tokens:,}" for each in conversations]),
        numbers("Perplexity", [short_perplexity(each.perplexity) for each in conversations]),
        Column("Question", [quoted(each.question, space=" ") for each in conversations], 8, 84),
    ]
    return Table(title, columns, ("Source row", "Tokens"))


def losses_table(losses: list[TokenLoss], width: float = math.inf) -> Table:
    """The target tokens with the largest loss, for a place of ``width`` cells."""
    text, first = (24, 34) if width >= ROOMY else (14, 20) if width >= NARROW else (8, 12)
    columns = [
        numbers("Row", [f"{each.sample_index}" for each in losses]),
        Column("Token", [quoted(each.text) for each in losses], text, text),
        numbers("Log p", [short_nats(each.log_prob) for each in losses]),
        Column("Predicted first", [_probability_first(each.prediction) for each in losses], first, first),
        Column("Where", lambda cells: [where(each.position, each.before, cells) for each in losses], 8, PLACE),
    ]
    return Table("Tokens with the largest loss", columns, ("Where", "Row"))


def _probability_first(prediction: Prediction | None) -> str:
    return f"{prediction.probability:.2f} {quoted(prediction.text)}" if prediction else ""


def vocabulary_table(losses: list[VocabularyLoss]) -> Table:
    """The vocabulary's tokens with the largest total loss."""
    columns = [
        numbers("Id", [f"{each.token_id}" for each in losses]),
        Column("Token", [quoted(each.text) for each in losses], 8, 20),
        numbers("Times", [f"{each.count:,}" for each in losses]),
        numbers("Nats", [f"{each.total_loss:,.1f}" for each in losses]),
        numbers("Share", [f"{each.share:.1%}" for each in losses]),
        numbers("Mean", [short_nats(each.mean_loss) for each in losses]),
    ]
    return Table("Vocabulary tokens with the largest loss in all", columns, ("Id", "Share", "Mean", "Nats"))


# --- a comparison ---


def print_datasets(comparison: DatasetComparison, console: Console) -> None:
    """Print counts, histogram, the tokens and conversations furthest apart, and totals, in lines that fit."""
    print_sources("Dataset Comparison", comparison.first, comparison.other, console)
    counts = [
        f"{count_text(comparison.num_conversations, 'conversation')} compared",
        *chosen_parts(comparison.chosen_from),
        f"{comparison.only_in_first:,} only in the first",
        f"{comparison.only_in_other:,} only in the other",
        f"{comparison.num_different:,} with other tokens, left out",
    ]
    print_parts(counts, console)
    print_table(_histogram_table(comparison.histogram), console)
    for table in (
        divergent_tokens_table(comparison.tokens, fitting_width(console)),
        divergent_conversations_table(comparison.conversations),
    ):
        print_line(f"{table.title}:", console, "bold")
        print_table(table, console)
    print_parts(comparison_parts(comparison.totals), console)


def _histogram_table(histogram: Histogram) -> Table:
    names = [f"{low:g} and more" if high is None else f"{low:g} to {high:g}" for low, high, _ in histogram.bins]
    tokens = numbers("Tokens", [f"{count:,}" for count in histogram.counts])
    return Table("KL divergence", [labels("KL (nats)", names), tokens, shares("Share", histogram.counts)], ("Share",))


def divergent_tokens_table(tokens: list[DivergentToken], width: float = math.inf) -> Table:
    """The tokens with the largest KL divergence, for a place of ``width`` cells."""
    least, most = int(min(14, max(6, (width - 7 - 3 * GAP) / 3))), 20
    columns = [
        Column("Target Token", [quoted(each.text) for each in tokens], least, most),
        Column("First", lambda cells: [_predicted(each.prediction, cells) for each in tokens], least, most),
        Column("Other", lambda cells: [_predicted(each.other_prediction, cells) for each in tokens], least, most),
        numbers("KL", [f"{each.kl:.3f}" for each in tokens], least=7),
        numbers("log p", [short_nats(each.log_prob) for each in tokens], least=7, is_joined=True),
        numbers("other", [short_nats(each.other_log_prob) for each in tokens], least=7, is_joined=True),
        Column("Where", lambda cells: [_row_and_place(each, cells) for each in tokens], LEAST_PLACE, PLACE),
    ]
    return Table("Tokens with the largest KL divergence", columns, ("other", "log p", "Where"))


def _predicted(prediction: Prediction | None, width: int) -> str:
    """Text and probability; a long text is cut, the probability is not. In few cells, the text alone."""
    whole = prediction_text(prediction)
    if prediction is None or cell_len(whole) <= width:
        return whole
    if width < PREDICTED:
        return quoted(prediction.text)
    probability = f"({short_probability(prediction.probability)})"
    return fit(quoted(prediction.text), width - len(probability)).plain + probability


def _row_and_place(token: DivergentToken, width: int) -> str:
    row = f"row {token.sample_index} "
    return row + where(token.position, token.before, width - len(row))


def divergent_conversations_table(conversations: list[DivergentConversation]) -> Table:
    """The conversations with the largest mean KL divergence."""
    columns = [
        numbers("Row", [f"{each.sample_index}" for each in conversations]),
        numbers("Mean KL", [f"{each.mean_kl:.3f}" for each in conversations]),
        numbers("Tokens", [f"{each.num_tokens:,}" for each in conversations]),
        numbers("Perplexity", [short_perplexity(each.perplexity) for each in conversations]),
        numbers("Other's", [short_perplexity(each.other_perplexity) for each in conversations]),
        Column("Question", [quoted(each.question, space=" ") for each in conversations], 8, 80),
    ]
    return Table("Conversations with the largest mean KL divergence", columns, ("Tokens", "Other's", "Perplexity"))


# --- a verification ---


def print_verification(verification: Verification, console: Console) -> None:
    """Print each measure with its limit, the shift test, and then that it holds up, or the causes."""
    rows, tokens = count_text(verification.num_rows, "row"), count_text(verification.num_tokens, "token")
    model = f"{verification.model_id} ({verification.dtype}, {verification.device})"
    print_line(visible(f"Checked {rows}, {tokens} against {model}"), console, "bold")
    print_table(_figures_table(verification), console)
    print_table(_shifts_table(verification.shifts), console)
    for line in _verdict(verification):
        print_line(visible(line), console, "green" if verification.holds else "red")


def _verdict(verification: Verification) -> Sequence[str]:
    if verification.holds:
        return ["Holds up: the stored numbers are the model's."]
    more = len(verification.causes) - SHOWN_CAUSES
    return ["Does not hold up:", *verification.causes[:SHOWN_CAUSES], *([f"… and {more} more"] if more > 0 else [])]


def _figures_table(verification: Verification) -> Table:
    figures = verification.figures
    columns = [
        Column("Measure, nats", [MEASURES[name] for name in figures], 16, 33),
        numbers("Measured", map(_short_figure, figures.values())),
        numbers("Limit", [_short_figure(verification.limits.get(name)) for name in figures]),
    ]
    return Table("Figures", columns)


def _shifts_table(shifts: dict[str, list[float]]) -> Table:
    names = ["KL" if name == "kl" else name for name in shifts]
    means = [
        numbers(f"at {shift:+}" if shift else "at 0", map(_short_figure, errors))
        for shift, errors in zip(SHIFTS, zip(*shifts.values(), strict=True), strict=True)
    ]
    return Table("Shifts", [Column("Mean error, nats, least at 0", names, 10, 28), *means])


def _short_figure(figure: float | None) -> str:
    if figure is None or math.isnan(figure):
        return "-"
    if figure == 0:
        return "0"
    return f"{figure:.3f}" if 0.1 <= figure < 999.5 else f"{figure:.1e}"
