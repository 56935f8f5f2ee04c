"""A whole dataset, or two beside each other, as a page of figures and tables."""

from chat_logits.analysis.histograms import Histogram
from chat_logits.display.html_page import render_page
from chat_logits.display.summary_report import kept_groups
from chat_logits.display.text import quoted
from chat_logits.display.token_report import entropy_text, prediction_text, short_perplexity

LABELLED, TICKS = 12, 5  # up to so many bins are all labelled; of more, about so many
CONTEXT = 60  # characters before a token


def summary_page(summary) -> str:
    """The page of a ``dataset_summary.DatasetSummary``."""
    return render_page(
        "summary.html.jinja",
        title=f"Summary of {summary.dataset_id}",
        subtitle=f"What {summary.model_id} thought of every extracted token",
        tiles=_tiles(summary),
        figures=[
            _reliability(summary),
            histogram("Surprisal of the real tokens, nats", summary.surprisals),
            histogram(f"Entropy of the predictions, nats{', at least' * summary.entropy_is_bound}", summary.entropies),
            _kept(summary.kept),
            _sizes(summary),
            _conversations("Most confident conversations", summary.most_confident),
            _conversations("Least confident conversations", summary.least_confident),
            _losses(summary.largest_losses),
            _vocabulary(summary.vocabulary_losses),
        ],
    )


def _tiles(summary) -> list[tuple[str, str]]:
    return [
        ("Conversations", f"{summary.num_conversations:,}"),
        ("Tokens", f"{summary.num_tokens:,}"),
        ("Perplexity", short_perplexity(summary.perplexity)),
        ("Top-1", f"{summary.top1_rate:.1%}"),
        ("Top-5, at least" if summary.top5_is_bound else "Top-5", f"{summary.top5_rate:.1%}"),
        ("In the nucleus", f"{summary.in_nucleus_rate:.1%}"),
        ("Mean entropy", entropy_text(summary.mean_entropy, summary.entropy_is_bound)),
        ("Probability stored", f"{summary.stored:.1%}"),
        ("Calibration error", f"{summary.calibration_error:.3f}"),
        ("Bytes a token", f"{summary.bytes_per_token:.1f}"),
    ]


# --- figures ---


def histogram(title: str, found: Histogram, note: str = "", span: int = 4) -> dict:
    """A figure of a ``Histogram``; ``span`` is its width in twelfths of the page's."""
    total, largest = max(1, sum(found.counts)), max(1, *found.counts)
    step = 1 if len(found.counts) <= LABELLED else -(-len(found.counts) // TICKS)
    return {
        "kind": "histogram",
        "span": span,
        "title": title,
        "note": note,
        "bins": [
            {
                "percent": round(100 * count / largest, 2),
                "title": f"{_span(low, high)}: {count:,} ({count / total:.1%})",
            }
            for low, high, count in found.bins
        ],
        "ticks": [_tick(low, high) if i % step == 0 else "" for i, (low, high, _) in enumerate(found.bins)],
        "told": "; ".join(f"{_span(low, high)}: {count / total:.1%}" for low, high, count in found.bins if count),
    }


def _tick(low: float, high: float | None) -> str:
    return f"{low:g}+" if high is None else f"{low:g}"


def _span(low: float, high: float | None) -> str:
    return f"{low:g} and more" if high is None else f"{low:g} – {high:g}"


def _reliability(summary) -> dict:
    present = [one for one in summary.calibration if one.count]
    largest = max(one.count for one in present)
    return {
        "kind": "reliability",
        "span": 4,
        "title": "Calibration",
        "note": f"Below the diagonal the model is surer than right. Expected error {summary.calibration_error:.3f}.",
        "bins": [
            {
                "x": round(100 * one.low, 2),
                "width": round(100 * (one.high - one.low), 2),
                "y": round(100 - 100 * one.accuracy, 2),
                "height": round(100 * one.accuracy, 2),
                "confidence": round(100 * one.confidence, 2),
                "radius": round(0.8 + 1.8 * (one.count / largest) ** 0.5, 2),
                "title": f"{one.count:,} tokens: probability {one.confidence:.3f}, right {one.accuracy:.3f}",
            }
            for one in present
        ],
    }


def bars(title: str, rows: list[tuple[str, float, str]], note: str = "") -> dict:
    """A figure of horizontal bars: label, value, and the value in words."""
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
    return bars("Nucleus entries kept a position", rows, f"{len(kept.counts) - 1} at most")


def _sizes(summary) -> dict:
    rows = [(one.column, one.num_bytes, f"{one.bytes_per_token:.2f}") for one in summary.columns]
    return bars("Bytes a token by column, compressed", rows, f"{summary.num_bytes:,} bytes in all")


# --- tables ---


def table(title: str, columns: list[str], rows: list[list[str]], numeric: set[str], span: int = 12) -> dict:
    """A figure of rows of texts; ``numeric`` columns stand to the right."""
    found = {"kind": "table", "span": span, "title": title, "note": ""}
    return {**found, "columns": columns, "rows": rows, "numeric": sorted(numeric)}


def _conversations(title: str, conversations: list) -> dict:
    columns = ["Row", "Source row", "Tokens", "Perplexity", "Question"]
    rows = [
        [
            f"{one.sample_index}",
            f"{one.source_index}",
            f"{one.num_tokens:,}",
            short_perplexity(one.perplexity),
            quoted(one.question, space=" ")[1:-1],
        ]
        for one in conversations
    ]
    return table(title, columns, rows, set(columns[:-1]), span=6)


def _losses(losses: list) -> dict:
    columns = ["Row", "Position", "Text before", "Token", "Log p", "Predicted first"]
    rows = [
        [
            f"{one.sample_index}",
            f"{one.position}",
            context(one.before),
            quoted(one.text),
            f"{one.log_prob:.2f}",
            prediction_text(one.prediction),
        ]
        for one in losses
    ]
    return table("Tokens with the largest loss", columns, rows, {"Row", "Position", "Log p"})


def context(before: str) -> str:
    """The end of the text before a token."""
    return "…" + quoted(before[-CONTEXT:], space=" ")[1:-1]


def _vocabulary(losses: list) -> dict:
    columns = ["Id", "Token", "Times", "Nats in all", "Share of the loss", "Mean"]
    rows = [
        [
            f"{one.token_id}",
            quoted(one.text),
            f"{one.count:,}",
            f"{one.total_loss:,.1f}",
            f"{one.share:.1%}",
            f"{one.mean_loss:.2f}",
        ]
        for one in losses
    ]
    return table("Vocabulary tokens with the largest loss in all", columns, rows, set(columns) - {"Token"})
