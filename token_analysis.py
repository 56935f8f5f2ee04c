"""What is known of each token of a conversation, before and after the model has spoken."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

import chat_alignment
from stored_numbers import RowNumbers

EXTRACTED, SKIPPED, PROMPT = "extracted", "skipped", "prompt"


@dataclass(frozen=True)
class Prediction:
    """One entry of a position's nucleus."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TokenAnalysis:
    """A token of the conversation and, where it was extracted, what the model said in its place.

    ``status`` is "extracted", "skipped" (with the ``reason``) or "prompt". ``log_prob`` is the real token's, exact,
    in nats; ``rank`` its place in the nucleus from 1, or None where it is not among the ``kept`` stored entries;
    ``tail_mass`` the probability outside the nucleus; ``entropy`` in nats, nucleus plus unbiased tail. ``text`` has a
    character's lone bytes as surrogate escapes (PEP 383).
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

    @property
    def is_extracted(self) -> bool:
        return self.status == EXTRACTED

    @property
    def surprisal(self) -> float | None:
        """−log p of the real token, in nats."""
        return None if self.log_prob is None else -self.log_prob

    @property
    def probability(self) -> float | None:
        """The real token's, exact."""
        return None if self.log_prob is None else math.exp(self.log_prob)

    def as_dict(self) -> dict:
        """All of it as plain values, the predictions as a list of dicts."""
        derived = {"probability": self.probability, "surprisal": self.surprisal}
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Totals:
    """An answer, or several, in five numbers: rates and ``stored`` are shares of 1, entropy is in nats."""

    num_tokens: int
    perplexity: float
    top1_rate: float
    mean_entropy: float
    stored: float


def label_tokens(alignment: chat_alignment.Alignment, tokenizer) -> list[TokenAnalysis]:
    """Every token with its text and whether it is extracted; predictions are not known yet."""
    found = []
    for position, (token_id, reason) in enumerate(zip(alignment.input_ids.tolist(), alignment.reasons, strict=True)):
        status = EXTRACTED if reason is None else PROMPT if reason == chat_alignment.PROMPT else SKIPPED
        found.append(TokenAnalysis(position, token_id, chat_alignment.token_text(tokenizer, token_id), status, reason))
    return found


def with_predictions(tokens: list[TokenAnalysis], numbers: RowNumbers, tokenizer, top_n: int) -> list[TokenAnalysis]:
    """The tokens, the extracted ones with what the row's ``numbers`` say of them, one to one."""
    index = iter(range(len(numbers.log_probs)))
    return [_told(token, numbers, next(index), tokenizer, top_n) if token.is_extracted else token for token in tokens]


def _told(token: TokenAnalysis, numbers: RowNumbers, i: int, tokenizer, top_n: int) -> TokenAnalysis:
    shown = min(top_n, int(numbers.kept[i]))
    return replace(
        token,
        log_prob=float(numbers.log_probs[i]),
        rank=int(numbers.ranks[i]) or None,
        kept=int(numbers.kept[i]),
        tail_mass=float(numbers.tail_mass[i]),
        entropy=float(numbers.entropies[i]),
        predictions=[
            Prediction(token_id, chat_alignment.token_text(tokenizer, token_id), probability)
            for token_id, probability in zip(
                numbers.top_ids[i, :shown].tolist(), numbers.top_probs[i, :shown].tolist(), strict=True
            )
        ],
    )


def total(tokens: Iterable[TokenAnalysis]) -> Totals:
    """The totals over the extracted tokens, of which there is at least one."""
    extracted = [token for token in tokens if token.is_extracted]
    return Totals(
        num_tokens=len(extracted),
        perplexity=float(np.exp(np.mean([token.surprisal for token in extracted]))),
        top1_rate=float(np.mean([token.rank == 1 for token in extracted])),
        mean_entropy=float(np.mean([token.entropy for token in extracted])),
        stored=1 - float(np.mean([token.tail_mass for token in extracted])),
    )
