"""A conversation for a page to copy: its text, and every token's numbers in columns, each text once.

``share.js`` turns the columns into the ``as_dict`` of an ``Analysis`` or a ``Comparison``.
"""

import json
from collections.abc import Iterable

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.conversation import Analysis
from chat_logits.analysis.tokens import TokenAnalysis

TOKEN = ("position", "token_id", "status", "reason")
NUMBERS = ("log_prob", "rank", "kept", "tail_mass", "entropy", "entropy_is_bound")
PAIR = ("kl", "agrees", "log_prob_change")
CODED = ("status", "reason", "kept", "entropy_is_bound")  # columns with few different values


def conversation_text(messages: list[dict]) -> str:
    """The messages as readable text: role, content, and anything else in a message as JSON."""
    return "\n\n".join(map(_message_text, messages)) + "\n"


def _message_text(message: dict) -> str:
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    more = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in others.items()]
    content = message.get("content")
    return "\n".join([f"{message['role']}:", *([content] if content is not None else []), *more])


def analysis_numbers(analysis: Analysis) -> dict:
    """The numbers of all tokens on an analysis' page."""
    tokens = analysis.showing(only=None).shown
    texts: dict[int, str] = {}
    return {
        "text": conversation_text(analysis.messages),
        "head": analysis.head,
        "texts": texts,
        "columns": {**_columns(tokens, (*TOKEN, "index")), **_model(tokens, texts)},
    }


def comparison_numbers(comparison: Comparison) -> dict:
    """The numbers of a comparison's tokens, each model's under ``first`` and ``other``."""
    texts: dict[int, str] = {}
    firsts = [pair.first for pair in comparison.tokens]
    others = [pair.other for pair in comparison.tokens]
    return {
        "text": conversation_text(comparison.messages),
        "head": comparison.head,
        "texts": texts,
        "columns": {**_columns(firsts, TOKEN), **_columns(comparison.tokens, PAIR)},
        "models": {"first": _model(firsts, texts), "other": _model(others, texts)},
    }


def _columns(tokens: Iterable, names: Iterable[str]) -> dict:
    columns = {name: [getattr(token, name) for token in tokens] for name in names}
    return {name: _coded(column) if name in CODED else column for name, column in columns.items()}


def _coded(column: list) -> dict[str, list]:
    """A column as its different ``values``, and the index ``at`` which each entry is in them."""
    values = {value: code for code, value in enumerate(dict.fromkeys(column))}
    return {"values": list(values), "at": [values[value] for value in column]}


def _model(tokens: list[TokenAnalysis], texts: dict[int, str]) -> dict:
    """A model's numbers per token; predictions are pairs of an id and an index in ``probabilities``. Their texts are
    added to ``texts``."""
    for token in tokens:
        texts[token.token_id] = token.text
        texts.update((each.token_id, each.text) for each in token.predictions)
    shares = [each.probability for token in tokens for each in token.predictions]
    codes = {share: code for code, share in enumerate(dict.fromkeys(shares))}
    pairs = [[(each.token_id, codes[each.probability]) for each in token.predictions] for token in tokens]
    return {**_columns(tokens, NUMBERS), "predictions": {"probabilities": list(codes), "pairs": pairs}}
