"""A whole dataset, or two next to each other, as a page of figures and tables; the tables are the terminal's."""

from collections.abc import Iterable, Sequence
from typing import Any

from chat_logits.analysis.dataset_comparison import DatasetComparison
from chat_logits.analysis.runs import RunRecord
from chat_logits.analysis.summary import DatasetSummary, Histogram
from chat_logits.display.comparison_page import comparison_tiles, difference_rows, names_of, short_hash
from chat_logits.display.dataset_tables import (
    conversation_tables,
    divergent_conversations_table,
    divergent_tokens_table,
    kept_groups,
    losses_table,
    vocabulary_table,
)
from chat_logits.display.formats import chosen_text, entropy_text, short_perplexity
from chat_logits.display.page import render_page
from chat_logits.display.tables import Table
from chat_logits.display.text import line_of

STYLES = ("runs.css",)
LABELLED, TICKS = 12, 5  # up to 12 bins are all labelled; of more, about 5


def summary_page(summary: DatasetSummary, frame: dict | None = None) -> str:
    """The page of a dataset's summary; ``frame`` is as for ``datasets_page``."""
    address = (frame or {}).get("row", "")

    def links(places: Iterable) -> list[str]:
        return [place_in(address, each) for each in places] if address else []

    conversations = zip(conversation_tables(summary), (summary.most_confident, summary.least_confident), strict=True)
    at_least = ", at least" * summary.entropy_is_bound
    return render_page(
        "summary.html.jinja",
        styles=STYLES,
        frame=frame,
        title=f"Summary of {summary.dataset_id}",
        subtitle=f"What {summary.model_id} predicted in place of every extracted token",
        tiles=_tiles(summary),
        record=_record(summary.run),
        figures=[
            _reliability(summary),
            histogram_figure("Surprisal of the target tokens", summary.surprisals, "surprisal, nats"),
            histogram_figure("Entropy of the predictions", summary.entropies, f"entropy{at_least}, nats"),
            _kept(summary.kept),
            *([_sizes(summary)] if summary.columns else []),
            *(table_figure(table, 6, links(places)) for table, places in conversations),
            table_figure(losses_table(summary.largest_losses), links=links(summary.largest_losses)),
            table_figure(vocabulary_table(summary.vocabulary_losses), links=links(summary.vocabulary_losses)),
        ],
    )


def place_in(address: str, place: Any) -> str:
    """The address of a conversation, or of one of its extracted tokens, from an ``address`` with ``{row}`` in it."""
    token = f"#t={place.index}" if hasattr(place, "index") else ""
    return address.format(row=place.sample_index) + token


def _record(run: RunRecord) -> list[tuple[str, str]]:
    """Where the rows come from and how they were made, as names and texts."""
    source = " · ".join(filter(None, (run.source_id, run.source_config, f"split {run.source_split}")))
    nucleus = f"top-k {run.top_k:,}, top-p {run.top_p:g}, {run.num_sampled} draws from the tail, seed {run.seed}"
    weights = f", weights {run.quantization}" if run.quantization else ""
    precision = f"{run.dtype}{weights}, head {run.head_dtype}, attention {run.attn_implementation or 'not recorded'}"
    turns = "turns marked not to be trained on, too" if run.all_turns else "turns marked not to be trained on left out"
    most = "all rows" if run.max_samples is None else f"the first {run.max_samples:,} rows"
    lines = [
        ("Model", f"{run.model_id} at {short_hash(run.model_revision)}"),
        ("Source", f"{source} at {short_hash(run.source_revision)}, {most}, {turns}"),
        ("Stored", nucleus),
        ("Computed in", precision),
        ("Written", f"{run.written[:16].replace('T', ' ')} UTC")
        if run.written
        else ("Revision", short_hash(run.revision or "")),
    ]
    return [(name, line_of(text)) for name, text in lines]


def _tiles(summary) -> list[tuple[str, str]]:
    return [
        ("Conversations", chosen_text(summary.num_conversations, summary.chosen_from)),
        *([("Turns left out by marks", f"{summary.turns_left_out:,}")] if summary.turns_left_out else []),
        ("Tokens", f"{summary.num_tokens:,}"),
        ("Perplexity", short_perplexity(summary.perplexity)),
        ("Top-1", f"{summary.top1_rate:.1%}"),
        ("Top-5, at least" if summary.top5_is_bound else "Top-5", f"{summary.top5_rate:.1%}"),
        ("In the nucleus", f"{summary.in_nucleus_rate:.1%}"),
        ("Mean entropy", entropy_text(summary.mean_entropy, summary.entropy_is_bound)),
        ("Probability stored", f"{summary.stored:.1%}"),
        ("Calibration error", f"{summary.calibration_error:.3f}"),
        *([] if summary.bytes_per_token is None else [("Bytes per token", f"{summary.bytes_per_token:.1f}")]),
    ]


# --- figures ---


def histogram_figure(title: str, counted: Histogram, axis: str, note: str = "", span: int = 4) -> dict:
    """A figure of a ``Histogram`` over an ``axis``; ``span`` is its width in twelfths of the page."""
    total, largest = max(1, sum(counted.counts)), max(1, *counted.counts)
    step = 1 if len(counted.counts) <= LABELLED else -(-len(counted.counts) // TICKS)
    return {
        "kind": "histogram",
        "span": span,
        "title": title,
        "note": note,
        "axis": axis,
        "shares": [f"{largest / total:.1%}", f"{largest / total / 2:.1%}", "0%"],
        "bins": [
            {
                "percent": round(100 * count / largest, 2),
                "title": f"{_span(low, high)}: {count:,} ({count / total:.1%})",
            }
            for low, high, count in counted.bins
        ],
        "ticks": [_tick(low, high) if i % step == 0 else "" for i, (low, high, _) in enumerate(counted.bins)],
        "summary": "; ".join(f"{_span(low, high)}: {count / total:.1%}" for low, high, count in counted.bins if count),
    }


def _tick(low: float, high: float | None) -> str:
    return f"{low:g}+" if high is None else f"{low:g}"


def _span(low: float, high: float | None) -> str:
    return f"{low:g} and more" if high is None else f"{low:g} – {high:g}"


def _reliability(summary) -> dict:
    present = [each for each in summary.calibration if each.count]
    largest = max(each.count for each in present)
    return {
        "kind": "reliability",
        "span": 4,
        "title": "Calibration",
        "note": f"Below the diagonal the model is overconfident. Expected error {summary.calibration_error:.3f}.",
        "bins": [
            {
                "x": round(100 * each.low, 2),
                "width": round(100 * (each.high - each.low), 2),
                "y": round(100 - 100 * each.accuracy, 2),
                "height": round(100 * each.accuracy, 2),
                "confidence": round(100 * each.confidence, 2),
                "radius": round(0.8 + 1.8 * (each.count / largest) ** 0.5, 2),
                "title": f"{each.count:,} tokens: probability {each.confidence:.3f}, right {each.accuracy:.3f}",
            }
            for each in present
        ],
    }


def _bars(title: str, rows: Sequence[tuple[str, float, str]], note: str = "") -> dict:
    """A figure of horizontal bars: label, value, and the value as text."""
    largest = max((value for _, value, _ in rows), default=0) or 1
    return {
        "kind": "bars",
        "span": 6,
        "title": title,
        "note": note,
        "rows": [
            {"label": label, "percent": round(100 * value / largest, 2), "number": number}
            for label, value, number in rows
        ],
    }


def _kept(kept: Histogram) -> dict:
    groups, total = kept_groups(kept), max(1, sum(kept.counts))
    rows = [(name, count, f"{count / total:.1%}") for name, count in groups]
    return _bars("Nucleus entries kept per position", rows, f"{len(kept.counts) - 1} at most")


def _sizes(summary) -> dict:
    rows = [(each.column, each.num_bytes, f"{each.bytes_per_token:.2f}") for each in summary.columns]
    return _bars("Bytes per token by column, compressed", rows, f"{summary.num_bytes:,} bytes in all")


# --- tables ---


def table_figure(table: Table, span: int = 12, links: Sequence[str] = ()) -> dict:
    """A figure of a table; ``links`` are the addresses of its rows, if any."""
    columns = [column for i, column in enumerate(table.columns) if not _repeats(table, i)]
    return {
        "kind": "table",
        "span": span,
        "title": table.title,
        "note": "",
        "columns": [(column.title, column.is_number) for column in columns],
        "rows": list(zip(*(column.cells_at(column.most) for column in columns), strict=True)),
        "links": list(links),
    }


def _repeats(table: Table, i: int) -> bool:
    """Whether a column of source rows is the same as the column of rows before it."""
    column, before = table.columns[i], table.columns[i - 1]
    is_repeated = column.title == "Source row" and before.title == "Row"
    return is_repeated and list(column.cells_at(column.most)) == list(before.cells_at(before.most))


# --- two datasets ---


def datasets_page(comparison: DatasetComparison, frame: dict | None = None) -> str:
    """The page of two datasets: how their runs differ, where they are furthest apart, and how far they are apart.

    If the ``frame`` has ``row``, an address with ``{row}`` in it, each token and conversation is linked to its place.
    """
    left_out = comparison.only_in_first + comparison.only_in_other + comparison.num_different
    count = chosen_text(comparison.num_conversations, comparison.chosen_from)
    tiles = [("Conversations", count), ("Left out", f"{left_out:,}")]
    note = (
        f"Left out: {comparison.only_in_first:,} only in the first, {comparison.only_in_other:,} only in the other, "
        f"{comparison.num_different:,} with other tokens."
    )
    names = names_of(comparison.first, comparison.other, comparison.differences)
    address = (frame or {}).get("row", "")
    rows = [place_in(address, each) for each in comparison.conversations]
    places = [place_in(address, each) for each in comparison.tokens]
    return render_page(
        "summary.html.jinja",
        styles=STYLES,
        frame=frame,
        title=f"{comparison.first.logit_dataset_id} and {comparison.other.logit_dataset_id}",
        subtitle=f"How far {names[0]} and {names[1]} are apart",
        tiles=[*tiles, *comparison_tiles(comparison.totals)],
        differences=difference_rows(comparison.differences),
        names=names,
        figures=[
            table_figure(divergent_tokens_table(comparison.tokens), links=places if address else ()),
            table_figure(divergent_conversations_table(comparison.conversations), links=rows if address else ()),
            histogram_figure("KL divergence of the tokens", comparison.histogram, "nats, at least", note, span=12),
        ],
    )
