"""Source rows to conversations: lists of ``{"role", "content", ...}`` messages, and the form they are stored in.

Which columns hold the conversation is found from their names alone, once a run, and recorded as ``columns``:
``{"messages": NAME}``, ``{"conversations": NAME}`` or ``{"prompt": NAME, "response": NAME}``, the last with an
optional ``"input"``.
"""

import json

from errors import ToolkitError, UsageError

# In the order they are looked for; a `reference_answer` beside `answer` is a grader's column, never the response.
FORMATS = (
    {"messages": "messages"},
    {"conversations": "conversations"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "instruction", "response": "output"},
    {"prompt": "query", "response": "response"},
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}


class ConversationError(ToolkitError):
    """A source row that is no conversation; the run skips it and counts the message as the reason."""


def detect_columns(column_names: list[str]) -> dict[str, str]:
    """The columns that hold the conversation. Raises UsageError where none or several formats fit."""
    found = [columns for columns in FORMATS if set(columns.values()) <= set(column_names)]
    listed = ", ".join(column_names)
    if not found:
        known = "; ".join(" + ".join(columns.values()) for columns in FORMATS)
        raise UsageError(
            f"no chat columns among: {listed}\nExpected one of: {known}. Rename the dataset's columns to one of these."
        )
    if len(found) > 1:
        fits = " and ".join(" + ".join(columns.values()) for columns in found)
        raise UsageError(
            f"ambiguous columns: {fits} both hold conversations (all columns: {listed})\n"
            "Remove or rename the ones that are not meant."
        )
    columns = dict(found[0])
    if columns.get("prompt") == "instruction" and "input" in column_names:
        columns["input"] = "input"
    return columns


def to_conversation(row: dict, columns: dict[str, str]) -> list[dict]:
    """The row's messages, ``content`` a string each. Raises ConversationError, whose message is a skip reason."""
    if "messages" in columns:
        return _messages(row[columns["messages"]])
    if "conversations" in columns:
        return _messages([_from_sharegpt(turn) for turn in row[columns["conversations"]] or []])
    prompt, response = row[columns["prompt"]], row[columns["response"]]
    if "input" in columns and row[columns["input"]]:
        prompt = f"{prompt}\n\n{row[columns['input']]}"
    return _messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def _from_sharegpt(turn: dict) -> dict:
    if "from" not in turn or "value" not in turn:
        raise ConversationError("a turn without 'from' and 'value'")
    role = SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        raise ConversationError(f"unknown speaker {turn['from']!r}")
    return {"role": role, "content": turn["value"]}


def _messages(messages: list[dict] | None) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConversationError("no list of messages")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise ConversationError("a message without a role")
        if not isinstance(message.get("content", ""), str):
            raise ConversationError("a message whose content is not text")
    if not any(message["role"] == "assistant" for message in messages):
        raise ConversationError("no assistant turn")
    if any(message["role"] == "assistant" and set(message) == {"role"} for message in messages):
        raise ConversationError("an assistant turn without content")
    return messages


def to_stored(conversation: list[dict]) -> list[dict]:
    """Messages as the ``messages`` column has them: role, content, and the other keys as JSON in ``extra``."""
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
    """The conversation that ``to_stored`` was given. Raises ToolkitError where ``extra`` is no JSON object."""
    return [_from_stored(message) for message in messages]


def _from_stored(message: dict) -> dict:
    restored = {"role": message["role"]}
    if message["content"] is not None:
        restored["content"] = message["content"]
    if message["extra"] is not None:
        try:
            restored.update(json.loads(message["extra"]))
        except ValueError as error:
            raise ToolkitError(f"column messages: extra is no JSON object: {error}") from error
    return restored
