"""A conversation's tokens: which were extracted, and what the model predicted at each."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from chat_logits.analysis.row import TokenStatistics, perplexity_of
from chat_logits.data import alignment as chat_alignment
from chat_logits.data.tokenizer import token_text

EXTRACTED, SKIPPED, PROMPT = "extracted", "skipped", "prompt"
PROMPT_END = 4  # prompt tokens that a table shows before each answer
CONTEXT_TOKENS = 12  # tokens of context shown before a token
LONE_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # as surrogate escapes


@dataclass(frozen=True)
class Prediction:
    """One entry of a position's nucleus."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, repr=False)
class TokenAnalysis:
    """A token of the conversation and, if it was extracted, the distribution that predicts it (the target token).

    ``position`` is its place among the conversation's input ids, and ``index``, if it was extracted, its place among
    the row's extracted tokens, as for ``dequantize_all_logits``; both from 0. ``status`` is "extracted", "skipped"
    (with the ``reason``) or "prompt". ``log_prob`` is the target token's, exact, in nats; ``rank`` its place in the
    nucleus from 1, or None if it is not among the ``kept`` stored entries; ``tail_mass`` is the probability outside the
    nucleus; ``entropy`` is in nats, nucleus plus unbiased tail, or a lower bound without draws (``entropy_is_bound``).
    In ``text``, bytes of partial characters are surrogate escapes (PEP 383).
    """

    position: int
    token_id: int
    text: str
    status: str
    reason: str | None = None
    log_prob: float | None = None
    rank: int | None = None
    kept: int = 0
    tail_mass: float | None = None
    entropy: float | None = None
    predictions: list[Prediction] = field(default_factory=list)
    entropy_is_bound: bool = False
    index: int | None = None

    def __repr__(self) -> str:
        numbers = f": log_prob {self.log_prob:.4f}, rank {self.rank}" if self.log_prob is not None else ""
        return f"<TokenAnalysis {self.position} {self.text!r} ({self.reason or self.status}){numbers}>"

    @property
    def is_extracted(self) -> bool:
        return self.status == EXTRACTED

    @property
    def surprisal(self) -> float | None:
        """−log p of the target token, in nats."""
        return None if self.log_prob is None else -self.log_prob

    @property
    def probability(self) -> float | None:
        """The target token's probability, exact."""
        return None if self.log_prob is None else math.exp(self.log_prob)

    def as_dict(self) -> dict:
        """All of it as plain values, the predictions as a list of dicts."""
        derived = {"probability": self.probability, "surprisal": self.surprisal}
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Totals:
    """An answer in five numbers: rates and ``stored`` are shares of 1; the entropy, in nats, may be a lower bound."""

    num_tokens: int
    perplexity: float
    top1_rate: float
    mean_entropy: float
    stored: float
    entropy_is_bound: bool


def first_prediction(numbers: TokenStatistics, i: int, tokenizer) -> Prediction | None:
    """The most probable stored token at an extracted position, None if none is stored."""
    token_id = int(numbers.top_ids[i, 0])
    if not numbers.kept[i]:
        return None
    return Prediction(token_id, token_text(tokenizer, token_id), float(numbers.top_probs[i, 0]))


def text_and_before(input_ids: np.ndarray, position: int, tokenizer) -> tuple[str, str]:
    """A token's text, and the end of the text before it; ``input_ids`` int (T,) are the conversation's."""
    near = input_ids[max(0, position - CONTEXT_TOKENS) : position + 1].tolist()
    *before, text = (token_text(tokenizer, token_id) for token_id in near)
    return text, whole_characters(before)


def text_before(index: int, tokens: Sequence[TokenAnalysis]) -> str:
    """The end of the text before a token, as ``text_and_before`` gives it, for tokens with known texts."""
    return whole_characters([token.text for token in tokens[max(0, index - CONTEXT_TOKENS) : index]])


def whole_characters(texts: list[str]) -> str:
    """Consecutive tokens' texts joined; characters that are spread over several tokens become whole.

    Partial characters at the ends are left out: they begin before the first token, or continue after the last.
    """
    joined = "".join(texts).encode(errors="surrogateescape").decode(errors="surrogateescape")
    return joined.strip(LONE_BYTES)


def near_answers(statuses: list[str]) -> list[bool]:
    """Whether a table shows each token of a conversation: all except prompts, but also the ends of these."""
    return [any(status != PROMPT for status in statuses[i : i + PROMPT_END + 1]) for i in range(len(statuses))]


def label_tokens(alignment: chat_alignment.Alignment, tokenizer) -> list[TokenAnalysis]:
    """Every token with its text and whether it is extracted; predictions are not known yet."""
    tokens, indices = [], itertools.count()
    for position, (token_id, reason) in enumerate(zip(alignment.input_ids.tolist(), alignment.reasons, strict=True)):
        status = EXTRACTED if reason is None else PROMPT if reason == chat_alignment.PROMPT else SKIPPED
        index = next(indices) if status == EXTRACTED else None
        text = token_text(tokenizer, token_id)
        tokens.append(TokenAnalysis(position, token_id, text, status, reason, index=index))
    return tokens


def with_predictions(
    tokens: list[TokenAnalysis], numbers: TokenStatistics, tokenizer, top_n: int
) -> list[TokenAnalysis]:
    """The tokens, the extracted ones with the row's ``numbers``, one to one."""
    return [
        token if token.index is None else _with_numbers(token, numbers, token.index, tokenizer, top_n)
        for token in tokens
    ]


def _with_numbers(token: TokenAnalysis, numbers: TokenStatistics, i: int, tokenizer, top_n: int) -> TokenAnalysis:
    shown = min(top_n, int(numbers.kept[i]))
    return replace(
        token,
        log_prob=float(numbers.log_probs[i]),
        rank=int(numbers.ranks[i]) or None,
        kept=int(numbers.kept[i]),
        tail_mass=float(numbers.tail_mass[i]),
        entropy=float(numbers.entropies[i]),
        entropy_is_bound=numbers.entropy_is_bound,
        predictions=[
            Prediction(token_id, token_text(tokenizer, token_id), probability)
            for token_id, probability in zip(
                numbers.top_ids[i, :shown].tolist(), numbers.top_probs[i, :shown].tolist(), strict=True
            )
        ],
    )


def total(tokens: Iterable[TokenAnalysis]) -> Totals:
    """The totals over the extracted tokens, NaN where there are none."""
    extracted = [token for token in tokens if token.is_extracted]
    if not extracted:
        return Totals(0, math.nan, math.nan, math.nan, math.nan, entropy_is_bound=False)
    return Totals(
        num_tokens=len(extracted),
        perplexity=perplexity_of(float(np.mean([token.surprisal for token in extracted]))),
        top1_rate=float(np.mean([token.rank == 1 for token in extracted])),
        mean_entropy=float(np.mean([token.entropy for token in extracted])),
        stored=1 - float(np.mean([token.tail_mass for token in extracted])),
        entropy_is_bound=any(token.entropy_is_bound for token in extracted),
    )
