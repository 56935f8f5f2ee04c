"""Two models over the same conversations as pages: one conversation token by token, or whole datasets."""

from chat_logits.analysis.divergence import ComparisonTotals, TokenComparison
from chat_logits.analysis.tokens import TokenAnalysis
from chat_logits.display.html_page import render_page
from chat_logits.display.summary_page import context, histogram, table
from chat_logits.display.text import quoted
from chat_logits.display.token_page import LISTED, OTHER_BARS, Measure, place_of, prediction_bars, token_page
from chat_logits.display.token_report import prediction_text, rank_text, short_perplexity

KL_SHADES = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


def comparison_page(comparison) -> str:
    """The page of a ``conversation_comparison.Comparison``: each token shaded by how far the models are apart."""
    pairs = {pair.first.position: pair for pair in comparison.tokens}
    extracted = sorted((pair for pair in comparison if pair.is_extracted), key=lambda pair: -pair.kl)
    names = (comparison.first.model_id, comparison.other.model_id)
    return token_page(
        title=f"Source row {comparison.source_index} in {comparison.first.logit_dataset_id} and "
        f"{comparison.other.logit_dataset_id}",
        subtitle=f"How far {names[0]} and {names[1]} are apart at each token of the answer",
        tiles=_tiles(comparison.totals),
        tokens=[pair.first for pair in comparison.tokens],
        messages=comparison.messages,
        measure=Measure(
            "KL divergence",
            lambda token: pairs[token.position].kl,
            KL_SHADES,
            lambda token: "" if pairs[token.position].agrees else "second",
        ),
        detail=lambda token: _detail(pairs[token.position], names),
        rows=2 * (comparison.top_n + OTHER_BARS + 1),
        listed=[pair.first for pair in extracted[: comparison.only or LISTED]],
        listed_title="Furthest apart",
        second_means="the models expected different tokens",
        absent_means=None,
    )


def _tiles(totals: ComparisonTotals) -> list[tuple[str, str]]:
    return [
        ("Tokens", f"{totals.num_tokens:,}"),
        ("Mean KL, at least", f"{totals.mean_kl:.4f} nats"),
        ("Top-1 agreement", f"{totals.agreement:.1%}"),
        ("Perplexities", f"{short_perplexity(totals.perplexity)} and {short_perplexity(totals.other_perplexity)}"),
        ("Mean |Δ log p|", f"{totals.mean_change:.3f} nats"),
    ]


def _detail(pair: TokenComparison, names: tuple[str, str]) -> dict:
    if not pair.is_extracted:
        return {"told": place_of(pair.first)}
    facts = [
        ("KL, at least", f"{pair.kl:.4f} nats"),
        ("log p", f"{pair.first.log_prob:.2f} and {pair.other.log_prob:.2f}"),
        ("ranks", f"{rank_text(pair.first)} and {rank_text(pair.other)}"),
        (
            "entropies",
            " and ".join(f"{'≥ ' * side.entropy_is_bound}{side.entropy:.2f}" for side in (pair.first, pair.other)),
        ),
    ]
    sides = zip(names, (pair.first, pair.other), strict=True)
    return {"told": place_of(pair.first), "facts": facts, "groups": [_side(name, side) for name, side in sides]}


def _side(name: str, token: TokenAnalysis) -> dict:
    return {"title": name, "bars": prediction_bars(token)}


# --- whole datasets ---


def datasets_page(comparison) -> str:
    """The page of a ``dataset_comparison.DatasetComparison``."""
    left_out = comparison.only_in_first + comparison.only_in_other + comparison.num_different
    tiles = [("Conversations", f"{comparison.num_conversations:,}"), ("Left out", f"{left_out:,}")]
    note = (
        f"Left out: {comparison.only_in_first:,} only in the first, {comparison.only_in_other:,} only in the other, "
        f"{comparison.num_different:,} with other tokens."
    )
    return render_page(
        "summary.html.jinja",
        title=f"{comparison.first.logit_dataset_id} and {comparison.other.logit_dataset_id}",
        subtitle=f"How far {comparison.first.model_id} and {comparison.other.model_id} are apart",
        tiles=[*tiles, *_tiles(comparison.totals)],
        figures=[
            histogram("KL divergence of the tokens, nats, at least", comparison.histogram, note, span=12),
            _apart_conversations(comparison.conversations),
            _apart_tokens(comparison.tokens),
        ],
    )


def _apart_conversations(conversations: list) -> dict:
    columns = ["Row", "Source row", "Tokens", "Mean KL", "Perplexity", "Other's", "Question"]
    rows = [
        [
            f"{one.sample_index}",
            f"{one.source_index}",
            f"{one.num_tokens:,}",
            f"{one.mean_kl:.3f}",
            short_perplexity(one.perplexity),
            short_perplexity(one.other_perplexity),
            quoted(one.question, space=" ")[1:-1],
        ]
        for one in conversations
    ]
    return table("Conversations where they part most", columns, rows, set(columns[:-1]))


def _apart_tokens(tokens: list) -> dict:
    columns = ["Row", "Position", "Text before", "Token", "First predicts", "Other predicts", "KL", "log p", "Other's"]
    rows = [
        [
            f"{one.sample_index}",
            f"{one.position}",
            context(one.before),
            quoted(one.text),
            prediction_text(one.prediction),
            prediction_text(one.other_prediction),
            f"{one.kl:.3f}",
            f"{one.log_prob:.2f}",
            f"{one.other_log_prob:.2f}",
        ]
        for one in tokens
    ]
    return table("Tokens where they part most", columns, rows, {"Row", "Position", "KL", "log p", "Other's"})
