"""Text of tokens made fit for terminals, pages and JSON: nothing in it acts there, and escapes show what it was."""

import json
import math
import re
import unicodedata
from dataclasses import asdict, is_dataclass

import numpy as np
import regex

ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # than those of lone bytes
JOINERS = "\u200c\u200d"  # what emoji and some scripts need between their characters
# Where they shape what is on either side of them: between letters, and U+200D between emoji, whose skin tone or variant
# may come before it.
JOINING = regex.compile(
    rf"(?<=[\p{{L}}\p{{M}}])[{JOINERS}](?=[\p{{L}}\p{{M}}])"
    r"|(?<=\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]?)\u200d(?=\p{Extended_Pictographic})"
)


def quoted(text: str, space: str = "␣") -> str:
    """The text in quotes, on one line, with spaces visible and anything a terminal would act on escaped.

    A joiner is left as it is between letters or emoji, which it shapes.

    >>> quoted(" a\\n")
    '"␣a\\\\n"'
    """
    joining = _joining(text)
    shown = "".join(
        space if character == " " else character if i in joining else _visible(character)
        for i, character in enumerate(text)
    )
    if shown and unicodedata.combining(shown[0]):
        shown = f"◌{shown}"
    return f'"{shown}"'


def _joining(text: str) -> set[int]:
    """Where in the text a joiner shapes its neighbours."""
    return set() if text.isascii() else {match.start() for match in JOINING.finditer(text)}


def _visible(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    return character if character.isprintable() else code_of(character)


def line_of(text: str) -> str:
    """The text on one line without quotes, its spaces as they are; for names that come from a dataset."""
    return quoted(text, space=" ")[1:-1]


def visible(text: str) -> str:
    """The text with the codes of characters that would act in a terminal; quotes and backslashes as they are."""
    joining = _joining(text)
    return "".join(
        character if character.isprintable() or i in joining else code_of(character) for i, character in enumerate(text)
    )


def visible_lines(text: str) -> str:
    """As ``visible``, with its lines as they are; for messages, whatever a dataset, a model or the Hub says in them."""
    return "\n".join(map(visible, text.split("\n")))


def code_of(character: str) -> str:
    r"""A character by its code, such as ``\x1b`` or ``\u202e``; a byte of a partial character (PEP 383) as a byte."""
    code = ord(character)
    if is_lone_byte(character):
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_lone_byte(character: str) -> bool:
    """Whether this is a byte that is no whole character, as a surrogate escape."""
    return 0xDC80 <= ord(character) <= 0xDCFF


def is_plain(character: str) -> bool:
    """Whether a page may show the character as it is: spaces and joiners too, but no controls, and no lone bytes."""
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


# --- JSON ---


def plain(value):
    """The value as dicts, lists, strings, numbers, booleans and None. Infinite numbers are None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return _whole(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_texts(value):
    """The value with its texts, at any depth, as UTF-8 can have them: lone bytes as U+FFFD."""
    if isinstance(value, dict):
        return {key: whole_texts(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole_texts(entry) for entry in value]
    return _whole(value) if isinstance(value, str) else value


def _whole(text: str) -> str:
    return OTHER_SURROGATES.sub("\ufffd", text).encode(errors="surrogateescape").decode(errors="replace")


def json_text(value) -> str:
    """JSON for people to read; characters that would act in a terminal are escaped, as JSON escapes them."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
    return "".join(c if c == "\n" or is_plain(c) else json.dumps(c)[1:-1] for c in text)
