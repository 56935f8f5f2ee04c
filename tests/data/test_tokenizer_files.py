"""A tokenizer from its files alone against transformers' own: ids, offsets, texts, special tokens, fingerprint."""

import json
import re
import shutil

import pytest
from conftest import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from chat_logits.data.tokenizer import _byte_characters, load_tokenizer, token_text, tokenizer_fingerprint
from chat_logits.data.tokenizer_files import PROBES, read_tokenizer
from chat_logits.errors import ToolkitError

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


# --- tokenizers that transformers rebuilds ---


def folder_of(tmp_path, tokenizer_class: str | None, change=None):
    """SmolLM2's tokenizer with another class of transformers, or none, named beside it, and a change of its form."""
    form = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    if change:
        change(form)
    (tmp_path / "tokenizer.json").write_text(json.dumps(form), encoding="utf-8")
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    config.pop("tokenizer_class")
    content = json.dumps({**config, **named})
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    return str(tmp_path)


def compose(form) -> None:
    form["normalizer"] = {"type": "NFC"}


COMPOSED = "caf\u00e9 cafe\u0301 ﬁ \u212b \u1e69"
REBUILT = [
    ("Qwen2Tokenizer", None, "tab\tand\n\nnewlines \r\n"),  # its own regex
    ("GPTNeoXTokenizer", None, COMPOSED),  # NFC that the file has not
    ("GPT2Tokenizer", compose, COMPOSED),  # without the NFC that the file has
]


@pytest.mark.parametrize(("tokenizer_class", "change", "text"), REBUILT)
def test_a_tokenizer_that_gives_other_ids_than_its_file_is_refused(tmp_path, tokenizer_class, change, text):
    """The message has the first text on which the two differ, and both ids, as each of the libraries gives them."""
    folder = folder_of(tmp_path, tokenizer_class, change)
    theirs = AutoTokenizer.from_pretrained(folder)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = {each: (theirs.encode(each, add_special_tokens=False), own.encode(each).ids) for each in PROBES}
    different = [each for each, (one, other) in ids.items() if one != other]
    assert different[0] == text
    with pytest.raises(ToolkitError) as raised:
        load_tokenizer(folder)
    found, expected = ids[text]
    assert f"makes {text!r} into {found}, the file tokenizer.json into {expected}." in str(raised.value)


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_tokenizer_that_keeps_to_its_file_is_loaded(tmp_path, tokenizer_class):
    tokenizer = load_tokenizer(folder_of(tmp_path, tokenizer_class))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert all(tokenizer.encode(text, add_special_tokens=False) == own.encode(text).ids for text in PROBES)


ADVICE = re.compile(r'give (\S+) the "(\w+)" (\w+)\.$')
# transformers takes its own class for models of types qwen2 and qwen3_5, whatever is named.
CASES = [(None, "Qwen2Tokenizer"), ("llama", "Qwen2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("qwen2", None)]
CASES += [("qwen3_5", "Qwen2Tokenizer")]


@pytest.mark.parametrize(("model_type", "tokenizer_class"), CASES)
def test_the_way_out_that_the_message_names_is_one(tmp_path, model_type, tokenizer_class):
    """Taken word by word, beside a model whose type transformers has a class of its own for, and beside others."""
    folder = folder_of(tmp_path, tokenizer_class)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(ToolkitError) as raised:
        load_tokenizer(folder)
    file, key, name = ADVICE.search(str(raised.value)).groups()
    config = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_text(json.dumps({**config, key: name}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert all(tokenizer.encode(text, add_special_tokens=False) == own.encode(text).ids for text in PROBES)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(read_tokenizer(folder))


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_what_is_named_is_taken_where_transformers_takes_another(tmp_path, caplog, named):
    caplog.set_level("INFO", logger="chat_logits")
    folder = folder_of(tmp_path, named)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "Qwen2Tokenizer"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(PROBES[1]) == Tokenizer.from_file(f"{folder}/tokenizer.json").encode(PROBES[1]).ids
    assert tokenizer.decode(tokenizer.encode(PROBES[1])) == PROBES[1]
    told = f"Tokenizer: {named}, as tokenizer_config.json names; transformers' Qwen2Tokenizer gives other ids"
    assert caplog.messages == [told]


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_of_the_class_that_transformers_takes_stays_what_it_was(tmp_path, caplog, named):
    """A file that Qwen2Tokenizer itself has written; the class is taken, whatever is named, and nothing is told."""
    caplog.set_level("INFO", logger="chat_logits")
    rebuilt = AutoTokenizer.from_pretrained(folder_of(tmp_path, "Qwen2Tokenizer"))
    rebuilt.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": named}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and not caplog.messages
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", [None, "qwen2"])
def test_other_entries_that_change_ids_are_told_of_where_the_class_is_named_already(tmp_path, model_type):
    added = {"content": "tab\tand", "special": False, "lstrip": False, "rstrip": False, "single_word": False}
    folder = folder_of(tmp_path, "PreTrainedTokenizerFast")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "added_tokens_decoder": {"49152": {**added, "normalized": False}}}))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    way_out = "remove from tokenizer_config.json, which names PreTrainedTokenizerFast already, what else changes ids"
    with pytest.raises(ToolkitError, match=way_out):
        load_tokenizer(folder)
    file.write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(folder)


def test_reading_takes_the_file_or_refuses_it_as_extraction_does(tmp_path, real_extraction):
    """A class that rebuilds is not asked where the file is the one recorded; for another file it is refused."""
    from chat_logits.analysis.opening import open_with_tokenizer

    folder = folder_of(tmp_path, "Qwen2Tokenizer")
    _, tokenizer = open_with_tokenizer(str(real_extraction), tokenizer_id=folder)
    own = Tokenizer.from_file(f"{folder}/tokenizer.json")
    assert all(tokenizer(text)["input_ids"] == own.encode(text, add_special_tokens=False).ids for text in PROBES)
    folder_of(tmp_path, "Qwen2Tokenizer", lambda form: form.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ToolkitError, match="Qwen2Tokenizer of transformers makes"):
        open_with_tokenizer(str(real_extraction), tokenizer_id=folder)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sentencepiece_like_files(tmp_path, family):
    """A file with spaces as underscores and its own normalizer, under a class that has its own of both."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *map(chr, range(33, 127)),
        "▁",
        "é",
        "東",
    ]
    normalizer = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    }
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "dropout": None}
    form = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": None, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**form, "post_processor": None, "decoder": None}))
    name = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer"}[family]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **special}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    same = all(theirs.encode(text, add_special_tokens=False) == own.encode(text).ids for text in PROBES)
    assert not same
    with pytest.raises(ToolkitError, match=f"of {tmp_path}: .*Tokenizer.* of transformers makes .* into "):
        load_tokenizer(str(tmp_path))
