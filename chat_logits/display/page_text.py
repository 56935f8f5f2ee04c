"""Tokens as a page shows them: which characters belong to which token, and which tokens to which turn."""

import bisect
import codecs
import itertools
import re
from dataclasses import dataclass

import regex

from chat_logits.analysis.tokens import PROMPT, TokenAnalysis
from chat_logits.display.text import code_of, is_lone_byte, is_plain

# Characters that form one emoji with their neighbours; other clusters join across tokens by themselves.
EMOJI = regex.compile(r"(?=[\p{Extended_Pictographic}\p{Regional_Indicator}])\X")
ASSISTANT, TEMPLATE = "assistant", "template"
SHOWN_ROLES = ("system", "user", "assistant", "tool")
# A line that opens or closes a block of code (CommonMark, "Fenced code blocks"), possibly indented as in lists
FENCE = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one turn: ``role`` is the speaker's, None for the template's text between turns."""

    role: str | None
    tokens: list[TokenAnalysis]

    @property
    def kind(self) -> str:
        """The kind for the page's style; roles that it does not know are shown as a user's."""
        return TEMPLATE if self.role is None else self.role if self.role in SHOWN_ROLES else "user"


def token_characters(tokens: list[TokenAnalysis]) -> list[str]:
    """The characters shown at each token; joined, they are the whole text.

    A character or an emoji that is spread over several tokens is shown at the last of them. Bytes of partial characters
    stay surrogate escapes.
    """
    pieces = _whole_at_last_byte([token.text.encode(errors="surrogateescape") for token in tokens])
    owners = [i for i, piece in enumerate(pieces) for _ in piece]
    text = "".join(pieces)
    for emoji in EMOJI.finditer(text):
        start, end = emoji.span()
        owners[start:end] = [owners[end - 1]] * (end - start)
    placed = [""] * len(tokens)
    for character, owner in zip(text, owners, strict=True):
        placed[owner] += character
    return placed


def _whole_at_last_byte(texts: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    pieces: list[str] = []
    for text in texts:
        if pieces and text and not 0x80 <= text[0] < 0xC0:  # no continuation byte: the character before stays partial
            pieces[-1] += decoder.decode(b"", final=True)
        pieces.append(decoder.decode(text))
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def characters_of_parts(tokens: list[TokenAnalysis], characters: list[str]) -> dict[int, str]:
    """By position, for tokens that are only bytes of a character: that character, as ``token_characters`` has it."""
    parts, following = {}, ""
    for token, placed in zip(reversed(tokens), reversed(characters), strict=True):
        following = regex.match(r"\X", placed)[0] if placed else following
        if token.text and all(map(is_lone_byte, token.text)) and all(map(is_plain, following)):
            parts[token.position] = following
    return parts


def in_fences(turns: list[Segment], characters: list[str]) -> set[int]:
    """Positions of the tokens that are wholly or partly in blocks of code; ``characters`` are as in ``segments``."""
    positions: set[int] = set()
    placed = iter(characters)
    for turn in turns:
        pieces = list(itertools.islice(placed, len(turn.tokens)))
        ends = list(itertools.accumulate(map(len, pieces)))
        for start, end in fenced_spans("".join(pieces)) if turn.role else []:
            first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, end)
            positions.update(token.position for token in turn.tokens[first : last + 1])
    return positions


def fenced_spans(text: str) -> list[tuple[int, int]]:
    """The spans of blocks of code in a text, each from its opening fence to its closing one, or to the end."""
    spans, opened = [], None
    for line in FENCE.finditer(text):
        fence, info = line["fence"], line["info"]
        if opened is None:
            if fence[0] == "~" or "`" not in info:
                opened = line
        elif fence[0] == opened["fence"][0] and len(fence) >= len(opened["fence"]) and not info.strip():
            spans.append((opened.start(), line.end()))
            opened = None
    return [*spans, (opened.start(), len(text))] if opened else spans


def with_their_characters(tokens: list[TokenAnalysis], characters: list[str]) -> list[tuple[str, bool]]:
    """Each token's text including any characters that it is only a part of, and whether there are such characters.

    ``characters`` are those of ``token_characters``.
    """
    ends = itertools.accumulate(len(token.text.encode(errors="surrogateescape")) for token in tokens)
    placed = itertools.accumulate(len(text.encode(errors="surrogateescape")) for text in characters)
    goes_on = [whole < end for whole, end in zip(placed, ends, strict=True)]
    shown, following = [], ""
    for i in reversed(range(len(tokens))):
        shown.append((characters[i] + following * goes_on[i], goes_on[i] or (i > 0 and goes_on[i - 1])))
        following = regex.match(r"\X", characters[i])[0] if characters[i] else following
    return shown[::-1]


def pieces_of(characters: str) -> list[tuple[str, str]]:
    """A token's characters as ("plain", text), ("line", end of line), ("code", codes of controls) or ("part", "").

    "part" is for a token without characters of its own, whose character continues in the next one.
    """
    if not characters:
        return [("part", "")]
    kinds = ((_kind(character), character) for character in characters)
    return [
        piece
        for kind, run in itertools.groupby(kinds, key=lambda pair: pair[0])
        for piece in _pieces(kind, "".join(character for _, character in run))
    ]


def _kind(character: str) -> str:
    if character in "\n\t":
        return "line" if character == "\n" else "plain"
    return "plain" if is_plain(character) else "code"


def _pieces(kind: str, run: str) -> list[tuple[str, str]]:
    if kind == "plain":
        return [(kind, run)]
    return [(kind, code_of(character) if kind == "code" else character) for character in run]


def segments(tokens: list[TokenAnalysis], messages: list[dict]) -> list[Segment]:
    """The conversation in turns. The assistant's turns come from the mask, the others are found by their text.

    A prompt's message that is not found, since the template has changed it, is shown as the template's own text.
    """
    speakers = [None if token.status == PROMPT else ASSISTANT for token in tokens]
    characters = token_characters(tokens)
    start = 0
    for end, before in zip(_answer_starts(speakers), _messages_before(messages, speakers), strict=False):
        speakers[start:end] = _roles_in_prompt(characters[start:end], before)
        start = end + next((i for i, speaker in enumerate(speakers[end:]) if speaker is None), len(speakers) - end)
    return [
        Segment(role, [token for _, token in run])
        for role, run in itertools.groupby(zip(speakers, tokens, strict=True), key=lambda pair: pair[0])
    ]


def _answer_starts(speakers: list[str | None]) -> list[int]:
    return [i for i, speaker in enumerate(speakers) if speaker and not (i and speakers[i - 1])]


def _messages_before(messages: list[dict], speakers: list[str | None]) -> list[list[dict]]:
    """The messages in each stretch of prompt; none if the answers are not those of the mask."""
    answers, spans = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT], len(_answer_starts(speakers))
    ends = answers if len(answers) == spans else answers[-1:] if spans == 1 else []
    return [messages[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def _roles_in_prompt(characters: list[str], messages: list[dict]) -> list[str | None]:
    """The role of the message that each token of a stretch of prompt is part of; None for the template's own tokens.

    Messages are searched from the end, as most of the template's words come before them: its system prompt, headers.
    """
    text = "".join(characters)
    roles: list[str | None] = [None] * len(characters)
    owners = [i for i, piece in enumerate(characters) for _ in piece]
    end = len(text)
    for message in reversed(messages):
        content = (message["content"] or "").strip()
        place = _last_place(text, content, end, owners, characters) if content else None
        if place is not None:
            first, last, end = owners[place], owners[place + len(content) - 1], place
            roles[first : last + 1] = [message["role"]] * (last + 1 - first)
    return roles


def _last_place(text: str, content: str, end: int, owners: list[int], characters: list[str]) -> int | None:
    """The last place of the content before ``end``, except inside a single token, such as a header's."""
    place = text.rfind(content, 0, end)
    while place >= 0:
        first, last = owners[place], owners[place + len(content) - 1]
        if first != last or characters[first].strip() == content:
            return place
        place = text.rfind(content, 0, place + len(content) - 1)
    return None
