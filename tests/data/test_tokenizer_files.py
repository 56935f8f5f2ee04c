"""A tokenizer from its files alone against transformers' own: ids, offsets, texts, special tokens, fingerprint."""

import json
import shutil

import pytest
from conftest import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chat_logits.data.tokenizer import _byte_characters, token_text, tokenizer_fingerprint
from chat_logits.data.tokenizer_files import read_tokenizer

TEXTS = [
    "",
    "<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\n Hello.\n\n\tyes<|im_end|>",
    "naïve 東京 🙂 👩🏽‍🚀 e\u0301 \u202e\x1b[31m",
]


@pytest.fixture(scope="module")
def both():
    return read_tokenizer(str(MODEL)), AutoTokenizer.from_pretrained(MODEL)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TEXTS, " ", "<|im_end|>", "a"]) | st.text(max_size=20), max_size=4).map("".join))
def test_ids_and_offsets_are_transformers(both, text):
    ours, theirs = both
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoding = ours(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    assert encoding == {name: expected[name] for name in ("input_ids", "offset_mapping")}
    assert ours.convert_ids_to_tokens(encoding["input_ids"]) == theirs.convert_ids_to_tokens(encoding["input_ids"])
    assert ours.decode(encoding["input_ids"]) == theirs.decode(
        encoding["input_ids"], clean_up_tokenization_spaces=False
    )


def test_several_texts_at_once(both):
    ours, theirs = both
    expected = theirs(TEXTS, add_special_tokens=False, return_offsets_mapping=True)
    assert ours(TEXTS) == {name: expected[name] for name in ("input_ids", "offset_mapping")}


def test_every_token_has_the_same_text(both):
    ours, theirs = both
    assert ours.get_vocab() == theirs.get_vocab()
    assert all(token_text(ours, i) == token_text(theirs, i) for i in range(0, len(theirs) + 3, 7))


def test_special_tokens_and_fingerprint(both):
    ours, theirs = both
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    added = ({i: token.special for i, token in each.added_tokens_decoder.items()} for each in both)
    assert next(added) == next(added)
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("tokenizer.json", {"model": "none"}),
        ("tokenizer.json", None),
    ],
)
def test_what_files_alone_do_not_tell_is_left_to_transformers(tmp_path, file, change):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / name)
    content = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_text(json.dumps({**content, **(change or {})}), encoding="utf-8")
    if change is None:
        (tmp_path / file).unlink()
    assert read_tokenizer(str(tmp_path)) is None


def test_what_is_not_on_this_machine_is_left_to_transformers(tmp_path):
    assert read_tokenizer(str(tmp_path / "gone")) is None
    assert read_tokenizer("user/never-seen", "0" * 40) is None


def test_bytes_have_the_characters_of_byte_level_bpe():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert _byte_characters() == {character: byte for byte, character in bytes_to_unicode().items()}
