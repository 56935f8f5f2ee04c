"""Source rows to conversations: lists of ``{"role", "content", ...}`` messages, and the form they are stored in.

Which columns hold the conversation is found from their names alone, once a run, and recorded as ``columns``:
``{"messages": NAME}`` or ``{"prompt": NAME, "response": NAME}``, with an optional ``"input"`` (Alpaca's) and
``"system"``.
"""

import json

from chat_logits.errors import ToolkitError, UsageError

# In the order they are looked for; a `reference_answer` beside `answer` is a grader's column, never the response.
FORMATS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "instruction", "response": "output"},
    {"prompt": "query", "response": "response"},
)
SYSTEM_COLUMNS = ("system", "system_prompt")
OVERRIDES = "Name the ones that are meant: `messages_column`, or `prompt_column` and `response_column`."
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


def choose_columns(
    names: list[str], messages: str | None = None, prompt: str | None = None, response: str | None = None
) -> dict[str, str]:
    """The columns that hold the conversation, those named or those found among all ``names``.

    Raises UsageError where a column that was named is missing, or where none or several formats fit.
    """
    if messages or prompt or response:
        columns = _named_columns(messages, prompt, response)
        missing = [name for name in columns.values() if name not in names]
        if missing:
            raise UsageError(f"no column {missing[0]!r}; the dataset has: {', '.join(names)}")
    else:
        columns = _detect_columns(names)
    if columns.get("prompt") == "instruction" and "input" in names:
        columns["input"] = "input"
    system = next((name for name in SYSTEM_COLUMNS if name in names), None)
    return {**columns, "system": system} if system else columns


def _named_columns(messages: str | None, prompt: str | None, response: str | None) -> dict[str, str]:
    if messages and not (prompt or response):
        return {"messages": messages}
    if prompt and response and not messages:
        return {"prompt": prompt, "response": response}
    raise UsageError("expected `messages_column` alone, or `prompt_column` and `response_column` together")


def _detect_columns(names: list[str]) -> dict[str, str]:
    fitting = [columns for columns in FORMATS if set(columns.values()) <= set(names)]
    listed = ", ".join(names)
    if not fitting:
        known = "; ".join(" + ".join(columns.values()) for columns in FORMATS)
        raise UsageError(f"no chat columns among: {listed}; expected one of: {known}.\n{OVERRIDES}")
    if len(fitting) > 1:
        fits = " and ".join(" + ".join(columns.values()) for columns in fitting)
        raise UsageError(f"ambiguous columns: {fits} both hold conversations (all columns: {listed}).\n{OVERRIDES}")
    return dict(fitting[0])


def to_conversation(row: dict, columns: dict[str, str], system_prompt: str | None = None) -> list[dict]:
    """The row's messages, ``content`` a string each; ``system_prompt`` goes before those that have none.

    Raises ConversationError, whose message is a skip reason.
    """
    if "messages" in columns:
        messages = _turns(row[columns["messages"]])
    else:
        messages = _prompt_turns(row, columns) + _as_turns(row[columns["response"]], "assistant")
    system = row.get(columns.get("system")) or system_prompt
    if system and not any(message.get("role") == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return _checked(messages)


def _prompt_turns(row: dict, columns: dict[str, str]) -> list[dict]:
    prompt = row[columns["prompt"]]
    added = row[columns["input"]] if "input" in columns else None
    if isinstance(added, str) and added.strip():
        prompt = f"{prompt}\n\n{added}" if prompt else added
    return _as_turns(prompt, "user")


def _as_turns(value, role: str) -> list[dict]:
    """A text as one turn of ``role``; a list of messages as it is."""
    return _turns(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _turns(turns) -> list[dict]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError("no list of messages")
    return [turn if turn.get("role") is not None else _from_sharegpt(turn) for turn in turns]


def _from_sharegpt(turn: dict) -> dict:
    speaker = turn.get("from")
    if speaker is None or "value" not in turn:
        raise ConversationError("a turn with neither 'role' nor 'from' and 'value'")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ConversationError(f"unknown speaker {speaker!r}")
    return {"role": role, "content": turn["value"]}


def _checked(messages: list[dict]) -> list[dict]:
    messages = [_plain({key: value for key, value in message.items() if value is not None}) for message in messages]
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ConversationError("a message without a role")
        if not isinstance(content, str | None):
            raise ConversationError("a message whose content is not text")
        if content is None and (role != "assistant" or set(message) == {"role"}):
            raise ConversationError(f"a turn of role {role!r} without content")
    if not any(message["role"] == "assistant" for message in messages):
        raise ConversationError("no assistant turn")
    return messages


def _plain(message: dict) -> dict:
    """The message as JSON gives it back, so that what is rendered now is what can be rendered from the stored row."""
    try:
        return json.loads(json.dumps(message, default=str, allow_nan=False))
    except ValueError as error:
        raise ConversationError("a message with a number that JSON has not") from error


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
    except (ValueError, TypeError) as error:
        raise ToolkitError(f"column messages: extra is no JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ToolkitError(f"column messages: extra is no JSON object: {text:.40}")
    return value


def question_of(messages: list[dict], length: int = 80) -> str:
    """How a conversation's first user message begins, "" without one."""
    questions = (message["content"] for message in messages if message["role"] == "user")
    return (next(questions, None) or "")[:length]
