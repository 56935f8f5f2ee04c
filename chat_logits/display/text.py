"""Make tokens' texts safe for terminals, pages and JSON: control characters are escaped, so they have no effect."""

import json
import math
import re
import unicodedata
from dataclasses import asdict, is_dataclass

import numpy as np
import regex

ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # than those of lone bytes
JOINERS = "\u200c\u200d"  # emoji and some scripts need them between their characters
# Where they shape their neighbours: between letters, and U+200D between emoji, with a skin tone or variant before it.
JOINING = regex.compile(
    rf"(?<=[\p{{L}}\p{{M}}])[{JOINERS}](?=[\p{{L}}\p{{M}}])"
    r"|(?<=\p{Extended_Pictographic}[\uFE0F\p{Emoji_Modifier}]?)\u200d(?=\p{Extended_Pictographic})"
)


def quoted(text: str, space: str = "␣") -> str:
    """The text in quotes, on one line, with visible spaces and with everything escaped that a terminal would act on.

    A joiner between letters or emoji, which it shapes, stays as it is.

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
    """The text on one line without quotes and with plain spaces; for names that come from a dataset."""
    return quoted(text, space=" ")[1:-1]


def visible(text: str) -> str:
    """The text with codes for characters that would act in a terminal; quotes and backslashes stay as they are."""
    joining = _joining(text)
    return "".join(
        character if character.isprintable() or i in joining else code_of(character) for i, character in enumerate(text)
    )


def visible_lines(text: str) -> str:
    """As ``visible``, but line ends stay; for messages, which may quote a dataset, a model or the Hub."""
    return "\n".join(map(visible, text.split("\n")))


def code_of(character: str) -> str:
    r"""A character by its code, such as ``\x1b`` or ``\u202e``; a byte of a partial character (PEP 383) as a byte."""
    code = ord(character)
    if is_lone_byte(character):
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_lone_byte(character: str) -> bool:
    """Whether this is a byte of a partial character, as a surrogate escape."""
    return 0xDC80 <= ord(character) <= 0xDCFF


def is_plain(character: str) -> bool:
    """Whether a page may show the character as it is, such as spaces and joiners, but not controls and lone bytes."""
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
    """The value with all its texts, at any depth, made valid UTF-8: lone bytes become U+FFFD."""
    if isinstance(value, dict):
        return {key: whole_texts(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole_texts(entry) for entry in value]
    return _whole(value) if isinstance(value, str) else value


def _whole(text: str) -> str:
    return OTHER_SURROGATES.sub("\ufffd", text).encode(errors="surrogateescape").decode(errors="replace")


def json_text(value) -> str:
    """Indented JSON; characters that would act in a terminal are escaped as in JSON."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
    return "".join(c if c == "\n" or is_plain(c) else json.dumps(c)[1:-1] for c in text)
