"""Conversations to token ids, assistant mask and skipped tokens. Both commands align through this one place.

    template + conversation -> text and character spans of its generation blocks
                            -> token ids with offsets -> which tokens are the assistant's -> which are skipped

What is left are the *extracted positions*: the tokens whose predicting distributions are stored.
"""

import datetime
import hashlib
import json
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from conversations import from_stored
from errors import ToolkitError, UsageError
from hub_access import explain_hub_error
from logit_codec import MAX_TOKEN_ID

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THINK_TAG = re.compile(r"</?think>")
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
EMPTY_THINK_BLOCK = re.compile(r"\s*<think>\s*</think>\s*")

PROMPT = "prompt"
THINK_TAG_REASON = "think tag"
EMPTY_THINK_REASON = "empty think block"
SPECIAL_REASON = "special token"
AFTER_END_REASON = "after the end of the turn"
FIRST_TOKEN_REASON = "first token: nothing predicts it"

HOW_TO_MARK = (
    "Pass --chat_template with a template that wraps the assistant's answer and its end-of-turn token in "
    "{% generation %} … {% endgeneration %}; templates/ has some."
)


class AlignmentError(ToolkitError):
    """A conversation that the template cannot render, or a stored row that the rebuilt tokens don't fit."""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens: the part of ``extraction.json`` that alignment depends on."""

    template: str
    skipped_token_ids: frozenset[int]
    template_kwargs: dict
    template_date: str | None

    @classmethod
    def from_extraction(cls, extraction: dict) -> "ChatFormat":
        """The format that an extraction recorded."""
        return cls(
            template=extraction["chat_template"],
            skipped_token_ids=frozenset(extraction["skipped_token_ids"]),
            template_kwargs=extraction["template_kwargs"],
            template_date=extraction["template_date"],
        )


@dataclass(frozen=True)
class Alignment:
    """A conversation as the model sees it.

    ``input_ids`` (T,) int64; ``reasons`` has one entry a token: None where it is extracted, else why not;
    ``positions`` (n,) int64 of the extracted tokens themselves (each is predicted one position earlier).
    """

    input_ids: np.ndarray
    reasons: list[str | None]

    @property
    def positions(self) -> np.ndarray:
        return np.array([i for i, reason in enumerate(self.reasons) if reason is None], np.int64)

    @property
    def checksum(self) -> int:
        """CRC-32 over input ids, then extracted positions, each as little-endian uint32 (FORMAT.md)."""
        return zlib.crc32(self.positions.astype("<u4").tobytes(), zlib.crc32(self.input_ids.astype("<u4").tobytes()))


# --- tokenizer and template ---


def load_tokenizer(tokenizer_id: str, revision: str | None = None, gguf_file: str | None = None):
    """A fast tokenizer from a Hub id or local folder. Raises ToolkitError where there is none."""
    from transformers import AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_id, revision=revision, **options)
    except Exception as error:
        raise explain_hub_error(error, f"tokenizer of {tokenizer_id}") from error
    if not tokenizer.is_fast:
        raise ToolkitError(f"tokenizer of {tokenizer_id}: no fast version, so tokens have no character offsets")
    return tokenizer


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 (hex) of the tokenizer's serialised form and the special tokens that templates are given."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    form["truncation"] = form["padding"] = None  # states of the last call, not parts of the tokenizer
    content = [form, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_wide_vocabulary(tokenizer) -> None:
    """Raise UsageError if ordinary tokens lie at or above 2**18, where ids cannot be stored."""
    added = set(tokenizer.added_tokens_decoder)
    widest = max(i for i in tokenizer.get_vocab().values() if i not in added)
    if widest >= MAX_TOKEN_ID:
        raise UsageError(
            f"the tokenizer has ordinary tokens up to id {widest}, expected ids below {MAX_TOKEN_ID}: "
            "the storage format has 18 bits a token id"
        )


def token_text(tokenizer, token_id: int) -> str:
    """What one token writes, its leading space kept; bytes that are no whole character as surrogate escapes."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # a padded vocabulary has rows without tokens
        return f"<id {token_id}>"
    if piece.startswith("▁"):
        return piece.replace("▁", " ")
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return _token_bytes(piece).decode(errors="surrogateescape") if "\ufffd" in text else text


def _token_bytes(piece: str) -> bytes:
    """The bytes of a byte-fallback piece such as ``<0xF0>``, or of a byte-level BPE piece."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if fallback := BYTE_FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(table[character] for character in piece if character in table)


def choose_template(argument: str | None, tokenizer) -> str:
    """The template's text: ``--chat_template`` (a path or the text itself), else the tokenizer's own.

    Raises UsageError for a missing file, a template that does not parse, or one without generation blocks.
    """
    template = read_template(argument) if argument is not None else tokenizer.chat_template
    if template is None:
        raise UsageError(f"this model has no chat template: is it a base model? {HOW_TO_MARK}")
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())))
    compile_template(template)
    if not GENERATION_BLOCK.search(template):
        origin = "the model's own chat template" if argument is None else "--chat_template"
        raise UsageError(
            f"{origin} has no generation blocks, so the assistant's tokens cannot be told apart. {HOW_TO_MARK}"
        )
    return template


def read_template(argument: str) -> str:
    """The text of ``argument``, a path or a template. Raises UsageError for a path that does not exist."""
    if "{%" in argument or "{{" in argument:
        return argument
    path = Path(argument).expanduser()
    if not path.is_file():
        raise UsageError(f"--chat_template {argument}: no such file, and no template text ({{% … %}}) either")
    return path.read_text(encoding="utf-8")


def compile_template(template: str):
    """The template compiled in transformers' sandbox. Raises UsageError where it does not parse."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"chat template, line {error.lineno}: {error.message}") from error


def todays_date(template: str) -> str | None:
    """Today as YYYY-MM-DD if the template asks for the date, else None; recorded so that it can be repeated."""
    return datetime.date.today().isoformat() if "strftime_now" in template else None


def default_skipped_token_ids(tokenizer) -> list[int]:
    """Ids that are never extracted: special tokens (ends of turns among them) and think tags."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    think = {vocabulary[tag] for tag in ("<think>", "</think>") if tag in vocabulary}
    return sorted(special | set(tokenizer.all_special_ids) | think)


# --- conversation to tokens ---


def align_conversation(conversation: list[dict], tokenizer, chat_format: ChatFormat) -> Alignment:
    """Render, tokenize, mask and skip. Raises AlignmentError where the template refuses the conversation."""
    text, spans = render(conversation, tokenizer, chat_format)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids = np.array(encoding["input_ids"], np.int64)
    extents = token_extents(encoding["offset_mapping"])
    reasons = [PROMPT] * len(input_ids)
    for span in spans:
        _mark_span(reasons, span, text, input_ids, extents, tokenizer, chat_format)
    if reasons and reasons[0] is None:
        reasons[0] = FIRST_TOKEN_REASON
    return Alignment(input_ids, reasons)


def render(conversation: list[dict], tokenizer, chat_format: ChatFormat) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and the character spans of its generation blocks."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if chat_format.template_date:
        # The library hands templates no functions, and its own strftime_now is the clock: pin it.
        date = datetime.date.fromisoformat(chat_format.template_date)
        compile_template(chat_format.template).globals["strftime_now"] = date.strftime
    try:
        texts, spans = render_jinja_template(
            conversations=[conversation],
            chat_template=chat_format.template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **chat_format.template_kwargs},
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise AlignmentError(f"the chat template refuses it: {error}") from error
    return texts[0], spans[0]


def token_extents(offsets: list[tuple[int, int]]) -> np.ndarray:
    """Characters each token stands for, int64 (T, 2): its offsets, begun where the token before it ended.

    Offsets may leave out a leading space (``trim_offsets``); tokens that share a character keep its start.
    """
    extents = np.array(offsets, np.int64).reshape(-1, 2)
    extents[1:, 0] = np.minimum(extents[1:, 0], extents[:-1, 1])
    return extents


def _mark_span(reasons, span, text, input_ids, extents, tokenizer, chat_format) -> None:
    """Write the reasons of one generation block's tokens: None where a token is to be extracted."""
    start, end = span
    inside = np.flatnonzero((extents[:, 0] < end) & (extents[:, 1] > start))
    skipped = [i for i in inside if input_ids[i] in chat_format.skipped_token_ids]
    for i in inside:
        reasons[i] = None
    for i in skipped:
        is_tag = THINK_TAG.fullmatch(tokenizer.convert_ids_to_tokens(int(input_ids[i])))
        reasons[i] = THINK_TAG_REASON if is_tag else SPECIAL_REASON
    for tag in THINK_TAG.finditer(text, start, end):
        _skip_overlapping(reasons, inside, extents, tag.span(), THINK_TAG_REASON)
    if block := EMPTY_THINK_BLOCK.match(text, start, end):
        for i in inside[extents[inside, 1] <= block.end()]:
            reasons[i] = EMPTY_THINK_REASON
    ends = [i for i in skipped if reasons[i] == SPECIAL_REASON]
    if ends and not text[extents[ends[-1], 1] : end].strip():
        for i in inside[inside > ends[-1]]:
            reasons[i] = AFTER_END_REASON


def _skip_overlapping(reasons, inside, extents, span, reason) -> None:
    start, end = span
    for i in inside[(extents[inside, 0] < end) & (extents[inside, 1] > start)]:
        reasons[i] = reason


# --- stored rows ---


def align_row(row: dict, tokenizer, extraction: dict, chat_template: str | None = None) -> Alignment:
    """A stored row's input ids and extracted positions, proven by its checksum.

    ``extraction`` is the dataset's ``extraction.json``; ``chat_template`` (a path or text) replaces the recorded
    one. Raises AlignmentError where the rebuilt tokens are not those that were extracted from.
    """
    chat_format = recorded = ChatFormat.from_extraction(extraction)
    if chat_template is not None:
        chat_format = replace(recorded, template=choose_template(chat_template, tokenizer))
    conversation = from_stored(row["messages"])
    alignment = align_conversation(conversation, tokenizer, chat_format)
    if alignment.checksum != row["alignment_checksum"] or len(alignment.positions) != row["num_tokens"]:
        raise AlignmentError(_explain_mismatch(row, alignment, conversation, tokenizer, recorded))
    return alignment


def _explain_mismatch(row: dict, rebuilt: Alignment, conversation, tokenizer, recorded: ChatFormat) -> str:
    """Where the rebuilt conversation first differs, known if the recorded template still gives the tokens."""
    original = align_conversation(conversation, tokenizer, recorded)
    if original.checksum != row["alignment_checksum"]:
        return (
            f"column alignment_checksum: the rebuilt conversation ({len(rebuilt.input_ids)} tokens) is not the "
            "one extracted. The messages, the template or the tokenizer have changed since."
        )
    if len(original.positions) != row["num_tokens"]:
        return f"column num_tokens: found {row['num_tokens']}, expected {len(original.positions)} extracted tokens"
    return "this chat template does not fit the extraction: " + _first_difference(original, rebuilt, tokenizer)


def _first_difference(original: Alignment, rebuilt: Alignment, tokenizer) -> str:
    for i, (found, expected) in enumerate(zip(rebuilt.input_ids, original.input_ids, strict=False)):
        if found != expected:
            texts = [repr(tokenizer.decode([int(token)])) for token in (found, expected)]
            return f"token {i} is {texts[0]} ({found}), expected {texts[1]} ({expected})"
    if len(rebuilt.input_ids) != len(original.input_ids):
        return f"it gives {len(rebuilt.input_ids)} tokens, expected {len(original.input_ids)}"
    for i, (found, expected) in enumerate(zip(rebuilt.reasons, original.reasons, strict=True)):
        if (found is None) != (expected is None):
            verb = ("extracts", "skipped") if found is None else ("skips", "extracted")
            return f"it {verb[0]} token {i}, which was {verb[1]}"
    return "the extracted positions differ"
