"""Warnings about conversations that are extracted, but that the model may not read as intended."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from chat_logits.data.rendering import REASONING
from chat_logits.data.tokenizer import THINK_TAGS, special_token_ids

THOUGHTS = "thoughts that the chat template leaves out"
SPECIAL = "special tokens written in a text, which the model reads as such"
UNASKED = "an answer before the first question"

logger = logging.getLogger(__name__)


class Remarked(Protocol):
    @property
    def source_index(self) -> int: ...

    @property
    def remarks(self) -> tuple[str, ...]: ...


class Remarks:
    """Finds these remarks in the conversations of one source, and logs each kind once."""

    def __init__(self, tokenizer):
        special = {tokenizer.convert_ids_to_tokens(token) for token in special_token_ids(tokenizer)} - {*THINK_TAGS}
        self._special = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")
        self._told: set[str] = set()

    def on(self, conversation: list[dict], text: str) -> tuple[str, ...]:
        """The remarks that are true of a conversation; ``text`` is its rendering."""
        answers = [message for message in conversation if message["role"] == "assistant"]
        first = next(message for message in conversation if message["role"] not in ("system", "developer"))
        found = {
            THOUGHTS: any(thought not in text for answer in answers for thought in _thoughts(answer)),
            SPECIAL: any(self._special.search(message.get("content") or "") for message in conversation),
            UNASKED: first["role"] == "assistant",
        }
        return tuple(remark for remark, is_true in found.items() if is_true)

    def tell(self, conversations: Sequence[Remarked]) -> None:
        """Log each kind that was not logged before, with the number of these conversations that it is true of."""
        counts = Counter(remark for one in conversations for remark in one.remarks)
        for remark in sorted(counts.keys() - self._told):
            self._told.add(remark)
            told = "From source row %d on, %d of %d conversations have %s"
            logger.warning(told, conversations[0].source_index, counts[remark], len(conversations), remark)


def _thoughts(answer: dict) -> list[str]:
    """An answer's thoughts, from its content and from a separate key, each "" if there are none."""
    before, tag, _ = (answer.get("content") or "").partition(THINK_TAGS[1])
    of_content = before.rpartition(THINK_TAGS[0])[2] if tag else ""
    of_key = next((answer[name] for name in REASONING if isinstance(answer.get(name), str)), "")
    return [of_content.strip(), of_key.strip()]
