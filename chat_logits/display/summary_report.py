"""A dataset's summary in the terminal: tables with small bars, no line wider than the terminal.

A ``summary`` is a ``dataset_summary.DatasetSummary``.
"""

import itertools

from rich.console import Console
from rich.text import Text

from chat_logits.analysis.histograms import Histogram
from chat_logits.display.fitted_table import (
    BAR,
    LEAST_BAR,
    Part,
    bar,
    fitting_width,
    labels,
    numbers,
    print_fitting,
    print_line,
    shares,
    short_nats,
)
from chat_logits.display.text import quoted
from chat_logits.display.token_report import entropy_text, fit, short_perplexity, where

ROOMY, NARROW = 110, 60  # cells from which texts of tokens get more, and below which less
INDENT = 15  # cells before the totals


def print_summary(summary, console: Console) -> None:
    """Print all of a summary, its largest losses and disk use last."""
    _print_totals(summary, console)
    _print_calibration(summary, console)
    _print_nats(summary, console)
    _print_kept(summary.kept, console)
    _print_conversations("Most confident conversations", summary.most_confident, console)
    _print_conversations("Least confident conversations", summary.least_confident, console)
    _print_losses(summary.largest_losses, console)
    _print_vocabulary(summary.vocabulary_losses, console)
    _print_sizes(summary, console)


# --- numbers ---


def _print_totals(summary, console: Console) -> None:
    title = f"Summary of {quoted(summary.dataset_id, space=' ')[1:-1]}"
    _print_cut(Text(title, style="bold"), console)
    _print_cut(Text(f"{'Model':<{INDENT}}{quoted(summary.model_id, space=' ')}"), console)
    at_least = "at least " if summary.top5_is_bound else ""
    entropy = entropy_text(summary.mean_entropy, summary.entropy_is_bound)
    lines = {
        "Conversations": f"{summary.num_conversations:,}",
        "Tokens": f"{summary.num_tokens:,} extracted",
        "Real tokens": f"mean NLL {summary.mean_nll:.4f} nats, perplexity {short_perplexity(summary.perplexity)}",
        "": f"top-1 {summary.top1_rate:.1%}, top-5 {at_least}{summary.top5_rate:.1%}, "
        f"{summary.in_nucleus_rate:.1%} in the nucleus",
        "Predictions": f"mean entropy {entropy}, {summary.stored:.1%} of the probability stored",
        "Disk": f"{summary.bytes_per_token:.1f} bytes a token, {summary.num_bytes:,} bytes",
    }
    for name, text in lines.items():
        for i, part in enumerate(Text(text).wrap(console, fitting_width(console) - INDENT)):
            console.print(Text(f"{'' if i else name:<{INDENT}}{part.plain.rstrip()}"), soft_wrap=True)


def _print_cut(text: Text, console: Console) -> None:
    line = fit(text, fitting_width(console))
    line.rstrip()
    console.print(line, soft_wrap=True)


def _print_title(title: str, console: Console) -> None:
    console.print()
    print_line(title, console, "bold")


def _print_calibration(summary, console: Console) -> None:
    error = f"{summary.calibration_error:.3f}"
    _print_title(f"Calibration of the most probable token (expected calibration error {error})", console)
    bins = summary.calibration

    def bars(width: int) -> list[str]:
        return [_calibration_bar(one.accuracy, one.confidence, width) if one.count else "" for one in bins]

    parts = [
        labels("Probability", [f"{one.low:.1f} – {one.high:.1f}" for one in bins]),
        numbers("Tokens", [f"{one.count:,}" for one in bins]),
        numbers("Mean p", [f"{one.confidence:.3f}" if one.count else "" for one in bins]),
        numbers("Right", [f"{one.accuracy:.3f}" if one.count else "" for one in bins]),
        Part("Right; ┃ where it would be Mean p", bars, LEAST_BAR, BAR),
    ]
    print_fitting(parts, ["Right; ┃ where it would be Mean p", "Tokens"], console)


def _calibration_bar(accuracy: float, confidence: float, width: int) -> str:
    cells = list(bar(accuracy, width).ljust(width))
    cells[min(width - 1, int(confidence * width))] = "┃"
    return "".join(cells)


def _print_nats(summary, console: Console) -> None:
    _print_title("Entropy of the predictions and surprisal of the real tokens", console)
    edges = summary.entropies.edges
    names = [f"{low:>4} – {high}" for low, high in itertools.pairwise(edges)]
    parts = [
        labels("Nats", [*names, f"{edges[-1]:>4} –"]),
        shares(f"Entropy{' ≥' * summary.entropy_is_bound}", summary.entropies.counts),
        shares("Surprisal", summary.surprisals.counts),
    ]
    print_fitting(parts, [], console)


def kept_groups(kept: Histogram) -> list[tuple[str, int]]:
    """Nucleus entries kept by powers of two, such as "3 – 4", and the positions with so many of them.

    The last group is ``top_k`` alone, as that may have cut there.
    """
    top_k = len(kept.counts) - 1
    ends = sorted({0, *(2**i for i in range(top_k.bit_length()) if 2**i < top_k), top_k - 1, top_k})
    groups = [range(low + 1, high + 1) for low, high in itertools.pairwise([-1, *ends])]
    names = [f"{group[0]}" if len(group) == 1 else f"{group[0]} – {group[-1]}" for group in groups]
    return [(name, sum(kept.counts[i] for i in group)) for name, group in zip(names, groups, strict=True)]


def _print_kept(kept: Histogram, console: Console) -> None:
    _print_title(f"Nucleus entries kept, of {len(kept.counts) - 1} at most", console)
    names, counts = zip(*kept_groups(kept), strict=True)
    parts = [labels("Entries", names), numbers("Tokens", [f"{count:,}" for count in counts]), shares("Share", counts)]
    print_fitting(parts, ["Share"], console)


def _print_sizes(summary, console: Console) -> None:
    _print_title("Bytes by column, compressed", console)
    sizes = [one.num_bytes for one in summary.columns]
    each = [one.bytes_per_token for one in summary.columns]
    parts = [
        labels("Column", [*(one.column for one in summary.columns), "all"]),
        numbers("Bytes", [f"{size:,}" for size in [*sizes, summary.num_bytes]]),
        numbers("A token", [f"{size:.2f}" for size in [*each, summary.bytes_per_token]]),
        Part("Share", lambda width: [*shares("Share", sizes).cells(width), ""], LEAST_BAR, BAR),
    ]
    print_fitting(parts, ["Share", "Bytes"], console)


# --- conversations and tokens ---


def _print_conversations(title: str, conversations: list, console: Console) -> None:
    _print_title(f"{title}, by perplexity", console)
    parts = [
        numbers("Row", [f"{one.sample_index}" for one in conversations]),
        numbers("Source row", [f"{one.source_index}" for one in conversations]),
        numbers("Tokens", [f"{one.num_tokens}" for one in conversations]),
        numbers("Perplexity", [short_perplexity(one.perplexity) for one in conversations]),
        Part("Question", [quoted(one.question, space=" ") for one in conversations], 8, 84),
    ]
    print_fitting(parts, ["Source row", "Tokens"], console)


def _print_losses(losses: list, console: Console) -> None:
    _print_title("Tokens with the largest loss", console)
    width = fitting_width(console)
    text, first = (24, 34) if width >= ROOMY else (14, 20) if width >= NARROW else (8, 12)
    firsts = [one.prediction and f"{one.prediction.probability:.2f} {quoted(one.prediction.text)}" for one in losses]
    parts = [
        numbers("Row", [f"{one.sample_index}" for one in losses]),
        Part("Token", [quoted(one.text) for one in losses], text, text),
        numbers("Log p", [short_nats(one.log_prob) for one in losses]),
        Part("Predicted first", [found or "" for found in firsts], first, first),
        Part("Where", lambda cells: [where(one.position, one.before, cells) for one in losses], 8, 60),
    ]
    print_fitting(parts, ["Where", "Row"], console)


def _print_vocabulary(losses: list, console: Console) -> None:
    _print_title("Vocabulary tokens with the largest loss in all", console)
    parts = [
        numbers("Id", [f"{one.token_id}" for one in losses]),
        Part("Token", [quoted(one.text) for one in losses], 8, 20),
        numbers("Times", [f"{one.count:,}" for one in losses]),
        numbers("Nats", [f"{one.total_loss:,.1f}" for one in losses]),
        numbers("Share", [f"{one.share:.1%}" for one in losses]),
        numbers("Mean", [short_nats(one.mean_loss) for one in losses]),
    ]
    print_fitting(parts, ["Id", "Share", "Mean", "Nats"], console)
