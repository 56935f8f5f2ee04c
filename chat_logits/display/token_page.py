"""A conversation token by token as a page: every token shaded by a number, with what is known of it beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, TokenAnalysis, Totals, text_before
from chat_logits.display.html_page import render_page
from chat_logits.display.page_text import characters_of_parts, pieces_of, segments, token_characters
from chat_logits.display.text import quoted
from chat_logits.display.token_report import entropy_text, rank_text, short_perplexity, short_probability

SURPRISAL_SHADES = (0.1, 0.5, 1, 2, 3, 5, 8)
LISTED = 12
OTHER_BARS = 3  # beside the predictions: the real token's, other stored ones, the tail
STRIP_BARS = 800
PART_PLACES = 7  # under a character, for the tokens before its last one; style.css has as many


class Bar(NamedTuple):
    """A prediction's bar: ``share`` of 1 that is filled; ``kind`` is "", "real" for the real token, or "rest"."""

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


def conversation_page(analysis) -> str:
    """The page of a ``conversation_analysis.Analysis``."""
    chosen = analysis.shown if analysis.only is not None else analysis.showing(only=LISTED).shown
    return token_page(
        title=f"Row {analysis.sample_index} of {analysis.dataset_id}",
        subtitle=f"What {analysis.model_id} predicted in the place of each token of the answer",
        tiles=total_tiles(analysis.totals),
        tokens=[token for token in analysis.tokens if analysis.show_prompt is not False or token.status != PROMPT],
        messages=analysis.messages,
        measure=Measure("Surprisal", lambda token: token.surprisal, SURPRISAL_SHADES, _mark),
        detail=_detail,
        rows=analysis.top_n + OTHER_BARS,
        listed=chosen,
        listed_title="Most surprising" if not callable(analysis.only) else "Chosen",
        second_means="the model expected another token",
        absent_means="not even among the stored ones",
    )


def total_tiles(totals: Totals) -> list[tuple[str, str]]:
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
    """A page of tokens. ``detail`` gives what is told of one: ``told``, ``facts``, and ``groups`` of bars.

    ``rows`` is how many bars and titles of groups a token has at most.
    """
    characters = token_characters(tokens)
    parts = characters_of_parts(tokens, characters)
    indices = {token.position: index for index, token in enumerate(tokens)}
    measured = [token for token in tokens if measure.of(token) is not None]
    return render_page(
        "tokens.html.jinja",
        script="tokens.js",
        data={
            "details": {token.position: _told(token, parts, detail) for token in tokens},
            "answer": [token.position for token in tokens if token.status != PROMPT],
            "strip": [token.position for token in measured],
        },
        segments=_turns(tokens, characters, messages, measure),
        strip=_strip([measure.of(token) for token in measured], measure),
        listed=[_entry(token, text_before(indices[token.position], tokens), measure) for token in listed],
        has_parts=not all(characters),
        rows=rows,
        measure=measure.name,
        legend=[("0", 0), *((f"{bound:g}", shade) for shade, bound in enumerate(measure.shades, start=1))],
        **content,
    )


def _turns(tokens: list[TokenAnalysis], characters: list[str], messages: list[dict], measure: Measure) -> list[dict]:
    spans = {
        token.position: _span(token, found, part, measure)
        for token, found, part in zip(tokens, characters, _part_numbers(characters), strict=True)
    }
    return [
        {"role": turn.role, "kind": turn.kind, "tokens": [spans[token.position] for token in turn.tokens]}
        for turn in segments(tokens, messages)
    ]


def _told(token: TokenAnalysis, parts: dict[int, str], detail: Callable[[TokenAnalysis], dict]) -> dict:
    told = {"token": quoted(token.text), **detail(token)}
    if token.position in parts:
        told["told"] += f" · bytes of {parts[token.position]}"
    return told


def _part_numbers(characters: list[str]) -> list[int]:
    """Of tokens without a character of their own, which of a row of them each is; -1 for other tokens."""
    numbers, run = [], -1
    for found in characters:
        run = -1 if found else run + 1
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


def _entry(token: TokenAnalysis, before: str, measure: Measure) -> dict:
    return {
        "position": token.position,
        "before": quoted(before, space=" ")[1:-1],
        "text": quoted(token.text)[1:-1],
        "value": f"{measure.of(token):.2f}",
    }


# --- what is told of a token ---


def _mark(token: TokenAnalysis) -> str:
    return "" if token.rank == 1 else "second" if token.rank else "absent"


def _detail(token: TokenAnalysis) -> dict:
    if not token.is_extracted:
        return {"told": place_of(token)}
    facts = [
        ("probability", short_probability(token.probability)),
        ("rank", rank_text(token)),
        ("surprisal", f"{token.surprisal:.2f} nats"),
        ("entropy", entropy_text(token.entropy, token.entropy_is_bound)),
    ]
    return {"told": place_of(token), "facts": facts, "groups": [{"bars": prediction_bars(token)}]}


def place_of(token: TokenAnalysis) -> str:
    """Which token it is and, where it was not extracted, why not."""
    why = {EXTRACTED: "", PROMPT: " · part of the prompt", SKIPPED: f" · skipped: {token.reason}"}[token.status]
    return f"Token {token.position}, id {token.token_id}{why}"


def prediction_bars(token: TokenAnalysis) -> list[Bar]:
    """The predictions, the real token among or below them, and what is left: other stored ones, and the tail."""
    bars = [
        Bar(quoted(found.text), found.probability, short_probability(found.probability), _kind(rank, token))
        for rank, found in enumerate(token.predictions, start=1)
    ]
    if not token.rank or token.rank > len(bars):
        share = min(1.0, token.probability)
        bars.append(Bar(quoted(token.text), share, short_probability(token.probability), "real"))
    others = max(0.0, 1 - token.tail_mass - sum(found.probability for found in token.predictions))
    more = token.kept - len(token.predictions)
    if more > 0:
        bars.append(Bar(f"{more} more stored", others, short_probability(others), "rest"))
    return [*bars, Bar("tail", token.tail_mass, short_probability(token.tail_mass), "rest")]


def _kind(rank: int, token: TokenAnalysis) -> str:
    return "real" if rank == token.rank else ""
