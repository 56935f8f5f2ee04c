"""A chat model's tokenizer: loading it, its fingerprint, its tokens' texts, and which tokens are never extracted."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from functools import cache

from chat_logits.data.tokenizer_files import GENERIC, generic_class, is_rebuilt, refuse_rebuilt
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import explain_loading
from logit_codec import MAX_TOKEN_ID

logger = logging.getLogger(__name__)

THINK_TAGS = ("<think>", "</think>")
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def load_tokenizer(
    tokenizer_id: str, revision: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
):
    """A fast tokenizer from a Hub id or local folder.

    Raises ToolkitError if there is none, or if it gives other ids than its ``tokenizer.json``. If
    ``tokenizer_config.json`` names a class that uses that file unchanged, that class is used.
    """
    # The library's threads would compete with the model's, and each process forked later would print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_id, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:
        raise explain_loading(error, f"tokenizer of {tokenizer_id}") from error
    if not tokenizer.is_fast:
        raise ToolkitError(f"tokenizer of {tokenizer_id}: no fast version, so tokens have no character offsets")
    if not gguf_file and type(tokenizer).__module__.startswith("transformers."):  # remote code may differ on purpose
        return _as_its_file(tokenizer, tokenizer_id, revision)
    return tokenizer


def _as_its_file(tokenizer, tokenizer_id: str, revision: str | None):
    """The tokenizer; or one of the generic class, if ``tokenizer_config.json`` names that but transformers has used
    another, which gives other ids than the file. For some model types, transformers ignores the named class.

    Raises ToolkitError if ids still differ.
    """
    named = generic_class(tokenizer_id, revision)
    if named and type(tokenizer).__name__ not in GENERIC and is_rebuilt(tokenizer, tokenizer_id, revision):
        from transformers import PreTrainedTokenizerFast

        taken = type(tokenizer).__name__
        logger.info("Tokenizer: %s, as tokenizer_config.json names; transformers' %s gives other ids", named, taken)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_id, revision=revision)
    refuse_rebuilt(tokenizer, tokenizer_id, revision)
    return tokenizer


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 (hex) of the tokenizer's serialised form and the special tokens that templates get."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    form["truncation"] = form["padding"] = None  # state of the last call, not part of the tokenizer
    content = [form, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_wide_vocabulary(tokenizer) -> None:
    """Raise UsageError if ordinary tokens have ids of 2**18 or more, which cannot be stored."""
    added = set(tokenizer.added_tokens_decoder)
    widest = max(i for i in tokenizer.get_vocab().values() if i not in added)
    if widest >= MAX_TOKEN_ID:
        raise UsageError(
            f"the tokenizer has ordinary tokens up to id {widest}, expected ids below {MAX_TOKEN_ID}: "
            "the storage format has 18 bits a token id"
        )


def token_text(tokenizer, token_id: int) -> str:
    """The text of one token, with its leading space; bytes of an incomplete character become surrogate escapes."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # a padded vocabulary has rows without tokens
        return f"<id {token_id}>"
    if piece.startswith("▁"):
        return piece.replace("▁", " ")
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return piece_bytes(piece).decode(errors="surrogateescape") if "\ufffd" in text else text


def piece_bytes(piece: str) -> bytes:
    """The bytes of a byte-fallback piece such as ``<0xF0>``, or of a byte-level BPE piece."""
    if fallback := BYTE_FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    table = _byte_characters()
    return bytes(table[character] for character in piece if character in table)


@cache
def _byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level BPE: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def special_token_ids(tokenizer) -> set[int]:
    """Ids of the tokens that the tokenizer marks as special, including ends of turns."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def unknown_token_id(tokenizer) -> int | None:
    """The id of the token for text that is not in the vocabulary, None if there is no such token."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return tokenizer.get_vocab().get(model.get("unk_token"))


def skipped_token_ids(tokenizer, skip: Sequence[str] = (), keep: Sequence[str] = ()) -> frozenset[int]:
    """Ids that are never extracted: special tokens and think tags, plus ``skip`` and minus ``keep``.

    Raises UsageError for a text that is not a single token of the vocabulary, or is in both.
    """
    if both := sorted(set(skip) & set(keep)):
        raise UsageError(f"`skip_tokens`, `keep_tokens`: both have {both[0]!r}, expected it in one of them")
    vocabulary = tokenizer.get_vocab()
    think = {vocabulary[tag] for tag in THINK_TAGS if tag in vocabulary}
    chosen = {}
    for option, tokens in (("`skip_tokens`", skip), ("`keep_tokens`", keep)):
        unknown = [token for token in tokens if token not in vocabulary]
        if unknown:
            raise UsageError(f"{option} {unknown[0]!r}: not one token of this vocabulary, as tokenizer.json spells it")
        chosen[option] = {vocabulary[token] for token in tokens}
    return frozenset((special_token_ids(tokenizer) | think | chosen["`skip_tokens`"]) - chosen["`keep_tokens`"])
