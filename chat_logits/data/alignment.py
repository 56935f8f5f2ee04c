"""Conversations to token ids, assistant mask and skipped tokens. All commands use this alignment.

    text and spans of the assistant's turns (templates.py)
        -> token ids with offsets -> which tokens are the assistant's -> which of those are skipped

The rest are the *extracted positions*: for each of these tokens, the distribution that predicts it is stored.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from chat_logits.data.marks import left_out_spans
from chat_logits.data.probes import TWO_ANSWERS
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import THINK_TAGS, special_token_ids
from chat_logits.data.turn_ends import TurnEnds

# At the start of a turn; the opening tag may be the generation prompt's.
EMPTY_THINK_BLOCK = re.compile(r"\s*(<think>\s*)?</think>\s*")
AT_ONCE = 64  # texts rendered or tokenized together; offsets take a hundred times the memory of ids
SPACE_SIGNS = "Ġ▁ "  # a space in byte-level BPE, in SentencePiece, and elsewhere

PROMPT = "prompt"
THINK_TAG_REASON = "think tag"
EMPTY_THINK_REASON = "empty think block"
SPECIAL_REASON = "special token"
CHOSEN_REASON = "--skip_tokens"
AFTER_END_REASON = "after the end of the turn"
LEFT_OUT_REASON = "marked not to be trained on"
FIRST_TOKEN_REASON = "first token: nothing predicts it"


@dataclass(frozen=True)
class Alignment:
    """A conversation as the model sees it.

    ``input_ids`` (T,) int64; ``reasons`` has one entry per token: None if it is extracted, else why not; ``positions``
    (n,) int64 of the extracted tokens themselves (each is predicted one position earlier); ``turns_left_out`` counts
    the assistant's turns that are marked not to be trained on. ``turn_ends`` are the positions, ascending, of the
    tokens that end the other turns, extracted or not; a turn that does not end with a special token has none.
    """

    input_ids: np.ndarray
    reasons: list[str | None]
    turns_left_out: int = 0
    turn_ends: tuple[int, ...] = ()

    @cached_property
    def positions(self) -> np.ndarray:
        return np.array([i for i, reason in enumerate(self.reasons) if reason is None], np.int64)

    @property
    def checksum(self) -> int:
        """CRC-32 over input ids, then extracted positions, each as little-endian uint32 (FORMAT.md)."""
        ids, positions = (part.astype("<u4").tobytes() for part in (self.input_ids, self.positions))
        return zlib.crc32(ids + positions)


class RecordedAlignment(Protocol):
    """How an extraction aligned. The attributes are keys of ``extraction.json``; a manifest has them all."""

    @property
    def chat_template(self) -> str: ...

    @property
    def tools_template(self) -> str | None: ...

    @property
    def template_kwargs(self) -> dict: ...

    @property
    def template_date(self) -> str | None: ...

    @property
    def skipped_token_ids(self) -> list[int]: ...

    @property
    def all_turns(self) -> bool: ...

    @property
    def keep_end_of_turn(self) -> bool | None: ...


class Rendered(NamedTuple):
    """A conversation's text, the spans of the assistant's turns in it, and which of these are left out."""

    text: str
    spans: list[tuple[int, int]]
    left_out: frozenset[int] = frozenset()


class Aligner:
    """Turns conversations into tokens with one tokenizer, one template and one set of skipped ids.

    Turns that are marked not to be trained on are left out unless ``all_turns`` is set. With ``keep_end_of_turn``, the
    token that ends a turn is extracted, although its id is skipped elsewhere.
    """

    def __init__(
        self,
        tokenizer,
        template: ChatTemplate,
        skipped_ids: frozenset[int],
        all_turns: bool = False,
        keep_end_of_turn: bool = False,
    ):
        self.tokenizer, self.template, self.skipped_ids = tokenizer, template, skipped_ids
        self.all_turns, self.keep_end_of_turn = all_turns, keep_end_of_turn
        self.special_ids = special_token_ids(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.think_ids = {vocabulary[tag] for tag in THINK_TAGS if tag in vocabulary}
        eos_id = vocabulary.get(str(tokenizer.special_tokens_map.get("eos_token")))
        self.turn_ends = TurnEnds(self.special_ids - self.think_ids, eos_id, self._earlier_end)
        written_out = [re.escape(tag) for tag in THINK_TAGS if tag not in vocabulary]
        self.written_tag = re.compile("|".join(written_out)) if written_out else None

    @classmethod
    def from_recorded(cls, tokenizer, recorded: RecordedAlignment) -> "Aligner":
        """An aligner that works as the extraction with this record did."""
        template = ChatTemplate(
            text=recorded.chat_template,
            special_tokens=tokenizer.special_tokens_map,
            kwargs=recorded.template_kwargs,
            date=recorded.template_date,
            tools_text=recorded.tools_template,
            apart=True,
        )
        skipped_ids = frozenset(recorded.skipped_token_ids)
        return cls(tokenizer, template, skipped_ids, recorded.all_turns, bool(recorded.keep_end_of_turn))

    def align(self, conversation: list[dict], tools: list[dict] | None = None) -> Alignment:
        """Render with the conversation's ``tools``, tokenize, mask and skip.

        Raises TemplateError if the template refuses the conversation, ConversationError if its marks are not valid.
        """
        rendered = self.marked(conversation, *self.template.with_tools(tools).render(conversation))
        return self.align_rendered([rendered])[0]

    def marked(self, conversation: list[dict], text: str, spans: list[tuple[int, int]]) -> Rendered:
        """A rendered conversation, with which of its turns are left out. Raises as ``left_out_spans``."""
        return Rendered(text, spans, frozenset() if self.all_turns else left_out_spans(conversation, spans))

    def align_rendered(self, rendered: Sequence[tuple]) -> list[Alignment]:
        """An alignment for each ``Rendered`` (or tuple of text and spans); tokenized in batches."""
        return [alignment for alignment, _ in self.placed(rendered)]

    def placed(self, rendered: Sequence[tuple]) -> Iterator[tuple[Alignment, np.ndarray]]:
        """As ``align_rendered``, each with the characters that its tokens stand for (``token_extents``)."""
        for start in range(0, len(rendered), AT_ONCE):
            batch = [Rendered(*one) for one in rendered[start : start + AT_ONCE]]
            encoded = self.tokenizer(
                [one.text for one in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for one, ids in zip(batch, tokens, strict=True):
                yield self._mask(one, *ids)

    def _mask(self, rendered: Rendered, ids: list[int], offsets: list) -> tuple[Alignment, np.ndarray]:
        """Which tokens are the assistant's, and which of those are skipped."""
        text = rendered.text
        input_ids = np.array(ids, np.int64)
        extents = token_extents(offsets, ids, self.tokenizer.convert_ids_to_tokens)
        reasons: list[str | None] = [PROMPT] * len(input_ids)
        for span, (start, end) in enumerate(rendered.spans):
            inside = np.flatnonzero((extents[:, 0] < end) & (extents[:, 1] > start))
            if span in rendered.left_out:
                for i in inside.tolist():
                    reasons[i] = LEFT_OUT_REASON
                continue
            for i in inside.tolist():
                reasons[i] = self._skip_reason(ids[i]) if ids[i] in self.skipped_ids else None
            self._skip_by_text(reasons, inside, extents, text, start, end)
            self._skip_after_end(reasons, inside, extents, ids, text, end)
        turn_ends = self.turn_ends.find(rendered.spans, rendered.left_out, input_ids, extents, text)
        for turn_end in turn_ends if self.keep_end_of_turn else ():
            reasons[turn_end] = None
        if reasons and reasons[0] is None:
            reasons[0] = FIRST_TOKEN_REASON
        return Alignment(input_ids, reasons, len(rendered.left_out), turn_ends), extents

    def _earlier_end(self) -> int | None:
        return self._end_of_the_first

    @cached_property
    def _end_of_the_first(self) -> int | None:
        """The special token right after the first answer of ``TWO_ANSWERS``, None if there is none."""
        text = self.template.text_or_none(TWO_ANSWERS) or ""
        _, answer, behind = text.partition("Two.")
        ids = self.tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"] if answer else []
        return ids[0] if ids and ids[0] in self.special_ids else None

    def _skip_reason(self, token_id: int) -> str:
        if token_id in self.think_ids:
            return THINK_TAG_REASON
        return SPECIAL_REASON if token_id in self.special_ids else CHOSEN_REASON

    def _skip_by_text(self, reasons, inside, extents, text: str, start: int, end: int) -> None:
        """Skip think tags that are not single tokens, and an empty think block at the start of the turn."""
        for tag in self.written_tag.finditer(text, start, end) if self.written_tag else ():
            for i in inside[(extents[inside, 0] < tag.end()) & (extents[inside, 1] > tag.start())]:
                reasons[i] = THINK_TAG_REASON
        if block := EMPTY_THINK_BLOCK.match(text, start, end):
            for i in inside[extents[inside, 1] <= block.end()]:
                reasons[i] = EMPTY_THINK_REASON

    def _skip_after_end(self, reasons, inside, extents, ids: list[int], text: str, end: int) -> None:
        """Skip white space that the template adds after the turn's last special token."""
        ends = [i for i in inside.tolist() if ids[i] in self.special_ids]
        if ends and not text[extents[ends[-1], 1] : end].strip():
            for i in inside[inside > ends[-1]]:
                reasons[i] = AFTER_END_REASON


def token_extents(
    offsets: list[tuple[int, int]], ids: list[int], to_pieces: Callable[[list[int]], list[str]]
) -> np.ndarray:
    """Characters that each token stands for, int64 (T, 2): its offsets, but from where the previous token ends.

    Tokenizers that trim offsets (``trim_offsets``) drop spaces. Trailing spaces are restored from the token's spelling
    in the vocabulary, ``to_pieces`` of ``ids``; leading ones by starting each token where the previous one ends. Tokens
    that share a character all start at it.
    """
    extents = np.array(offsets, np.int64).reshape(-1, 2)
    before_gaps = np.flatnonzero((extents[1:, 0] > extents[:-1, 1]) & (extents[:-1, 0] < extents[:-1, 1])).tolist()
    for i, piece in zip(before_gaps, to_pieces([ids[i] for i in before_gaps]), strict=True):
        extents[i, 1] += len(piece) - len(piece.rstrip(SPACE_SIGNS))
    extents[1:, 0] = np.minimum(extents[1:, 0], extents[:-1, 1])
    return extents
