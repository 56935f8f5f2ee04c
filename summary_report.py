"""A dataset's summary in the terminal: tables with small bars, no line wider than the terminal.

A ``summary`` is a ``dataset_summary.DatasetSummary``.
"""

import itertools

from rich.console import Console
from rich.text import Text

from token_report import Column, fit, print_table, where
from visible_text import quoted

PIPE_WIDTH = 160  # cells, where there is no terminal to fit
ROOMY = 110  # cells from which texts of tokens get more
EIGHTHS = " ▏▎▍▌▋▊▉"


def print_summary(summary, console: Console) -> None:
    """Print all of a summary, its largest losses and disk use last."""
    width = console.width if console.is_terminal else PIPE_WIDTH
    _print_totals(summary, console, width)
    _print_calibration(summary, console, width)
    _print_nats(summary, console, width)
    _print_kept(summary.kept, console, width)
    _print_conversations("Most confident conversations", summary.most_confident, console, width)
    _print_conversations("Least confident conversations", summary.least_confident, console, width)
    _print_losses(summary.largest_losses, console, width)
    _print_vocabulary(summary.vocabulary_losses, console)
    _print_sizes(summary, console, width)


def bar(share: float, width: int) -> str:
    """A share of 1 as a bar of at most ``width`` cells, in eighths of a cell.

    >>> bar(0.5, 4), bar(0.4, 4)
    ('██', '█▋')
    """
    full, eighths = divmod(round(share * width * 8), 8)
    return ("█" * full + EIGHTHS[eighths]).rstrip()


def _bars(counts: list[int], width: int) -> list[str]:
    """Each count's share of all, and as a bar against the largest one, in ``width`` cells."""
    total, largest = max(1, sum(counts)), max(1, *counts)
    return [f"{count / total:>6.1%} {bar(count / largest, width - 7)}" for count in counts]


def _print_title(title: str, console: Console) -> None:
    console.print(f"\n{title}", markup=False, style="bold", soft_wrap=True)


def _number(title: str, width: int) -> Column:
    """A column of numbers, which stand at its right end."""
    return Column(f"{title:>{width}}", width)


def _rest(width: int, *columns: Column) -> int:
    """Cells that these columns leave to one more."""
    return max(8, width - sum(column.width + 3 for column in columns))


# --- numbers ---


def _print_totals(summary, console: Console, width: int) -> None:
    _print_line(Text(f"Summary of {summary.dataset_id}", style="bold"), console, width)
    ranks = f"{summary.top1_rate:.1%} of rank 1, {summary.top5_rate:.1%} of rank 1 to 5"
    lines = {
        "Model": quoted(summary.model_id, space=" "),
        "Conversations": f"{summary.num_conversations:,}",
        "Tokens": f"{summary.num_tokens:,} extracted",
        "Real tokens": f"mean NLL {summary.mean_nll:.4f} nats, perplexity {short_perplexity(summary.perplexity)}",
        "": f"{ranks}, {summary.in_nucleus_rate:.1%} in the nucleus",
        "Predictions": f"mean entropy {summary.mean_entropy:.2f} nats, {summary.stored:.1%} of the probability stored",
        "Disk": f"{summary.bytes_per_token:.1f} bytes a token, {summary.num_bytes:,} bytes",
    }
    for name, text in lines.items():
        _print_line(Text(f"{name:<15}{text}"), console, width)


def _print_line(text: Text, console: Console, width: int) -> None:
    line = fit(text, width)
    line.rstrip()
    console.print(line, soft_wrap=True)


def short_perplexity(perplexity: float) -> str:
    """A perplexity in at most ten characters."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"


def _print_calibration(summary, console: Console, width: int) -> None:
    error = f"{summary.calibration_error:.3f}"
    _print_title(f"Calibration of the most probable token (expected calibration error {error})", console)
    columns = [Column("Probability", 11), _number("Tokens", 12), _number("Mean p", 6), _number("Right", 6)]
    cells = min(50, _rest(width, *columns))
    rows = (
        [
            f"{one.low:.1f} – {one.high:.1f}",
            f"{one.count:>12,}",
            f"{one.confidence:>6.3f}" if one.count else "",
            f"{one.accuracy:>6.3f}" if one.count else "",
            _calibration_bar(one.accuracy, one.confidence, cells) if one.count else "",
        ]
        for one in summary.calibration
    )
    print_table([*columns, Column("Right; ┃ where it would be Mean p", cells)], rows, console)


def _calibration_bar(accuracy: float, confidence: float, width: int) -> str:
    cells = list(bar(accuracy, width).ljust(width))
    cells[min(width - 1, int(confidence * width))] = "┃"
    return "".join(cells)


def _print_nats(summary, console: Console, width: int) -> None:
    _print_title("Entropy of the predictions and surprisal of the real tokens", console)
    edges, name = summary.entropies.edges, Column("Nats", 11)
    cells = min(50, _rest(width, name) // 2 - 2)
    names = [f"{low:>4} – {high}" for low, high in itertools.pairwise(edges)]
    rows = zip(
        [*names, f"{edges[-1]:>4} –"],
        _bars(summary.entropies.counts, cells),
        _bars(summary.surprisals.counts, cells),
        strict=True,
    )
    print_table([name, Column("Entropy", cells), Column("Surprisal", cells)], rows, console)


def _print_kept(kept, console: Console, width: int) -> None:
    top_k = len(kept.counts) - 1
    _print_title(f"Nucleus entries kept, of {top_k} at most", console)
    # By powers of two; the last is apart, as there top_k may have cut.
    ends = sorted({0, *(2**i for i in range(top_k.bit_length()) if 2**i < top_k), top_k - 1, top_k})
    groups = [range(low + 1, high + 1) for low, high in itertools.pairwise([-1, *ends])]
    counts = [sum(kept.counts[i] for i in group) for group in groups]
    names = [f"{group[0]}" if len(group) == 1 else f"{group[0]} – {group[-1]}" for group in groups]
    columns = [Column("Entries", 13), _number("Tokens", 12)]
    cells = min(50, _rest(width, *columns))
    rows = zip(names, [f"{count:>12,}" for count in counts], _bars(counts, cells), strict=True)
    print_table([*columns, Column("Share", cells)], rows, console)


def _print_sizes(summary, console: Console, width: int) -> None:
    _print_title("Bytes by column, compressed", console)
    columns = [Column("Column", 24), _number("Bytes", 16), _number("A token", 8)]
    cells = min(50, _rest(width, *columns))
    bars = _bars([one.num_bytes for one in summary.columns], cells)
    rows = [
        [one.column, f"{one.num_bytes:>16,}", f"{one.bytes_per_token:>8.2f}", share]
        for one, share in zip(summary.columns, bars, strict=True)
    ]
    rows.append(["all", f"{summary.num_bytes:>16,}", f"{summary.bytes_per_token:>8.2f}", ""])
    print_table([*columns, Column("Share", cells)], rows, console)


# --- conversations and tokens ---


def _print_conversations(title: str, conversations: list, console: Console, width: int) -> None:
    _print_title(f"{title}, by perplexity", console)
    columns = [_number("Row", 7), _number("Source row", 10), _number("Tokens", 6), _number("Perplexity", 10)]
    rows = (
        [
            f"{one.sample_index:>7}",
            f"{one.source_index:>10}",
            f"{one.num_tokens:>6}",
            f"{short_perplexity(one.perplexity):>10}",
            quoted(one.question, space=" "),
        ]
        for one in conversations
    )
    print_table([*columns, Column("Question", min(84, _rest(width, *columns)))], rows, console)


def _print_losses(losses: list, console: Console, width: int) -> None:
    _print_title("Tokens with the largest loss", console)
    texts = (14, 20) if width < ROOMY else (24, 34)
    columns = [_number("Row", 7), Column("Token", texts[0]), _number("Log p", 7), Column("Predicted first", texts[1])]
    cells = min(60, _rest(width, *columns))
    rows = (
        [
            f"{one.sample_index:>7}",
            quoted(one.text),
            f"{one.log_prob:>7.2f}",
            f"{one.prediction.probability:.2f} {quoted(one.prediction.text)}" if one.prediction else "",
            where(one.position, one.before, cells),
        ]
        for one in losses
    )
    print_table([*columns, Column("Where", cells)], rows, console)


def _print_vocabulary(losses: list, console: Console) -> None:
    _print_title("Vocabulary tokens with the largest loss in all", console)
    columns = [
        _number("Id", 7),
        Column("Token", 20),
        _number("Times", 10),
        _number("Nats", 11),
        _number("Share", 6),
        _number("Mean", 7),
    ]
    rows = (
        [
            f"{one.token_id:>7}",
            quoted(one.text),
            f"{one.count:>10,}",
            f"{one.total_loss:>11,.1f}",
            f"{one.share:>6.1%}",
            f"{one.mean_loss:>7.2f}",
        ]
        for one in losses
    )
    print_table(columns, rows, console)
