"""The rows of a dataset for which a condition is true, in the terminal."""

from collections.abc import Sequence

from rich.console import Console

from chat_logits.analysis.filtering import Filtering, FoundRow
from chat_logits.display.formats import short_nats, short_perplexity
from chat_logits.display.tables import Column, Table, numbers, print_line, print_parts, print_table
from chat_logits.display.text import line_of, quoted
from chat_logits.words import count_text

LISTED = 100  # rows that a terminal shows; JSON has all


def print_filtering(filtering: Filtering, console: Console) -> None:
    """Print the first ``LISTED`` rows with their numbers, and where the rows were saved."""
    print_line(f"{'Rows' if filtering.condition is None else 'Where ' + line_of(filtering.condition)}", console, "bold")
    found = filtering.rows
    tokens = count_text(sum(row.num_tokens for row in found), "token")
    of_all = f"{len(found):,} of {count_text(filtering.num_conversations, 'conversation')}"
    print_parts([line_of(filtering.dataset_id), of_all, tokens], console)
    if found:
        print_table(found_table(found[:LISTED], filtering.entropy_is_bound), console)
    if len(found) > LISTED:
        print_line(f"… and {len(found) - LISTED:,} more", console)
    if filtering.saved is not None:
        print_line(f"Saved to {line_of(filtering.saved)}", console)


def found_table(rows: Sequence[FoundRow], entropy_is_bound: bool) -> Table:
    """Each row's numbers, including its largest surprisal, and the beginning of its first user message."""
    least = "≥ " if entropy_is_bound else ""
    columns = [
        numbers("Row", [f"{row.row}" for row in rows]),
        numbers("Source row", [f"{row.source_index}" for row in rows]),
        numbers("Tokens", [f"{row.num_tokens:,}" for row in rows]),
        numbers("Perplexity", [short_perplexity(row.perplexity) for row in rows]),
        numbers("Entropy, nats", [f"{least}{row.mean_entropy:.2f}" for row in rows]),
        numbers("Top-1", [f"{row.top1_rate:.1%}" for row in rows]),
        numbers("Largest, nats", [short_nats(row.max_surprisal) for row in rows]),
        Column("Question", [quoted(row.question, space=" ") for row in rows], 8, 84),
    ]
    return Table("Conversations", columns, ("Source row", "Entropy, nats", "Largest, nats", "Top-1"))
