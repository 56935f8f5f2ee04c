"""Comparisons across tokenizers in the terminal, span by span and over datasets. Pages draw some of the same tables."""

import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from chat_logits.analysis.cross_records import (
    BitTotals,
    ConversationBits,
    CrossComparison,
    LeftOut,
    SpanComparison,
    Surprised,
    SurprisingSpan,
    TextSpan,
)
from chat_logits.display.formats import chosen_parts
from chat_logits.display.tables import (
    Column,
    Table,
    fitting_width,
    labels,
    numbers,
    print_line,
    print_parts,
    print_table,
    text_end,
)
from chat_logits.display.text import quoted
from chat_logits.display.token_tables import GREY, UNEXPECTED, print_sources
from chat_logits.words import count_text

FIRST, OTHER = "first", "other"
LISTED_CONVERSATIONS = 20
LEAST_TEXT, TEXT = 12, 30  # cells of a span's text, and of a dataset's tokens
LEAST_PLACE, PLACE = 16, 60  # cells for a span's place
ROOMY = 110  # cells from which texts get more room


# --- one conversation ---


def print_spans(comparison: SpanComparison, console: Console) -> None:
    """Print a line per span with each dataset's tokens and bits, what is left out in grey, and the totals."""
    print_sources("Detailed Span Comparison", comparison.first, comparison.other, console)
    print_table(spans_table(comparison.shown), console)
    if comparison.left_out:
        print_line("Left out:", console, "bold")
        print_table(left_out_table(comparison.left_out), console)
    for note in notes_of(comparison):
        print_line(note, console)
    print_parts(totals_parts(comparison.totals), console)


def spans_table(spans: Sequence[TextSpan]) -> Table:
    """The spans, each with its text and both datasets' tokens."""
    columns = [
        Column("Span", [Text(quoted(span.text), style=_style(span)) for span in spans], LEAST_TEXT, TEXT),
        Column("First's Tokens", [tokens_text([t.text for t in span.tokens]) for span in spans], LEAST_TEXT, TEXT),
        Column("Other's Tokens", [_other_tokens(span) for span in spans], LEAST_TEXT, TEXT),
        numbers("Bytes", [f"{span.num_bytes}" for span in spans]),
        numbers("Bits", [bits_text(span.bits) for span in spans], least=7),
        numbers("Other's", [bits_text(span.other_bits) for span in spans], least=7),
        numbers("Difference", [bits_text(span.difference, "+") for span in spans]),
    ]
    return Table("Spans", columns, ("Bytes", "Other's Tokens", "First's Tokens", "Other's", "Bits"))


def _style(span: TextSpan) -> str:
    """Grey for spans that are left out, a colour where the other model was more surprised."""
    if span.difference is None:
        return GREY
    return UNEXPECTED if span.difference > 0 else ""


def _other_tokens(span: TextSpan) -> Text:
    """The other's tokens or, for a span that is left out, the reason."""
    tokens = tokens_text([token.text for token in span.other_tokens])
    return Text(tokens) if span.reason is None else Text(f"(left out; {span.reason})", style=GREY)


def tokens_text(texts: Iterable[str]) -> str:
    """Tokens' texts, each in quotes."""
    return " ".join(map(quoted, texts))


def bits_text(bits: float | None, sign: str = "") -> str:
    """A number of bits in at most seven characters, "" for None.

    >>> bits_text(12.345), bits_text(-0.5, "+"), bits_text(float("inf")), bits_text(4e12), bits_text(None)
    ('12.35', '-0.50', 'inf', '4e+12', '')
    """
    if bits is None:
        return ""
    return f"{bits:{sign}.2f}" if abs(bits) < 9999.5 or not math.isfinite(bits) else f"{bits:{sign}.0e}"


def total_text(bits: float) -> str:
    """Bits of many spans with one decimal."""
    return f"{bits:,.1f}" if abs(bits) < 1e12 or not math.isfinite(bits) else f"{bits:.0e}"


def rate_text(bits_per_byte: float, sign: str = "") -> str:
    """Bits per byte with four decimals."""
    return (
        f"{bits_per_byte:{sign}.4f}"
        if abs(bits_per_byte) < 9999.5 or not math.isfinite(bits_per_byte)
        else f"{bits_per_byte:{sign}.0e}"
    )


# --- two datasets ---


def print_bits(comparison: CrossComparison, console: Console) -> None:
    """Print counts, totals, which model was more surprised and where, and the conversations furthest apart."""
    print_sources("Dataset Comparison Across Tokenizers", comparison.first, comparison.other, console)
    print_parts(counts_parts(comparison), console)
    for note in notes_of(comparison):
        print_line(note, console)
    tables = [totals_table(comparison.totals), surprised_table(comparison)]
    if comparison.left_out:
        tables.append(left_out_table(comparison.left_out))
    width = fitting_width(console)
    tables += [spans_listed(comparison, side, width) for side in (FIRST, OTHER)]
    for table in [*tables, conversations_table(comparison.conversations)]:
        if table.rows:
            print_line(f"{table.title}:", console, "bold")
            print_table(table, console)
    print_line(difference_text(comparison), console)


def counts_parts(comparison: CrossComparison) -> list[str]:
    """How many conversations are compared, and how many are not and why."""
    system = comparison.num_other_system
    return [
        f"{count_text(comparison.num_conversations, 'conversation')} compared",
        *chosen_parts(comparison.chosen_from),
        *([f"{system:,} of them with another system message"] if system else []),
        f"{comparison.only_in_first:,} only in the first",
        f"{comparison.only_in_other:,} only in the other",
        f"{comparison.num_different:,} with other messages, left out",
        *([f"{comparison.num_without_spans:,} with nothing to compare"] if comparison.num_without_spans else []),
    ]


def notes_of(comparison: SpanComparison | CrossComparison) -> list[str]:
    """Notes about the texts that a reader of the numbers needs."""
    notes = [
        f"The {name}'s tokens write {count_text(count, 'answer')} with other characters (case or accents, say); what "
        "they leave away costs no bits."
        for name, count in ((FIRST, comparison.rewrites), (OTHER, comparison.other_rewrites))
        if count
    ]
    if isinstance(comparison, SpanComparison) and comparison.has_other_system:
        notes.append("The two system messages differ.")
    return notes


def totals_parts(totals: BitTotals) -> list[str]:
    """A conversation's totals as text."""
    return [
        count_text(totals.num_spans, "span"),
        count_text(totals.num_bytes, "byte"),
        f"{totals.num_tokens:,} and {count_text(totals.other_num_tokens, 'token')}",
        f"{rate_text(totals.bits_per_byte)} and {rate_text(totals.other_bits_per_byte)} bits per byte",
        f"difference {rate_text(totals.difference, '+')}",
    ]


def difference_text(comparison: CrossComparison) -> str:
    """The difference in bits per byte with its standard error, and what it means."""
    difference, error = comparison.totals.difference, comparison.error
    told = rate_text(difference, "+") + (f" ± {rate_text(error)}" if math.isfinite(error) else "")
    who = "neither model was" if not difference else f"the {OTHER if difference > 0 else FIRST} model was"
    return f"Difference {told} bits per byte, the other's minus the first's: {who} more surprised."


def totals_table(totals: BitTotals) -> Table:
    """Both datasets' tokens and bits over the compared bytes."""
    counts, bits = (totals.num_tokens, totals.other_num_tokens), (totals.bits, totals.other_bits)
    rates = (totals.bits_per_byte, totals.other_bits_per_byte)
    columns = [
        labels("Dataset", [FIRST, OTHER]),
        numbers("Bits per byte", map(rate_text, rates)),
        numbers("Bits", map(total_text, bits)),
        numbers("Tokens", [f"{count:,}" for count in counts]),
        numbers("Bytes a token", [f"{totals.num_bytes / count:.2f}" if count else "" for count in counts]),
    ]
    title = f"Of {count_text(totals.num_bytes, 'byte')} in {count_text(totals.num_spans, 'span')}"
    return Table(title, columns, ("Bytes a token", "Tokens", "Bits"))


def surprised_table(comparison: CrossComparison) -> Table:
    """Where each model was the more surprised one."""
    sides: list[Surprised] = [comparison.first_surprised, comparison.other_surprised]
    columns = [
        labels("Model", [FIRST, OTHER]),
        numbers("Conversations", [f"{each.num_conversations:,}" for each in sides]),
        numbers("Spans", [f"{each.num_spans:,}" for each in sides]),
        numbers("Bytes", [f"{each.num_bytes:,}" for each in sides]),
        numbers("By bits", [total_text(each.bits) for each in sides]),
    ]
    return Table("Who was more surprised", columns, ("Bytes", "Spans"))


def left_out_table(left_out: Sequence[LeftOut]) -> Table:
    """What is not compared, by reason."""
    columns = [
        Column("Reason", [each.reason for each in left_out], 20, 60),
        numbers("Answers", [f"{each.num_answers:,}" for each in left_out]),
        numbers("Bytes", [f"{each.num_bytes:,}" for each in left_out]),
        numbers("Tokens", [f"{each.num_tokens:,}" for each in left_out]),
        numbers("Other's", [f"{each.other_num_tokens:,}" for each in left_out]),
    ]
    return Table("Left out of the comparison", columns, ("Answers", "Other's", "Tokens"))


def spans_listed(comparison: CrossComparison, side: str, width: float = math.inf) -> Table:
    """The spans where the model of one ``side``, first or other, was more surprised, those with the most bits first."""
    spans: list[SurprisingSpan] = comparison.first_spans if side == FIRST else comparison.other_spans
    text = TEXT if width >= ROOMY else LEAST_TEXT
    columns = [
        Column("Span", [quoted(each.text) for each in spans], LEAST_TEXT, text),
        Column("First's Tokens", [tokens_text(each.tokens) for each in spans], LEAST_TEXT, text),
        Column("Other's Tokens", [tokens_text(each.other_tokens) for each in spans], LEAST_TEXT, text),
        numbers("Bits", [bits_text(each.bits) for each in spans], least=7),
        numbers("Other's", [bits_text(each.other_bits) for each in spans], least=7, is_joined=True),
        Column("Where", lambda cells: [_place(each, cells) for each in spans], LEAST_PLACE, PLACE),
    ]
    title = f"Spans where the {side} model was more surprised"
    return Table(title, columns, ("Where", "Other's Tokens", "First's Tokens"))


def _place(span: SurprisingSpan, width: int) -> str:
    place = f"row {span.sample_index} …"
    return place + text_end(span.before, width - len(place))


def conversations_table(conversations: Sequence[ConversationBits], most: int = LISTED_CONVERSATIONS) -> Table:
    """The ``most`` conversations furthest apart, those where the other model was more surprised first."""
    furthest = sorted(conversations, key=lambda each: -abs(each.difference))[:most]
    shown = sorted(furthest, key=lambda each: -each.difference)
    of_all = "" if len(shown) == len(conversations) else f", {len(shown)} of {len(conversations):,}"
    columns = [
        numbers("Row", [f"{each.sample_index}" for each in shown]),
        numbers("Bytes", [f"{each.num_bytes:,}" for each in shown]),
        numbers("Bits per byte", [rate_text(each.bits_per_byte) for each in shown]),
        numbers("Other's", [rate_text(each.other_bits_per_byte) for each in shown]),
        numbers("Difference", [rate_text(each.difference, "+") for each in shown]),
        Column("Question", [quoted(each.question, space=" ") for each in shown], 8, 80),
    ]
    return Table(f"Conversations furthest apart{of_all}", columns, ("Bytes", "Question", "Other's", "Bits per byte"))
