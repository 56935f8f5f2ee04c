"""Comparisons across tokenizers as pages: a conversation's spans shaded by their difference, and whole datasets."""

import itertools
import math
from collections.abc import Iterable

from chat_logits.analysis.cross_records import BitTotals, CrossComparison, SpanComparison, SpanToken, TextSpan
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, TokenAnalysis
from chat_logits.display.comparison_page import difference_rows, names_of
from chat_logits.display.dataset_page import STYLES, table_figure
from chat_logits.display.formats import chosen_text, short_probability
from chat_logits.display.measures import Measure, adaptive_floor
from chat_logits.display.page import render_page
from chat_logits.display.span_tables import (
    FIRST,
    OTHER,
    bits_text,
    conversations_table,
    counts_parts,
    left_out_table,
    notes_of,
    rate_text,
    spans_listed,
    surprised_table,
    totals_table,
)
from chat_logits.display.text import quoted
from chat_logits.display.token_numbers import conversation_text
from chat_logits.display.token_page import LISTED, Bar, TokenPage

LEAST_BITS, MOST_BITS = 1e-3, 1.0  # the smallest number of bits with a shade is between these
MOST_ROWS = 14  # bars and titles that a panel reserves room for
CONVERSATIONS = 200


def spans_page(comparison: SpanComparison, frame: dict | None = None) -> str:
    """The page of a conversation in two datasets; at first, each span is shaded by its difference."""
    names = names_of(comparison.first, comparison.other, comparison.differences)
    tokens = _as_tokens(comparison)
    spans = dict(zip((token.position for token in tokens if token.status != PROMPT), comparison.spans, strict=True))
    compared = [span for span in comparison.spans if span.difference is not None]
    places = {span.index: position for position, span in spans.items()}
    furthest = comparison.showing(only=comparison.only or LISTED).shown
    page = TokenPage(
        tokens=tokens,
        messages=comparison.messages,
        measures=_measures(compared, names),
        mark=lambda token: "second" if (spans[token.position].difference or 0) > 0 else "",
        detail=lambda token: _detail(spans.get(token.position), names),
        listed=[tokens[places[span.index]] for span in furthest],
        rows=min(MOST_ROWS, max((2 + len(span.tokens) + len(span.other_tokens) for span in compared), default=2)),
        numbers={
            "text": conversation_text(comparison.messages),
            "head": comparison.head,
            "spans": comparison.showing(only=None).to_dicts(),
        },
        noun="span",
    )
    return page.render(
        frame,
        title=f"Source row {comparison.source_index} in {comparison.first.logit_dataset_id} and "
        f"{comparison.other.logit_dataset_id}",
        subtitle=" ".join(
            [f"How surprised {names[0]} and {names[1]} were by the same text, in bits.", *notes_of(comparison)]
        ),
        tiles=[*_tiles(comparison.totals), ("Left out", _left_out(comparison))],
        differences=difference_rows(comparison.differences),
        names=names,
        listed_title="Furthest apart",
        second_means=f"{names[1]} was more surprised",
        absent_means=None,
        skipped_means="left out: not extracted in one of the two",
        seen="each model's tokens there",
        bars="Bars are the probability of each token, exact.",
    )


def _as_tokens(comparison: SpanComparison) -> list[TokenAnalysis]:
    """What the page shows instead of tokens: the spans, and the lines of the other messages."""
    spans = {message: list(group) for message, group in itertools.groupby(comparison.spans, lambda span: span.message)}
    texts: list[tuple[str, str, str | None]] = []
    for number, message in enumerate(comparison.messages):
        if message["role"] == "assistant":
            texts += [
                (span.text, EXTRACTED if span.reason is None else SKIPPED, span.reason)
                for span in spans.get(number, [])
            ]
        else:
            texts += [(line, PROMPT, PROMPT) for line in (message["content"] or "").splitlines(keepends=True)]
    return [TokenAnalysis(position, position, *each) for position, each in enumerate(texts)]


def _measures(spans: list[TextSpan], names: tuple[str, str]) -> list[Measure]:
    numbers = {
        ("difference", "|Difference|"): [abs(span.difference or 0.0) for span in spans],
        ("first", f"Bits, {names[0]}"): [span.bits or 0.0 for span in spans],
        ("other", f"Bits, {names[1]}"): [span.other_bits or 0.0 for span in spans],
    }
    return [
        Measure(*name, "bits", each, adaptive_floor(each, LEAST_BITS, MOST_BITS), False)
        for name, each in numbers.items()
    ]


def _detail(span: TextSpan | None, names: tuple[str, str]) -> dict:
    """What the panel shows for a span; None stands for a line of a prompt."""
    if span is None:
        return {"place": "Part of the prompt"}
    place = f"Message {span.message}, bytes {span.start} to {span.end}"
    tokens = [(name, each) for name, each in zip(names, (span.tokens, span.other_tokens), strict=True) if each]
    groups = [{"title": name, "bars": [_bar(token) for token in each]} for name, each in tokens]
    if span.difference is None:
        return {"place": f"{place} · left out; {span.reason}", "groups": groups}
    facts = [
        ("bits", f"{bits_text(span.bits)} and {bits_text(span.other_bits)}"),
        ("difference", f"{bits_text(span.difference, '+')} bits"),
        ("bytes", f"{span.num_bytes}"),
    ]
    return {"place": place, "facts": facts, "groups": groups}


def _bar(token: SpanToken) -> Bar:
    if token.log_prob is None:
        return Bar(quoted(token.text), 0.0, "", "rest")
    probability = math.exp(token.log_prob)
    return Bar(quoted(token.text), round(min(1.0, probability), 4), short_probability(probability), "target")


def _tiles(totals: BitTotals) -> list[tuple[str, str]]:
    """A comparison's numbers for the head of a page."""
    return [
        ("Bits per byte", f"{rate_text(totals.bits_per_byte)} and {rate_text(totals.other_bits_per_byte)}"),
        ("Difference", rate_text(totals.difference, "+")),
        ("Spans", f"{totals.num_spans:,}"),
        ("Bytes compared", f"{totals.num_bytes:,}"),
        ("Tokens", f"{totals.num_tokens:,} and {totals.other_num_tokens:,}"),
    ]


def _left_out(comparison: SpanComparison | CrossComparison) -> str:
    return f"{sum(each.num_bytes for each in comparison.left_out):,} bytes"


# --- two datasets ---


def bits_page(comparison: CrossComparison, frame: dict | None = None) -> str:
    """The page of two datasets with different tokenizers; ``frame`` is as for ``datasets_page``."""
    names = names_of(comparison.first, comparison.other, comparison.differences)
    return render_page(
        "summary.html.jinja",
        styles=STYLES,
        frame=frame,
        title=f"{comparison.first.logit_dataset_id} and {comparison.other.logit_dataset_id}",
        subtitle=". ".join(
            [
                f"How surprised {names[0]} (first) and {names[1]} (other) were by the same text, in bits",
                ", ".join(counts_parts(comparison)),
                *notes_of(comparison),
            ]
        ),
        tiles=_dataset_tiles(comparison),
        differences=difference_rows(comparison.differences),
        names=names,
        figures=_figures(comparison, (frame or {}).get("row")),
    )


def _dataset_tiles(comparison: CrossComparison) -> list[tuple[str, str]]:
    error = f" ± {rate_text(comparison.error)}" if math.isfinite(comparison.error) else ""
    tiles = [(name, text + error * (name == "Difference")) for name, text in _tiles(comparison.totals)]
    counts = [
        ("Conversations", chosen_text(comparison.num_conversations, comparison.chosen_from)),
        ("Left out", _left_out(comparison)),
    ]
    return [*tiles, *counts]


def _figures(comparison: CrossComparison, address: str | None) -> list[dict]:
    """The tables that have rows; with an ``address`` that has ``{row}``, spans and conversations are links."""

    def links(rows: Iterable[int]) -> list[str]:
        return [address.format(row=row) for row in rows] if address else []

    figures = [table_figure(totals_table(comparison.totals), 6), table_figure(surprised_table(comparison), 6)]
    for side, spans in ((FIRST, comparison.first_spans), (OTHER, comparison.other_spans)):
        figures.append(table_figure(spans_listed(comparison, side), links=links(span.sample_index for span in spans)))
    conversations = conversations_table(comparison.conversations, CONVERSATIONS)
    rows = conversations.columns[0].cells_at(0)
    figures.append(table_figure(conversations, links=links(int(str(row)) for row in rows)))
    figures.append(table_figure(left_out_table(comparison.left_out)))
    return [figure for figure in figures if figure["rows"]]
