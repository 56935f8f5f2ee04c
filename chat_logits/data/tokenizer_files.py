"""A tokenizer read from its files by ``tokenizers`` only, without transformers, for use if its fingerprint is known.

``AutoTokenizer`` may deviate from the files: the classes of some families have their own regex, NFC or normalizer.
If the fingerprint of the files is the recorded one, it has not deviated, and ids, offsets and texts are the same.
Otherwise ``load_tokenizer`` is needed, which refuses a tokenizer that gives other ids than its file.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from chat_logits.errors import ToolkitError

# Texts on which tokenizers differ: spaces, digits, contractions, composed and combining characters, emoji, code.
PROBES = (
    *(" two  three   spaces", "tab\tand\n\nnewlines \r\n", "trailing ", "under_score-dash", "MixedCase UPPER lower"),
    *("1234567 3.14 2024-05-06 1,000", "I'm you're it'S don't we'll", 'what?! (yes) "no" …', "a/b\\c@d#e"),
    *(
        "caf\u00e9 cafe\u0301 ﬁ \u212b \u1e69",
        "naïve straße \u0130I\u0307",
        "नमस्ते",
        "مرحبا",
        "\u1112\u1161\u11ab 한국어",
    ),
    *("東京都に行く。", "１２ＡＢ", "🙂 👩🏽‍🚀", "zero\u200bwidth\u00a0space", "\x00\x1b[31m"),
    *("def f(x):\n    return x**2  # \t", "for (i=0;i<10;++i){a[i]+=0x1F;}", "https://example.org/?q=1&r=%20"),
)
# Names of the class of transformers that uses tokenizer.json unchanged.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """The parts of a transformers tokenizer that alignment and analysis need, under the same names."""

    def __init__(self, backend: Tokenizer, config: dict):
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.special_tokens_map = {name: _content(config[name]) for name in NAMED_TOKENS if config.get(name)}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = [
            *self.special_tokens_map.values(),
            *map(_content, extra if isinstance(extra, list) else extra.values()),
        ]
        self.all_special_ids = [i for i in map(backend.token_to_id, dict.fromkeys(named)) if i is not None]

    @property
    def added_tokens_decoder(self) -> dict:
        """Added tokens by id, each with its attribute ``special``."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str | None] | None:
        """The tokens as the vocabulary spells them, None for ids without one."""
        token = self.backend_tokenizer.id_to_token
        return token(ids) if isinstance(ids, int) else [token(each) for each in ids]

    def decode(self, ids: list[int], **_options) -> str:
        """The text of some ids, including special tokens, without clean-up."""
        return self.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def __call__(self, text: str | list[str], **_options) -> dict[str, list]:
        """``input_ids`` and ``offset_mapping`` of a text, or lists of these for several, adding no special tokens."""
        if isinstance(text, str):
            encoding = self.backend_tokenizer.encode(text, add_special_tokens=False)
            return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}
        encodings = self.backend_tokenizer.encode_batch(text, add_special_tokens=False)
        return {
            "input_ids": [encoding.ids for encoding in encodings],
            "offset_mapping": [encoding.offsets for encoding in encodings],
        }


def read_tokenizer(source: str, commit: str | None = None) -> FileTokenizer | None:
    """The tokenizer of a local folder, or of a Hub model at a commit that is in the cache.

    None if its files are not available locally, or if it depends on Python code or on options that ``tokenizers`` does
    not have.
    """
    paths = [_file(source, commit, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    files = [file for file in paths if file]
    if len(files) < len(paths):
        return None
    try:
        config = json.loads(files[1].read_text(encoding="utf-8"))
        if config.get("auto_map") or config.get("split_special_tokens"):
            return None
        return FileTokenizer(Tokenizer.from_file(str(files[0])), config)
    except Exception:  # files in another form: load_tokenizer reports what is wrong with them
        return None


def generic_class(source: str, commit: str | None = None) -> str | None:
    """The class of ``GENERIC`` that ``tokenizer_config.json`` names, None if it names another or is not available."""
    file = _file(source, commit, "tokenizer_config.json")
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file else None
    return named if named in GENERIC else None


def is_rebuilt(tokenizer, source: str, commit: str | None = None) -> bool:
    """Whether a transformers tokenizer gives a text of ``PROBES`` other ids than its own ``tokenizer.json`` does.

    False if that file is not available.
    """
    return _first_difference(tokenizer, source, commit) is not None


def refuse_rebuilt(tokenizer, source: str, commit: str | None = None) -> None:
    """Raise ToolkitError if ``is_rebuilt``, with advice on how to get the file's tokenizer."""
    difference = _first_difference(tokenizer, source, commit)
    if difference is None:
        return
    text, found, expected = difference
    named, where = generic_class(source, commit), "" if Path(source).is_dir() else "in a copy of the repository, "
    advice = f'{where}give tokenizer_config.json the "tokenizer_class" {GENERIC[0]}.'
    if named:
        advice = f"{where}remove from tokenizer_config.json, which names {named} already, what else changes ids."
    raise ToolkitError(
        f"tokenizer of {source}: {type(tokenizer).__name__} of transformers makes {text!r} into {found}, the "
        f"file tokenizer.json into {expected}. The file is right if the model was trained with it: {advice}"
    )


def _first_difference(tokenizer, source: str, commit: str | None) -> tuple[str, list[int], list[int]] | None:
    """The first of ``PROBES`` on which a tokenizer and its file differ, with the ids of both."""
    file = _file(source, commit, "tokenizer.json")
    if file is None:
        return None
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    for text in PROBES:
        expected = own.encode(text, add_special_tokens=False).ids
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            return text, found, expected
    return None


def _file(source: str, commit: str | None, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    if commit is None:
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(source, name, revision=commit)
    return Path(cached) if isinstance(cached, str) else None


def _content(token: str | dict) -> str:
    """A token's text; files have just the text, or an object with it and other properties."""
    return token["content"] if isinstance(token, dict) else token
