"""A conversation as two models see it, as a page: how their runs differ, where they are furthest apart, every token."""

import re

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.divergence import ComparisonTotals, Source, TokenComparison
from chat_logits.analysis.runs import RunDifference
from chat_logits.display.formats import rank_text, short_perplexity
from chat_logits.display.measures import Measure, adaptive_floor, is_skewed, short_number
from chat_logits.display.text import line_of
from chat_logits.display.token_numbers import comparison_numbers
from chat_logits.display.token_page import (
    LISTED,
    OTHER_BARS,
    TokenPage,
    place_of,
    prediction_bars,
    surprisal_measure,
)

SHOWN_VALUE, BEFORE = 60, 12  # characters shown of a long value, and those of them before the first difference
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # its beginning is enough
LEAST_KL, MOST_KL = 1e-6, 1e-2  # nats: the smallest KL divergence with a shade is between these


def comparison_page(comparison: Comparison, frame: dict | None = None) -> str:
    """The page of a conversation in two datasets; at first, each token is shaded by its KL divergence."""
    pairs = {pair.first.position: pair for pair in comparison.tokens}
    extracted = [pair for pair in comparison if pair.is_extracted]
    furthest = sorted(extracted, key=lambda pair: -(pair.kl or 0))
    names = names_of(comparison.first, comparison.other, comparison.differences)
    page = TokenPage(
        tokens=[pair.first for pair in comparison.tokens],
        messages=comparison.messages,
        measures=_measures(extracted, names),
        mark=lambda token: "" if pairs[token.position].agrees else "second",
        detail=lambda token: _pair_detail(pairs[token.position], names),
        listed=[pair.first for pair in furthest[: comparison.only or LISTED]],
        rows=2 * (comparison.top_n + OTHER_BARS + 1),
        numbers=comparison_numbers(comparison),
    )
    return page.render(
        frame,
        title=f"Source row {comparison.source_index} in {comparison.first.logit_dataset_id} and "
        f"{comparison.other.logit_dataset_id}",
        subtitle=f"How far {names[0]} and {names[1]} are apart at each token of the answer",
        tiles=comparison_tiles(comparison.totals),
        differences=difference_rows(comparison.differences),
        names=names,
        listed_title="Furthest apart",
        second_means="the models expected different tokens",
        absent_means=None,
    )


def _measures(pairs: list[TokenComparison], names: tuple[str, str]) -> list[Measure]:
    return [
        _distance("kl", "KL divergence", [pair.kl or 0.0 for pair in pairs], "at least"),
        _distance("change", "|Δ log p|", [abs(pair.log_prob_change or 0.0) for pair in pairs]),
        surprisal_measure(f"Surprisal, {names[0]}", [pair.first for pair in pairs]),
        surprisal_measure(f"Surprisal, {names[1]}", [pair.other for pair in pairs]),
    ]


def _distance(key: str, name: str, nats: list[float], note: str = "") -> Measure:
    """A distance between the models, on a scale that also suits close models."""
    return Measure(key, name, "nats", nats, adaptive_floor(nats, LEAST_KL, MOST_KL), is_skewed(nats), note=note)


def comparison_tiles(totals: ComparisonTotals) -> list[tuple[str, str]]:
    """A comparison's numbers for the head of a page."""
    return [
        ("Tokens", f"{totals.num_tokens:,}"),
        ("Mean KL, at least", small_nats(totals.mean_kl)),
        ("Top-1 agreement", f"{totals.agreement:.1%}"),
        ("Perplexities", f"{short_perplexity(totals.perplexity)} and {short_perplexity(totals.other_perplexity)}"),
        ("Mean |Δ log p|", small_nats(totals.mean_change)),
    ]


def small_nats(nats: float) -> str:
    """Nats with four decimals, or with three digits for small numbers."""
    return f"{nats:.4f} nats" if nats >= 0.001 else f"{short_number(nats)} nats"


def names_of(first: Source, other: Source, differences: list[RunDifference]) -> tuple[str, str]:
    """A page's names for the two models; if both are the same, with what tells the runs apart, or else the dataset."""
    if first.model_id != other.model_id:
        return first.model_id, other.model_id
    apart = next((each for each in differences if each.key in ("model_revision", "dtype", "head_dtype")), None)
    if apart is None:
        return f"{first.model_id} in {first.logit_dataset_id}", f"{other.model_id} in {other.logit_dataset_id}"
    return f"{first.model_id} ({_text(apart.first)})", f"{other.model_id} ({_text(apart.other)})"


def difference_rows(differences: list[RunDifference]) -> list[tuple[str, str, str]]:
    """The key and both values of each difference; long texts start shortly before the first character that differs."""
    return [(line_of(each.key), *_values(each)) for each in differences]


def _values(difference: RunDifference) -> tuple[str, str]:
    texts = [_text(value) for value in (difference.first, difference.other)]
    if max(map(len, texts)) <= SHOWN_VALUE:
        return line_of(texts[0]), line_of(texts[1])
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, at - BEFORE) if at + BEFORE > SHOWN_VALUE else 0
    first, other = (
        f"{'…' * (start > 0)}{line_of(text[start : start + SHOWN_VALUE])}{'…' * (len(text) > start + SHOWN_VALUE)}"
        for text in texts
    )
    return first, other


def _text(value: object) -> str:
    if value is None:
        return "not recorded"
    return short_hash(value if isinstance(value, str) else str(value))


def short_hash(text: str) -> str:
    """The beginning of a commit or a checksum; any other text as it is."""
    return f"{text[:12]}…" if HASH.fullmatch(text) else text


def _pair_detail(pair: TokenComparison, names: tuple[str, str]) -> dict:
    if not pair.is_extracted:
        return {"place": place_of(pair.first)}
    facts = [
        ("KL, at least", small_nats(pair.kl or 0.0)),
        ("log p", f"{pair.first.log_prob:.2f} and {pair.other.log_prob:.2f}"),
        ("ranks", f"{rank_text(pair.first)} and {rank_text(pair.other)}"),
        (
            "entropies",
            " and ".join(f"{'≥ ' * each.entropy_is_bound}{each.entropy:.2f}" for each in (pair.first, pair.other)),
        ),
    ]
    models = zip(names, (pair.first, pair.other), strict=True)
    groups = [{"title": name, "bars": prediction_bars(token)} for name, token in models]
    return {"place": place_of(pair.first), "facts": facts, "groups": groups}
