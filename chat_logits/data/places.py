"""Where tokens and answers stand in a rendered conversation, in bytes of UTF-8.

Tokenizers give offsets in characters. Tokens of different tokenizers cannot be compared by these, as several tokens may
share one character.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import regex

from chat_logits.data.alignment import Alignment, Rendered
from chat_logits.data.tokenizer import piece_bytes

CHANGED = "the template changes the answer"
REPEATED = "the template writes the answer more than once"
OTHER_TURNS = "the template has more or fewer turns than messages"
CLOSING_TAG = "</think>"


class Unit(NamedTuple):
    """Bytes ``start`` to ``end`` of a text, and the tokens ``first`` to ``last`` that stand for them together.

    It is one token, or several tokens whose own bytes are not known.
    """

    start: int
    end: int
    first: int
    last: int


class Place(NamedTuple):
    """Bytes ``start`` to ``end`` of an answer; in the conversation's text they are ``shift`` bytes further on."""

    start: int
    end: int
    shift: int


@dataclass(frozen=True)
class PlacedRow:
    """Where a conversation's tokens and answers are in its text.

    ``units`` are in order; each token is in one of them. For each message of the assistant, ``answers`` has its
    ``Place`` or the reason why there is none, and ``turns`` the bytes of its turn in the text; ``turns`` is empty if
    turns and messages are not one to one.
    """

    alignment: Alignment
    units: list[Unit]
    answers: list[Place | str]
    turns: list[tuple[int, int]]


def place_row(
    messages: list[dict],
    rendered: Rendered,
    alignment: Alignment,
    extents: np.ndarray,
    to_pieces: Callable[[list[int]], list[str]],
) -> PlacedRow:
    """The places of a conversation from ``RowAligner.placed``; ``to_pieces`` gives the vocabulary's spelling of ids."""
    text = rendered.text.encode()
    to_byte = byte_offsets(rendered.text)
    within = {int(to_byte[at]) for at in within_characters(rendered.text)}
    units = byte_units(text, to_byte[extents], to_pieces(alignment.input_ids.tolist()), within)
    contents = [message.get("content") or "" for message in messages if message["role"] == "assistant"]
    turns = [(int(to_byte[start]), int(to_byte[end])) for start, end in rendered.spans]
    if len(turns) != len(contents):
        return PlacedRow(alignment, units, [OTHER_TURNS] * len(contents), [])
    extracted = partial(_extracted_bytes, units, alignment.reasons)
    answers = [find_answer(content, text, turn, extracted) for content, turn in zip(contents, turns, strict=True)]
    return PlacedRow(alignment, units, answers, turns)


def byte_offsets(text: str) -> np.ndarray:
    """For each character of a text, and for its end, the offset in its UTF-8 bytes: int64 (len + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)


# --- tokens ---


def within_characters(text: str) -> set[int]:
    """Offsets inside a grapheme (what readers see as one character), such as a letter with its accent."""
    if text.isascii():
        return set()
    return {at for found in regex.finditer(r"\X", text) for at in range(found.start() + 1, found.end())}


def byte_units(text: bytes, extents: np.ndarray, pieces: Sequence[str], within: Collection[int] = ()) -> list[Unit]:
    """The units of a text's tokens, which stand for ``extents``, bytes, int64 (T, 2), and are spelled ``pieces``.

    Tokens that share a character each get their own bytes of it if their pieces together give the bytes of the text;
    otherwise they form one unit. A token without text, such as a start token that some vocabularies add, forms one
    unit with the next token. A boundary ``within`` a character and its accents (bytes) counts only if the tokens on
    both sides spell the text exactly: where a tokenizer composes characters, its offsets cover only the first part.
    """
    extents = _split_characters(text, extents, pieces)
    writes = [_writes(piece, text[start:end]) for piece, (start, end) in zip(pieces, extents.tolist(), strict=True)]
    units: list[Unit] = []
    for token, (start, end) in enumerate(extents.tolist()):
        last = units[-1] if units else None
        is_vague = start in within and not (writes[token - 1] and writes[token])
        if last is not None and (last.start == last.end or start < last.end or is_vague):
            units[-1] = Unit(min(last.start, start), max(last.end, end), last.first, token)
        else:
            units.append(Unit(start, end, token, token))
    return units


def _writes(piece: str, text: bytes) -> bool:
    """Whether a token with this spelling writes exactly this text."""
    return text in (piece_bytes(piece), piece.replace("▁", " ").encode())


def _split_characters(text: bytes, extents: np.ndarray, pieces: Sequence[str]) -> np.ndarray:
    """The extents; tokens that share characters get their own bytes if the pieces give these."""
    shares = (extents[1:, 0] < extents[:-1, 1]).tolist()
    extents = extents.copy()
    first = 0
    while first < len(shares):
        last = first
        while last < len(shares) and shares[last]:
            last += 1
        if last > first:
            parts = [piece_bytes(piece) for piece in pieces[first : last + 1]]
            start, end = int(extents[first : last + 1, 0].min()), int(extents[first : last + 1, 1].max())
            if b"".join(parts) == text[start:end]:
                ends = start + np.cumsum([len(part) for part in parts])
                extents[first : last + 1] = np.stack([np.concatenate([[start], ends[:-1]]), ends], axis=1)
        first = last + 1
    return extents


# --- answers ---


def _extracted_bytes(units: list[Unit], reasons: list[str | None], start: int, end: int) -> int:
    """How many of the bytes ``start`` to ``end`` of the text belong to extracted tokens."""
    overlaps = (min(end, unit.end) - max(start, unit.start) for unit in units if reasons[unit.first] is None)
    return sum(overlap for overlap in overlaps if overlap > 0)


def find_answer(content: str, text: bytes, turn: tuple[int, int], extracted: Callable[[int, int], int]) -> Place | str:
    """Where a message's content is in its turn, bytes ``turn`` of the text, or the reason why that is not known.

    A template may trim the content or drop the thoughts before it; then the rest is searched for, byte for byte. If it
    occurs several times, the place with the most ``extracted`` bytes is taken.
    """
    whole = content.encode()
    if not whole:
        return Place(0, 0, turn[0])
    for start, end in _parts(content):
        starts = _occurrences(whole[start:end], text, turn)
        if not starts:
            continue
        size = end - start
        best = (
            sorted(((extracted(at, at + size), -at) for at in starts), reverse=True)
            if starts[1:]
            else [(0, -starts[0])]
        )
        if best[1:] and best[0][0] == best[1][0]:
            return REPEATED
        return _grown(whole, text, turn, Place(start, end, -best[0][1] - start))
    return CHANGED


def _parts(content: str) -> list[tuple[int, int]]:
    """Byte ranges to search for, none empty: the whole content, the content without outer white space, and what follows
    its thoughts."""
    behind = content.rfind(CLOSING_TAG) + len(CLOSING_TAG) if CLOSING_TAG in content else 0
    parts = [(0, len(content))]
    for first in dict.fromkeys((0, behind)):
        rest = content[first:]
        start = first + len(rest) - len(rest.lstrip())
        parts.append((start, start + len(rest.strip())))
    to_byte = byte_offsets(content)
    return [(int(to_byte[start]), int(to_byte[end])) for start, end in dict.fromkeys(parts) if start < end]


def _occurrences(part: bytes, text: bytes, turn: tuple[int, int]) -> list[int]:
    starts, at = [], text.find(part, *turn)
    while at >= 0:
        starts.append(at)
        at = text.find(part, at + 1, turn[1])
    return starts


def _grown(content: bytes, text: bytes, turn: tuple[int, int], place: Place) -> Place:
    """The place, extended at both ends by the whole characters that content and text have in common."""
    start, end, shift = place
    while start > 0 and start + shift > turn[0] and content[start - 1] == text[start - 1 + shift]:
        start -= 1
    while end < len(content) and end + shift < turn[1] and content[end] == text[end + shift]:
        end += 1
    while start < place.start and _is_inside_character(content, start):
        start += 1
    while end > place.end and _is_inside_character(content, end):
        end -= 1
    return Place(start, end, shift)


def _is_inside_character(content: bytes, at: int) -> bool:
    return at < len(content) and 0x80 <= content[at] < 0xC0
