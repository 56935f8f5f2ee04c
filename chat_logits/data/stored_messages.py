"""Conversations to the ``messages`` column of stored rows, and back."""

import json

from chat_logits.errors import ToolkitError


def to_stored(conversation: list[dict]) -> list[dict]:
    """Messages in the form of the ``messages`` column: role, content, and other keys as JSON in ``extra``."""
    return [
        {
            "role": message["role"],
            "content": message.get("content"),
            "extra": json.dumps(_extra(message), ensure_ascii=False) if _extra(message) else None,
        }
        for message in conversation
    ]


def _extra(message: dict) -> dict:
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def from_stored(messages: list[dict]) -> list[dict]:
    """The conversation that ``to_stored`` was given. Raises ToolkitError if ``extra`` is not a JSON object."""
    return [_from_stored(message) for message in messages]


def _from_stored(message: dict) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ToolkitError(f"column messages: found {message!r:.40}, expected role, content and extra")
    restored = {"role": message["role"]}
    if message.get("content") is not None:
        restored["content"] = message["content"]
    if message.get("extra") is not None:
        restored.update(_extra_object(message["extra"]))
    return restored


def _extra_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolkitError(f"column messages: extra is not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ToolkitError(f"column messages: extra is not a JSON object: {text:.40}")
    return value


def question_of(messages: list[dict], length: int | None = 80) -> str:
    """The beginning of a conversation's first user message (all of it for None), "" without one."""
    questions = (message["content"] for message in messages if message["role"] == "user")
    return (next(questions, None) or "")[:length]
