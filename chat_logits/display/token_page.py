"""A conversation token by token as a page, of one model or of two: tokens shaded by a number, details beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.divergence import ComparisonTotals, TokenComparison
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, TokenAnalysis, Totals, text_before
from chat_logits.display.formats import entropy_text, rank_text, short_perplexity, short_probability
from chat_logits.display.page import render_page
from chat_logits.display.page_text import characters_of_parts, pieces_of, segments, token_characters
from chat_logits.display.text import line_of, quoted

KL_SHADES = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
SURPRISAL_SHADES = (0.1, 0.5, 1, 2, 3, 5, 8)
LISTED = 12
OTHER_BARS = 3  # beside the predictions: the target token's, other stored ones, the tail
STRIP_BARS = 800
PART_PLACES = 7  # under a character, for the tokens before its last one; style.css has as many


class Bar(NamedTuple):
    """A prediction's bar: ``share`` of 1 that is filled; ``kind`` is "", "target" for the target token, or "rest"."""

    label: str
    share: float
    number: str
    kind: str = ""


@dataclass(frozen=True)
class Measure:
    """What shades the tokens: its name, a token's value in nats, None for those that have none, and its ``shades``.

    These are seven numbers of nats from which each shade begins. ``mark`` gives "second" or "absent" for tokens that
    are underlined, else "".
    """

    name: str
    of: Callable[[TokenAnalysis], float | None]
    shades: tuple[float, ...]
    mark: Callable[[TokenAnalysis], str]

    def shade(self, value: float) -> int:
        """The shade of a number of nats, 0 to 7."""
        return sum(value >= bound for bound in self.shades)


def analysis_page(analysis: Analysis) -> str:
    """The page of a conversation, each token shaded by its surprisal."""
    listed = analysis.shown if analysis.only is not None else analysis.showing(only=LISTED).shown
    return token_page(
        title=f"Row {analysis.sample_index} of {analysis.dataset_id}",
        subtitle=f"What {analysis.model_id} predicted in the place of each token of the answer",
        tiles=_total_tiles(analysis.totals),
        tokens=[token for token in analysis.tokens if analysis.show_prompt is not False or token.status != PROMPT],
        messages=analysis.messages,
        measure=Measure("Surprisal", lambda token: token.surprisal, SURPRISAL_SHADES, _mark),
        detail=_detail,
        rows=analysis.top_n + OTHER_BARS,
        listed=listed,
        listed_title="Most surprising" if not callable(analysis.only) else "Chosen",
        second_means="the model expected another token",
        absent_means="not even among the stored ones",
    )


def _total_tiles(totals: Totals) -> list[tuple[str, str]]:
    """An answer's numbers for the head of a page."""
    return [
        ("Tokens", f"{totals.num_tokens:,}"),
        ("Perplexity", short_perplexity(totals.perplexity)),
        ("Top-1 agreement", f"{totals.top1_rate:.1%}"),
        ("Mean entropy", entropy_text(totals.mean_entropy, totals.entropy_is_bound)),
        ("Probability stored", f"{totals.stored:.1%}"),
    ]


def token_page(
    tokens: list[TokenAnalysis],
    messages: list[dict],
    measure: Measure,
    detail: Callable[[TokenAnalysis], dict],
    listed: list[TokenAnalysis],
    rows: int,
    **content,
) -> str:
    """A page of tokens; ``detail`` gives what the panel shows of one: ``place``, ``facts``, ``groups`` of bars.

    ``rows`` is how many bars and titles of groups a token has at most.
    """
    characters = token_characters(tokens)
    measured = [token for token in tokens if measure.of(token) is not None]
    return render_page(
        "tokens.html.jinja",
        script="tokens.js",
        data=_data(tokens, measured, characters, detail),
        segments=_turns(tokens, characters, messages, measure),
        strip=_strip([measure.of(token) or 0.0 for token in measured], measure),
        listed=_entries(listed, tokens, measure),
        has_parts=not all(characters),
        rows=rows,
        measure=measure.name,
        legend=_legend(measure),
        **content,
    )


def _turns(tokens: list[TokenAnalysis], characters: list[str], messages: list[dict], measure: Measure) -> list[dict]:
    spans = {
        token.position: _span(token, placed, part, measure)
        for token, placed, part in zip(tokens, characters, _part_numbers(characters), strict=True)
    }
    return [
        {"role": turn.role, "kind": turn.kind, "tokens": [spans[token.position] for token in turn.tokens]}
        for turn in segments(tokens, messages)
    ]


def _data(
    tokens: list[TokenAnalysis],
    measured: list[TokenAnalysis],
    characters: list[str],
    detail: Callable[[TokenAnalysis], dict],
) -> dict:
    """What the page's script reads."""
    parts = characters_of_parts(tokens, characters)
    return {
        "details": {token.position: _with_parts(token, parts, detail) for token in tokens},
        "answer": [token.position for token in tokens if token.status != PROMPT],
        "strip": [token.position for token in measured],
    }


def _with_parts(token: TokenAnalysis, parts: dict[int, str], detail: Callable[[TokenAnalysis], dict]) -> dict:
    shown = {"token": quoted(token.text), **detail(token)}
    if token.position in parts:
        shown["place"] += f" · bytes of {parts[token.position]}"
    return shown


def _part_numbers(characters: list[str]) -> list[int]:
    """Of tokens without a character of their own, which of a row of them each is; -1 for other tokens."""
    numbers, run = [], -1
    for placed in characters:
        run = -1 if placed else run + 1
        numbers.append(run)
    return numbers


def _span(token: TokenAnalysis, characters: str, part: int, measure: Measure) -> dict:
    value = measure.of(token)
    classes = ["t"] if value is None else ["t", f"s{measure.shade(value)}", measure.mark(token)]
    if token.status == SKIPPED:
        classes.append("skipped")
    if part >= 0:
        classes.append(f"parts n{part % PART_PLACES}")
    return {"position": token.position, "classes": " ".join(filter(None, classes)), "pieces": pieces_of(characters)}


def _strip(values: list[float], measure: Measure) -> dict:
    """Bars over the answer, the largest value of neighbouring tokens each where they are many, by shade."""
    group = -(-len(values) // STRIP_BARS)
    top = max(measure.shades[-2], min(2 * measure.shades[-1], max(values, default=0)))
    paths: dict[int, str] = {}
    for start in range(0, len(values), group or 1):
        value = max(values[start : start + group])
        height = 3 + 97 * min(1, value / top)
        width = min(group, len(values) - start)
        path = f"M{start} 100V{100 - height:.1f}h{width}V100z"
        shade = measure.shade(value)
        paths[shade] = paths.get(shade, "") + path
    return {"width": max(1, len(values)), "paths": sorted(paths.items())}


def _entries(listed: list[TokenAnalysis], tokens: list[TokenAnalysis], measure: Measure) -> list[dict]:
    """The tokens that a page lists, each with the text before it."""
    indices = {token.position: index for index, token in enumerate(tokens)}
    return [
        {
            "position": token.position,
            "before": line_of(text_before(indices[token.position], tokens)),
            "text": quoted(token.text)[1:-1],
            "value": f"{measure.of(token):.2f}",
        }
        for token in listed
    ]


def _legend(measure: Measure) -> list[tuple[str, int]]:
    """The lower bound of each shade, and its number."""
    return [("0", 0), *((f"{bound:g}", shade) for shade, bound in enumerate(measure.shades, start=1))]


# --- details of a token ---


def _mark(token: TokenAnalysis) -> str:
    return "" if token.rank == 1 else "second" if token.rank else "absent"


def _detail(token: TokenAnalysis) -> dict:
    if not token.is_extracted:
        return {"place": _place_of(token)}
    assert token.probability is not None and token.entropy is not None
    facts = [
        ("probability", short_probability(token.probability)),
        ("rank", rank_text(token)),
        ("surprisal", f"{token.surprisal:.2f} nats"),
        ("entropy", entropy_text(token.entropy, token.entropy_is_bound)),
    ]
    return {"place": _place_of(token), "facts": facts, "groups": [{"bars": _prediction_bars(token)}]}


def _place_of(token: TokenAnalysis) -> str:
    """Which token it is and, where it was not extracted, why not."""
    why = {EXTRACTED: "", PROMPT: " · part of the prompt", SKIPPED: f" · skipped: {token.reason}"}[token.status]
    return f"Token {token.position}, id {token.token_id}{why}"


def _prediction_bars(token: TokenAnalysis) -> list[Bar]:
    """The predictions, the target token among or below them, then the other stored ones together, and the tail."""
    bars = [
        Bar(quoted(each.text), each.probability, short_probability(each.probability), _kind(rank, token))
        for rank, each in enumerate(token.predictions, start=1)
    ]
    assert token.probability is not None and token.tail_mass is not None  # it was extracted
    if not token.rank or token.rank > len(bars):
        share = min(1.0, token.probability)
        bars.append(Bar(quoted(token.text), share, short_probability(token.probability), "target"))
    others = max(0.0, 1 - token.tail_mass - sum(each.probability for each in token.predictions))
    more = token.kept - len(token.predictions)
    if more > 0:
        bars.append(Bar(f"{more} more stored", others, short_probability(others), "rest"))
    return [*bars, Bar("tail", token.tail_mass, short_probability(token.tail_mass), "rest")]


def _kind(rank: int, token: TokenAnalysis) -> str:
    return "target" if rank == token.rank else ""


# --- two models ---


def comparison_page(comparison: Comparison) -> str:
    """The page of a conversation in two datasets, each token shaded by its KL divergence."""
    pairs = {pair.first.position: pair for pair in comparison.tokens}
    extracted = sorted((pair for pair in comparison if pair.is_extracted), key=lambda pair: -pair.kl)
    names = (comparison.first.model_id, comparison.other.model_id)
    return token_page(
        title=f"Source row {comparison.source_index} in {comparison.first.logit_dataset_id} and "
        f"{comparison.other.logit_dataset_id}",
        subtitle=f"How far {names[0]} and {names[1]} are apart at each token of the answer",
        tiles=comparison_tiles(comparison.totals),
        tokens=[pair.first for pair in comparison.tokens],
        messages=comparison.messages,
        measure=Measure(
            "KL divergence",
            lambda token: pairs[token.position].kl,
            KL_SHADES,
            lambda token: "" if pairs[token.position].agrees else "second",
        ),
        detail=lambda token: _pair_detail(pairs[token.position], names),
        rows=2 * (comparison.top_n + OTHER_BARS + 1),
        listed=[pair.first for pair in extracted[: comparison.only or LISTED]],
        listed_title="Furthest apart",
        second_means="the models expected different tokens",
        absent_means=None,
    )


def comparison_tiles(totals: ComparisonTotals) -> list[tuple[str, str]]:
    """A comparison's numbers for the head of a page."""
    return [
        ("Tokens", f"{totals.num_tokens:,}"),
        ("Mean KL, at least", f"{totals.mean_kl:.4f} nats"),
        ("Top-1 agreement", f"{totals.agreement:.1%}"),
        ("Perplexities", f"{short_perplexity(totals.perplexity)} and {short_perplexity(totals.other_perplexity)}"),
        ("Mean |Δ log p|", f"{totals.mean_change:.3f} nats"),
    ]


def _pair_detail(pair: TokenComparison, names: tuple[str, str]) -> dict:
    if not pair.is_extracted:
        return {"place": _place_of(pair.first)}
    facts = [
        ("KL, at least", f"{pair.kl:.4f} nats"),
        ("log p", f"{pair.first.log_prob:.2f} and {pair.other.log_prob:.2f}"),
        ("ranks", f"{rank_text(pair.first)} and {rank_text(pair.other)}"),
        (
            "entropies",
            " and ".join(f"{'≥ ' * each.entropy_is_bound}{each.entropy:.2f}" for each in (pair.first, pair.other)),
        ),
    ]
    models = zip(names, (pair.first, pair.other), strict=True)
    groups = [{"title": name, "bars": _prediction_bars(token)} for name, token in models]
    return {"place": _place_of(pair.first), "facts": facts, "groups": groups}
