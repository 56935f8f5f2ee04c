"""What is known of each token of a conversation, before and after the model has spoken."""

from dataclasses import dataclass, field

import chat_alignment

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
    ``tail_mass`` the probability outside the nucleus.
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
    predictions: list[Prediction] = field(default_factory=list)


def label_tokens(alignment: chat_alignment.Alignment, tokenizer) -> list[TokenAnalysis]:
    """Every token with its text and whether it is extracted; predictions are not known yet."""
    found = []
    for position, (token_id, reason) in enumerate(zip(alignment.input_ids.tolist(), alignment.reasons, strict=True)):
        status = EXTRACTED if reason is None else PROMPT if reason == chat_alignment.PROMPT else SKIPPED
        found.append(TokenAnalysis(position, token_id, chat_alignment.token_text(tokenizer, token_id), status, reason))
    return found
