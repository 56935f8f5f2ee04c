"""The kind of text that a token stands for: beginnings of words, their rest, numbers, signs."""

import numpy as np
import regex

from chat_logits.data.tokenizer import special_token_ids, token_text

WORD, CONTINUATION, OTHER_SCRIPT = "beginning of a word", "rest of a word", "other script"
NUMBER, SIGNS, WHITE, MIXED = "number", "punctuation, symbols", "white space", "letters or digits with signs"
BYTES, SPECIAL = "part of a character", "special token"
TOKEN_CLASSES = (WORD, CONTINUATION, OTHER_SCRIPT, NUMBER, SIGNS, WHITE, MIXED, BYTES, SPECIAL)
# In this order; the first one that matches a token's whole text counts.
_PATTERNS = {
    WHITE: regex.compile(r"\s*"),
    BYTES: regex.compile(r"(?s).*[\udc80-\udcff].*"),
    NUMBER: regex.compile(r"\s*\p{N}+\s*"),
    SIGNS: regex.compile(r"\s*[\p{P}\p{S}\p{Cf}][\p{P}\p{S}\p{Cf}\p{M}\s]*"),
    WORD: regex.compile(r"\s*[\p{Latin}\p{M}]+\s*"),
    OTHER_SCRIPT: regex.compile(r"\s*[\p{L}\p{M}\p{Cf}]+\s*"),
}


def token_class(text: str, before: str = "") -> str:
    """The class of a token, one of ``TOKEN_CLASSES`` except the last, by its own ``text`` and that of the token
    ``before`` it, as ``token_text`` gives them.

    Letters of Latin script begin a word after white space or a sign, and are the rest of one after a letter or digit.
    Letters of any other script are one class, as many scripts are written without spaces. Letters or digits with
    anything else are mixed, as are letters with digits.

    >>> token_class(" well"), token_class("known", "-"), token_class("ing", " walk"), token_class("'s", " it")
    ('beginning of a word', 'beginning of a word', 'rest of a word', 'letters or digits with signs')
    """
    kind = next((name for name, pattern in _PATTERNS.items() if pattern.fullmatch(text)), MIXED)
    is_continued = before[-1:].isalnum() or regex.match(r"\p{M}", before[-1:])
    return CONTINUATION if kind == WORD and is_continued and not text[:1].isspace() else kind


class TokenClasses:
    """The classes of a tokenizer's tokens; each text is classified once."""

    def __init__(self, tokenizer):
        self._tokenizer, self._special = tokenizer, special_token_ids(tokenizer)
        self._texts: dict[int, str] = {}
        self._found: dict[tuple[int, str], str] = {}

    def of(self, input_ids: np.ndarray, positions: np.ndarray) -> list[str]:
        """The class of the tokens at ``positions`` (n,), none of them 0, of a conversation's ``input_ids`` (T,)."""
        pairs = zip(input_ids[positions].tolist(), input_ids[positions - 1].tolist(), strict=True)
        return [self._of_pair(*pair) for pair in pairs]

    def _of_pair(self, token_id: int, before_id: int) -> str:
        if token_id in self._special:
            return SPECIAL
        before = "" if before_id in self._special else self._text(before_id)[-1:]
        key = token_id, before
        if key not in self._found:
            self._found[key] = token_class(self._text(token_id), before)
        return self._found[key]

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = token_text(self._tokenizer, token_id)
        return self._texts[token_id]
