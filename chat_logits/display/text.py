"""Text of tokens made fit to be looked at: nothing in it acts on a terminal or a page, every character can be told."""

import unicodedata

ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
JOINERS = "\u200c\u200d"  # what emoji and some scripts need between their characters


def quoted(text: str, space: str = "␣") -> str:
    """The text in quotes, on one line, with spaces visible and anything a terminal would act on escaped.

    >>> quoted(" a\\n")
    '"␣a\\\\n"'
    """
    shown = "".join(space if character == " " else _visible(character) for character in text)
    if shown and unicodedata.combining(shown[0]):
        shown = f"◌{shown}"
    return f'"{shown}"'


def _visible(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    return character if character.isprintable() else code_of(character)


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


def whole_characters(texts: list[str]) -> str:
    """Consecutive tokens' texts joined, with characters whole that are spread over several of them."""
    return "".join(texts).encode(errors="surrogateescape").decode(errors="surrogateescape")
