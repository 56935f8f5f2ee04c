"""Kinds of tokens, by hand, and over a real tokenizer's vocabulary."""

import numpy as np
import pytest

from chat_logits.analysis.token_classes import (
    BYTES,
    CONTINUATION,
    MIXED,
    NUMBER,
    OTHER_SCRIPT,
    SIGNS,
    SPECIAL,
    TOKEN_CLASSES,
    WHITE,
    WORD,
    TokenClasses,
    token_class,
)

BY_HAND = [
    (" house", "", WORD),
    ("House", "", WORD),
    ("House", "\n", WORD),
    ("house", "(", WORD),
    ("house", " light", CONTINUATION),
    ("th", " 4", CONTINUATION),
    (" house", " light", WORD),
    ("é", " caf", CONTINUATION),
    ("\u0301s", " cafe", CONTINUATION),
    ("s", "\u0301", CONTINUATION),
    (" дом", "", OTHER_SCRIPT),
    ("ом", " д", OTHER_SCRIPT),
    ("東京", "", OTHER_SCRIPT),
    ("می\u200cروم", "", OTHER_SCRIPT),
    (" 42", "", NUMBER),
    ("7", "4", NUMBER),
    ("½", "", NUMBER),
    (").", "", SIGNS),
    (" +=", "", SIGNS),
    ("…\n", "", SIGNS),
    ("👩\u200d🔧", "", SIGNS),
    ("❤\ufe0f", "", SIGNS),
    ("\n\n", ".", WHITE),
    ("  ", "", WHITE),
    ("'s", " it", MIXED),
    (".com", "x", MIXED),
    (" x2", "", MIXED),
    ("_id", "a", MIXED),
    ("\udcf0", "", BYTES),
    (" \udcf0\udc9f", "", BYTES),
]


@pytest.mark.parametrize(("text", "before", "expected"), BY_HAND)
def test_by_hand(text, before, expected):
    assert token_class(text, before) == expected


def test_a_conversations_tokens_by_hand(smollm2):
    tokenizer = smollm2[1]
    ids = np.array(tokenizer("<|im_start|>It's 12, naïve zaragozanas 𓀀<|im_end|>")["input_ids"])
    found = TokenClasses(tokenizer).of(ids, np.arange(1, len(ids)))
    by_text: dict = {}
    for token_id, kind in zip(ids[1:].tolist(), found, strict=True):
        by_text.setdefault(tokenizer.decode([token_id]), kind)
    assert by_text["It"] == WORD and by_text["'s"] == MIXED and by_text["1"] == NUMBER and by_text[","] == SIGNS
    assert by_text["<|im_end|>"] == SPECIAL and CONTINUATION in found and BYTES in found


def test_every_token_of_a_vocabulary_has_a_class(smollm2):
    tokenizer = smollm2[1]
    ids = np.arange(len(tokenizer))
    found = TokenClasses(tokenizer).of(ids, ids[1:])
    assert set(found) == set(TOKEN_CLASSES)
    assert 0.5 < found.count(WORD) / len(found) < 0.95 and found.count(MIXED) < 0.05 * len(found)
