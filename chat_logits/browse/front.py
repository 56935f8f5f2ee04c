"""The parts of the front page as plain values for its templates: tiles, histograms, list, losses."""

import math
from bisect import bisect_left

from chat_logits.analysis.row import perplexity_of
from chat_logits.analysis.summary import DatasetSummary
from chat_logits.browse.browsed import Browsed
from chat_logits.browse.index import Clock, Counted
from chat_logits.browse.jobs import DONE, FAILED, RUNNING, Job
from chat_logits.browse.view import PAGE_ROWS, Range, View
from chat_logits.display.formats import short_nats, short_perplexity
from chat_logits.display.text import line_of, quoted
from chat_logits.words import count_text

HISTOGRAMS = {"mean_nll": "Perplexity", "mean_entropy": "Entropy, nats", "num_tokens": "Tokens"}
TITLES = {
    "mean_nll": "perplexity",
    "mean_entropy": "entropy",
    "num_tokens": "tokens",
    "top1_rate": "top-1 rate",
    "max_surprisal": "largest surprisal",
    "source_index": "source row",
}
COLUMNS = (  # name, title, kind, whether the largest come first
    ("row", "Row", "row", False),
    ("question", "Question", "question", False),
    ("num_tokens", "Tokens", "number", True),
    ("mean_nll", "Perplexity", "number", True),
    ("mean_entropy", "Entropy", "number", True),
    ("top1_rate", "Top-1", "number", False),
    (None, "Surprisal", "spark", False),
    ("max_surprisal", "Least expected", "worst", True),
    ("note", "Marks", "marks", True),
)


def parts(browsed: Browsed, view: View, clock: Clock, error: str | None = None, other: str | None = None) -> dict:
    """The content of ``view.html.jinja``. ``error`` says what is wrong in the address; ``other`` is the dataset to
    compare with."""
    index, bound = browsed.index, browsed.dataset.manifest.num_sampled == 0
    if view.needs_texts:
        browsed.texts.start()
    totals = index.totals(view, clock)
    query = view.query(page=1)
    rows = [_row(row, bound) for row in index.page(view, clock)]
    return {
        "query": view.query(),
        "waiting": view.needs_texts and browsed.texts.state == RUNNING,
        "tiles": _tiles(totals, view, bound),
        "histograms": [_histogram(index.histogram(name, view, clock), view) for name in HISTOGRAMS],
        "error": error,
        "notices": _notices(browsed, view),
        "found": _found(totals["rows"], browsed.dataset.num_rows),
        "count_text": count_text(totals["rows"], "conversation"),
        "chips": _chips(view),
        "columns": [_column(view, *column) for column in COLUMNS],
        "rows": rows,
        "pages": _pages(view, totals["rows"]),
        "comparison": other,
        "after": f"?{query}" * bool(query),
    }


def _tiles(totals: dict, view: View, bound: bool) -> list[dict]:
    def tile(name: str, value: str, sort: str, down: bool, title: str) -> dict:
        return {"name": name, "value": value, "query": view.query(sort=sort, down=down, page=1), "title": title}

    if not totals["num_tokens"]:
        return []
    tokens, mean_entropy = totals["num_tokens"], totals["mean_entropy"]
    return [
        tile("Conversations", f"{totals['rows']:,}", "row", False, "in the dataset's own order"),
        tile("Tokens", f"{tokens:,}", "num_tokens", True, "the longest first"),
        tile("Perplexity", short_perplexity(perplexity_of(totals["mean_nll"])), "mean_nll", True, "the highest first"),
        tile("Mean entropy", f"{'≥ ' * bound}{mean_entropy:.2f} nats", "mean_entropy", True, "the highest first"),
        tile("Top-1", f"{totals['top1_rate']:.1%}", "top1_rate", False, "the lowest first"),
    ]


def _notices(browsed: Browsed, view: View) -> list[str]:
    notices = []
    texts = browsed.texts
    if texts.state == RUNNING and view.needs_texts:
        fetched = "" if browsed.is_local else " from the Hub, once"
        notices.append(
            f"Reading the messages{fetched}: {texts.done:,} of {count_text(texts.total, 'shard')}. What is shown comes "
            "from those that have been read."
        )
    if texts.state == FAILED and view.needs_texts:
        notices.append(f"The messages could not be read: {texts.reason}")
    notices += [f"Its messages are not searched: {reason}" for reason in browsed.unread if view.needs_texts]
    return notices


def _found(count: int, total: int) -> str:
    return count_text(total, "conversation") if count == total else f"{count:,} of {count_text(total, 'conversation')}"


def _chips(view: View) -> list[tuple[str, str]]:
    """Each filter in words, and the query without it."""
    chips = [(f"“{line_of(view.text)}”", view.query(text="", page=1))] if view.text else []
    chips += [(view.where, view.query(where="", page=1))] if view.where else []
    chips += [
        (f"{TITLES[name]} {_span_text(name, span)}", view.without(name).query()) for name, span in view.ranges.items()
    ]
    for role, span in view.roles.items():
        others = {name: other for name, other in view.roles.items() if name != role}
        chips.append((f"{_whole(span)} of {line_of(role)}", view.query(roles=others, page=1)))
    chips += [("marked", view.query(marked=False, page=1))] if view.marked else []
    chips += [(f"tag {view.tag}", view.query(tag="", page=1))] if view.tag else []
    return chips


def _whole(span: Range) -> str:
    low, high = (None if end is None else f"{end:g}" for end in (span.low, span.high))
    if low == high or high is None:
        return f"{low} messages" if high is not None else f"{low} messages or more"
    return f"up to {high} messages" if low is None else f"{low} to {high} messages"


def _span_text(name: str, span: Range) -> str:
    low, high = (None if end is None else value_text(name, end) for end in (span.low, span.high))
    return f"{low} – {high}" if low and high else f"from {low}" if low else f"up to {high}"


def value_text(name: str, value: float) -> str:
    """A number of a column in words, the mean negative log-likelihood as a perplexity."""
    if name == "mean_nll":
        value = perplexity_of(value)
        return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"
    if name in ("num_tokens", "source_index"):
        return f"{math.floor(value + 0.5):,}"
    return f"{value:.1%}" if name == "top1_rate" else f"{value:.2f}"


def _histogram(counted: Counted, view: View) -> dict:
    name, bins = counted.name, len(counted.total)
    span, largest = view.ranges.get(name, Range()), max(1, *counted.total)
    low = 0 if span.low is None else min(bins, max(0, _nearest(counted.edges, span.low)))
    high = bins if span.high is None else min(bins, max(0, _nearest(counted.edges, span.high)))
    labels = [value_text(name, edge) for edge in counted.edges]
    return {
        "name": name,
        "title": HISTOGRAMS[name],
        "edges": " ".join(f"{edge:.9g}" for edge in counted.edges),
        "low": low,
        "high": max(low, high),
        "span": "" if name not in view.ranges else _span_text(name, span),
        "reset": view.without(name).query() if name in view.ranges else None,
        "bins": bins,
        "all": _bars(counted.total, largest),
        "left": _bars(counted.counts, largest),
        "labels": labels,
        "ticks": labels[:: bins // 4],
        "summary": f"{HISTOGRAMS[name]}: half of the rows are below {labels[_median(counted.total)]}",
    }


def _bars(counts: list[int], largest: int) -> str:
    """The bars as one SVG path, each a unit wide and up to 100 high; even a single row is visible."""
    tops = ((i, round(100 - max(3, 96 * count / largest), 1)) for i, count in enumerate(counts) if count)
    return "".join(f"M{i}.06 100V{top:g}h.88V100z" for i, top in tops)


def _nearest(edges: list[float], value: float) -> int:
    place = bisect_left(edges, value)
    return place - 1 if place and (place == len(edges) or value - edges[place - 1] < edges[place] - value) else place


def _median(counts: list[int]) -> int:
    seen, half = 0, sum(counts) / 2
    for i, count in enumerate(counts):
        seen += count
        if seen >= half:
            return i
    return 0


def _column(view: View, name: str | None, title: str, kind: str, down: bool) -> dict:
    is_sorted = name is not None and view.sort == name
    query = None if name is None else view.query(sort=name, down=not view.down if is_sorted else down, page=1)
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "query": query,
        "sorted": ("descending" if view.down else "ascending") if is_sorted else "none",
        "arrow": ("↓" if view.down else "↑") if is_sorted else "",
    }


def _row(row: dict, bound: bool) -> dict:
    def number(name: str, form: str) -> str:
        return "–" if row[name] is None else format(row[name], form)

    perplexity = "–" if row["mean_nll"] is None else short_perplexity(perplexity_of(row["mean_nll"]))
    return {
        **{name: row[name] for name in ("row", "source_index", "fault")},
        "question": line_of(row["question"] or ""),
        "note": row["note"] or "",
        "tags": row["tags"] or [],
        "tokens": number("num_tokens", ",d"),
        "perplexity": perplexity,
        "entropy": "≥ " * bound + number("mean_entropy", ".2f"),
        "top1": number("top1_rate", ".1%"),
    }


def _pages(view: View, count: int) -> list[tuple[str, str, str | None]]:
    last = max(1, -(-count // PAGE_ROWS))
    first = min(count, PAGE_ROWS * (view.page - 1) + 1)
    shown = f"{first:,} – {min(count, PAGE_ROWS * view.page):,}"

    def to(page: int, enabled: bool) -> str | None:
        return view.query(page=page) if enabled else None

    return [
        ("first", "First", to(1, view.page > 1)),
        ("prev", "Previous", to(min(view.page - 1, last), view.page > 1)),
        ("shown", shown, None),
        ("next", "Next", to(view.page + 1, view.page < last)),
        ("last", "Last", to(last, view.page < last)),
    ]


# --- losses ---


def losses(job: Job, browsed: Browsed) -> dict:
    """The content of ``losses.html.jinja``."""
    if job.state == DONE:
        return {"state": DONE, **_found_losses(job.result)}
    size = f" ({browsed.num_bytes / 1e6:,.1f} MB)" * bool(browsed.num_bytes)
    told = {
        RUNNING: f"Reading all rows: {job.done:,} of {job.total or browsed.dataset.num_rows:,}",
        FAILED: f"The losses could not be computed: {job.reason}",
    }
    fallback = f"Calibration, and the tokens with the largest loss, are known once all rows have been read{size}."
    return {"state": job.state, "done": job.done, "total": job.total, "told": told.get(job.state, fallback)}


def _found_losses(summary: DatasetSummary) -> dict:
    vocabulary = summary.vocabulary_losses
    largest = max((entry.share for entry in vocabulary), default=0) or 1
    return {
        "facts": [
            ("top-5", f"{summary.top5_rate:.1%}", "/summary"),
            ("in the nucleus", f"{summary.in_nucleus_rate:.1%}", "/summary"),
            ("probability stored", f"{summary.stored:.1%}", "/summary"),
            ("calibration error", f"{summary.calibration_error:.3f}", "/summary"),
            ("bytes per token", f"{summary.bytes_per_token:.1f}", "/summary"),
        ],
        "tokens": [
            {
                "address": f"/row/{loss.sample_index}#t={loss.index}",
                "before": line_of(loss.before),
                "text": quoted(loss.text)[1:-1],
                "value": short_nats(-loss.log_prob),
                "row": loss.sample_index,
            }
            for loss in summary.largest_losses
        ],
        "vocabulary": [
            {
                "address": f"/row/{loss.sample_index}#t={loss.index}",
                "text": quoted(loss.text)[1:-1],
                "width": round(100 * loss.share / largest, 1),
                "share": f"{loss.share:.1%}",
                "count": f"{loss.count:,}",
            }
            for loss in vocabulary
        ],
    }
