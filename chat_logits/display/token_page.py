"""A conversation token by token as a page: tokens shaded by a number, with details, and ways to move through them.

A page can be one of many that a server shows, in a ``frame``: a dict of ``home``, ``previous`` and ``next`` (addresses,
or None), ``place`` (such as "12 of 340") and ``downloads`` (addresses by name), all of them optional.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED, TokenAnalysis, Totals, text_before
from chat_logits.display.formats import entropy_text, rank_text, short_perplexity, short_probability
from chat_logits.display.measures import Measure, short_number
from chat_logits.display.page import render_page
from chat_logits.display.page_text import (
    characters_of_parts,
    in_fences,
    pieces_of,
    segments,
    token_characters,
    with_their_characters,
)
from chat_logits.display.text import line_of, quoted
from chat_logits.display.token_numbers import analysis_numbers

LISTED = 12
OTHER_BARS = 3  # in addition to the predictions: the target token's, other stored ones, the tail
PART_PLACES = 7  # places under a character for the tokens before its last one; style.css has as many
SCRIPTS = ("panel.js", "moves.js", "shades.js", "share.js")
STYLES = ("runs.css", "tokens.css")


class Bar(NamedTuple):
    """A prediction's bar: ``share`` is the filled part of 1; ``kind`` is "", "target" (the target token) or "rest"."""

    label: str
    share: float
    number: str
    kind: str = ""


@dataclass(frozen=True)
class TokenPage:
    """A page of ``tokens``; the ``measures`` have a number for each extracted token, in order.

    ``mark`` returns "second" or "absent" for tokens that are underlined, else "". ``detail`` returns what the panel
    shows for a token: ``place``, ``facts``, and ``groups`` of bars, with at most ``rows`` bars and titles. ``listed``
    tokens are shown with the first measure's numbers. The page copies ``numbers``, and calls its tokens ``noun``.
    """

    tokens: list[TokenAnalysis]
    messages: list[dict]
    measures: Sequence[Measure]
    mark: Callable[[TokenAnalysis], str]
    detail: Callable[[TokenAnalysis], dict]
    listed: list[TokenAnalysis]
    rows: int
    numbers: dict
    noun: str = "token"

    def render(self, frame: dict | None = None, **content) -> str:
        """The page; ``content`` has the other values for ``tokens.html.jinja``."""
        characters = token_characters(self.tokens)
        parts = characters_of_parts(self.tokens, characters)
        first = self.measures[0]
        return render_page(
            "tokens.html.jinja",
            script=SCRIPTS,
            styles=STYLES,
            data=self._data(parts),
            lazy_data=self.numbers,
            segments=self._turns(characters),
            listed=self._entries(characters),
            has_parts=not all(characters),
            rows=self.rows,
            noun=self.noun,
            measures=[measure.name for measure in self.measures],
            scale={name: getattr(first, name) for name in ("title", "legend", "stops", "start", "strip")},
            frame=frame,
            **content,
        )

    def _data(self, parts: dict[int, str]) -> dict:
        """The data for the page's script; names of facts are stored once, and each token has the index of its names."""
        names: dict[tuple[str, ...], int] = {}
        details = {token.position: self._with_parts(token, parts, names) for token in self.tokens}
        return {
            "details": details,
            "facts": list(names),
            "answer": [token.position for token in self.tokens if token.status != PROMPT],
            "measured": [token.position for token in self.tokens if token.is_extracted],
            "measures": [measure.as_data() for measure in self.measures],
            "noun": self.noun,
        }

    def _with_parts(self, token: TokenAnalysis, parts: dict[int, str], names: dict[tuple[str, ...], int]) -> dict:
        shown = {"token": quoted(token.text), **self.detail(token)}
        if token.position in parts:
            shown["place"] += f" · bytes of {parts[token.position]}"
        if "facts" in shown:
            titles, values = zip(*shown["facts"], strict=True)
            shown["facts"] = [names.setdefault(titles, len(names)), *values]
        return shown

    def _turns(self, characters: list[str]) -> list[dict]:
        turns = segments(self.tokens, self.messages)
        fenced = in_fences(turns, characters)
        values = iter(self.measures[0].values)
        spans = {
            token.position: self._span(token, placed, part, next(values) if token.is_extracted else None, fenced)
            for token, placed, part in zip(self.tokens, characters, _part_numbers(characters), strict=True)
        }
        return [
            {"role": turn.role, "kind": turn.kind, "tokens": [spans[token.position] for token in turn.tokens]}
            for turn in turns
        ]

    def _span(self, token: TokenAnalysis, characters: str, part: int, value: float | None, fenced: set[int]) -> dict:
        classes = ["t"]
        if value is not None:
            classes += [f"s{self.measures[0].shade_above(value)}", self.mark(token)]
        if token.status == SKIPPED:
            classes.append("skipped")
        if token.position in fenced:
            classes.append("fenced")
        if part >= 0:
            classes.append(f"parts n{part % PART_PLACES}")
        return {"position": token.position, "classes": " ".join(filter(None, classes)), "pieces": pieces_of(characters)}

    def _entries(self, characters: list[str]) -> list[dict]:
        """The tokens that a page lists, each with the text before it."""
        indices = {token.position: index for index, token in enumerate(self.tokens)}
        whole = with_their_characters(self.tokens, characters)
        extracted = [token.position for token in self.tokens if token.is_extracted]
        numbers = {position: (i, self.measures[0].values[i]) for i, position in enumerate(extracted)}
        return [
            {
                "position": token.position,
                "index": numbers[token.position][0],
                "before": line_of(text_before(indices[token.position], self.tokens)),
                "text": quoted(whole[indices[token.position]][0])[1:-1],
                "is_part": whole[indices[token.position]][1],
                "value": short_value(numbers[token.position][1]),
            }
            for token in self.listed
        ]


def short_value(value: float) -> str:
    """A number of a list: with two decimals, or three digits if it is small or large."""
    return f"{value:.2f}" if 0.1 <= value < 1000 or not value else short_number(value)


def _part_numbers(characters: list[str]) -> list[int]:
    """For each token without characters of its own, its number in a run of such tokens, from 0; -1 for others."""
    numbers, run = [], -1
    for placed in characters:
        run = -1 if placed else run + 1
        numbers.append(run)
    return numbers


# --- one model ---


def analysis_page(analysis: Analysis, frame: dict | None = None) -> str:
    """The page of a conversation; at first, each token is shaded by its surprisal."""
    listed = analysis.shown if analysis.only is not None else analysis.showing(only=LISTED).shown
    tokens = [token for token in analysis.tokens if analysis.show_prompt is not False or token.status != PROMPT]
    page = TokenPage(
        tokens=tokens,
        messages=analysis.messages,
        measures=_measures([token for token in tokens if token.is_extracted]),
        mark=lambda token: "" if token.rank == 1 else "second" if token.rank else "absent",
        detail=_detail,
        listed=listed,
        rows=analysis.top_n + OTHER_BARS,
        numbers=analysis_numbers(analysis),
    )
    return page.render(
        frame,
        title=f"Row {analysis.sample_index} of {analysis.dataset_id}",
        subtitle=f"What {analysis.model_id} predicted in place of each token of the answer",
        tiles=_total_tiles(analysis.totals),
        listed_title="Most surprising" if not callable(analysis.only) else "Chosen",
        second_means="the model expected another token",
        absent_means="not even among the stored ones",
    )


def _measures(tokens: list[TokenAnalysis]) -> list[Measure]:
    """The measures that can shade a conversation; a rank that is not stored counts as the next one."""
    most = max((token.kept for token in tokens), default=0)
    bound = "at least" * any(token.entropy_is_bound for token in tokens)
    unstored = "at least, where it is not stored" * any(not token.rank for token in tokens)
    return [
        surprisal_measure("Surprisal", tokens),
        Measure("entropy", "Entropy", "nats", [token.entropy or 0.0 for token in tokens], 0.1, note=bound),
        Measure(
            "rank",
            "Rank",
            "",
            [token.rank or token.kept + 1 for token in tokens],
            2,
            True,
            label=lambda rank: f"{rank:.0f}" if rank <= most else f">{most}",
            note=unstored,
        ),
        Measure("tail_mass", "Tail mass", "", [token.tail_mass or 0.0 for token in tokens], 0.01),
    ]


def surprisal_measure(name: str, tokens: list[TokenAnalysis]) -> Measure:
    """Surprisal in nats; a token with more than nine tenths of the probability has no shade."""
    return Measure("surprisal", name, "nats", [token.surprisal or 0.0 for token in tokens], 0.1)


def _total_tiles(totals: Totals) -> list[tuple[str, str]]:
    """An answer's numbers for the head of a page."""
    return [
        ("Tokens", f"{totals.num_tokens:,}"),
        ("Perplexity", short_perplexity(totals.perplexity)),
        ("Top-1 agreement", f"{totals.top1_rate:.1%}"),
        ("Mean entropy", entropy_text(totals.mean_entropy, totals.entropy_is_bound)),
        ("Probability stored", f"{totals.stored:.1%}"),
    ]


# --- details of a token ---


def _detail(token: TokenAnalysis) -> dict:
    if not token.is_extracted:
        return {"place": place_of(token)}
    assert token.probability is not None and token.entropy is not None
    facts = [
        ("probability", short_probability(token.probability)),
        ("rank", rank_text(token)),
        ("surprisal", f"{token.surprisal:.2f} nats"),
        ("entropy", entropy_text(token.entropy, token.entropy_is_bound)),
    ]
    return {"place": place_of(token), "facts": facts, "groups": [{"bars": prediction_bars(token)}]}


def place_of(token: TokenAnalysis) -> str:
    """Which token it is and, if it was not extracted, why not."""
    why = {EXTRACTED: "", PROMPT: " · part of the prompt", SKIPPED: f" · skipped: {token.reason}"}[token.status]
    return f"Token {token.position}, id {token.token_id}{why}"


def prediction_bars(token: TokenAnalysis) -> list[Bar]:
    """The predictions, the target token among or below them, then the other stored entries as one bar, and the tail."""
    bars = [
        _bar(quoted(each.text), each.probability, _kind(rank, token))
        for rank, each in enumerate(token.predictions, start=1)
    ]
    assert token.probability is not None and token.tail_mass is not None  # it was extracted
    if not token.rank or token.rank > len(bars):
        bars.append(_bar(quoted(token.text), min(1.0, token.probability), "target"))
    others = max(0.0, 1 - token.tail_mass - sum(each.probability for each in token.predictions))
    more = token.kept - len(token.predictions)
    if more > 0:
        bars.append(_bar(f"{more} more stored", others, "rest"))
    return [*bars, _bar("tail", token.tail_mass, "rest")]


def _bar(label: str, probability: float, kind: str) -> Bar:
    return Bar(label, round(probability, 4), short_probability(probability), kind)


def _kind(rank: int, token: TokenAnalysis) -> str:
    return "target" if rank == token.rank else ""
