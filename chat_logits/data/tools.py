"""The tools that a source row offers the model: their definitions for the chat template, and as they are stored.

A definition is an object and is passed on unchanged: templates support OpenAI's form, and many support others.
"""

import json
from collections.abc import Callable

from chat_logits.data.conversations import ConversationError, without_nulls
from chat_logits.data.templates import ChatTemplate, TemplateError
from chat_logits.errors import ToolkitError

DEFINITIONS, CALLS = "definitions of tools", "calls of tools"  # keys among roles in ``shown``; roles have no spaces
SENTINEL = "xq7_seldom_3vk"
PROBED: dict = {
    "type": "function",
    "function": {
        "name": SENTINEL,
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"near": {"type": "string", "description": "A place."}}},
    },
}
PROBE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
_CALL = {"type": "function", "id": "call00001", "function": {"name": SENTINEL, "arguments": {"near": "here"}}}
CALLING = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    # The result has another name, so that the call's name appears only if the call itself is rendered.
    {"role": "tool", "content": "Here.", "name": "elsewhere", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Here."},
]


def to_tools(value: object, has_arrow_nulls: bool = True, feature: object = None) -> list[dict] | None:
    """The definitions in a row's column of tools, None for a row without tools.

    ``value`` is a list of objects, a list of JSON texts of objects, or JSON text of a list; null, an empty text and an
    empty list mean no tools. With ``has_arrow_nulls``, objects (not JSON texts) have keys of other rows as nulls, which
    are dropped, as by ``without_nulls``. Raises ConversationError for anything else.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    elif has_arrow_nulls:
        value = without_nulls(value, feature)
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ConversationError(f"tools that are not a list of objects but {type(value).__name__}")
    return [*map(_tool, value)]


def _tool(entry: object) -> dict:
    entry = _parsed(entry) if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry:
        raise ConversationError(f"tools that are not a list of objects: an entry is {json_kind(entry)}")
    try:
        text = json.dumps(entry, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError("tools with a text that is not UTF-8") from error
    except (ValueError, TypeError) as error:
        raise ConversationError(f"tools with a value that JSON does not have: {error}") from error
    return json.loads(text)


def json_kind(value: object) -> str:
    """The kind of a value, for a message."""
    return "empty" if value in ({}, [], "") else type(value).__name__


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"tools in a text that is not JSON: {str(error).partition(':')[0]}") from error


def to_stored_tools(tools: list[dict] | None) -> str | None:
    """The value of the ``tools`` column: JSON without spaces, keys in their original order, None without tools."""
    return None if tools is None else json.dumps(tools, ensure_ascii=False, separators=(",", ":"))


def from_stored_tools(text: str | None) -> list[dict] | None:
    """The tools that ``to_stored_tools`` was given. Raises ToolkitError for a text that is not a list of objects."""
    if text is None:
        return None
    try:
        tools = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolkitError(f"column tools: not JSON: {error}") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ToolkitError(f"column tools: found {text:.40}, expected null or a list of objects")
    return tools


def refuse_vanished_tools(
    conversation: list[dict], tools: list[dict] | None, text: str, template: ChatTemplate, shown: dict
) -> None:
    """Raise TemplateError if the template, which rendered ``text``, does not show a call, without which the answer is
    meaningless, or a tool: no answer should be scored without the tools that it was written with.

    ``tools`` are the conversation's own. ``shown`` caches what is known about calls and definitions.
    """
    _refuse_vanished_calls(conversation, tools, text, template, shown)
    _refuse_vanished_definitions(conversation, tools or template.kwargs.get("tools"), text, template, shown)


def _refuse_vanished_calls(
    conversation: list[dict], tools: list[dict] | None, text: str, template: ChatTemplate, shown: dict
) -> None:
    names = called_names(conversation)
    if not names:
        return
    asked = f"{CALLS} with definitions" if tools else CALLS
    if asked not in shown:
        shown[asked] = shows_calls(template.with_tools(tools).text_or_none)
    if shown[asked] is False or any(name not in text for name in names):
        raise TemplateError("a call of a tool, of which the chat template shows nothing")


def _refuse_vanished_definitions(
    conversation: list[dict], tools: list[dict] | None, text: str, template: ChatTemplate, shown: dict
) -> None:
    if not tools:
        return
    template = template.with_tools(tools)
    if DEFINITIONS not in shown:
        shown[DEFINITIONS] = shows_tools(template.text_or_none)
    are_shown = shown[DEFINITIONS]
    if are_shown is None:
        are_shown = template.text_or_none(conversation, tools=None) != text
    if not are_shown:
        raise TemplateError("tools, of which the chat template shows nothing (`tools_column` '' for none)")
    if (name := missing_name(tools, text)) is not None:
        raise TemplateError(f"a tool {name!r:.60}, which the chat template does not show")


def shows_tools(render: Callable[..., str | None]) -> bool | None:
    """Whether a chat template shows the definitions of tools, None if it refuses the test conversation.

    ``render(conversation, tools=…)`` gives a conversation's text, None if it is refused.
    """
    text = render(PROBE, tools=[PROBED])
    return None if text is None else SENTINEL in text


def shows_calls(render: Callable[..., str | None]) -> bool | None:
    """Whether a chat template shows the assistant's calls, None if it refuses the test conversations.

    ``render(conversation)`` gives a conversation's text, None if it is refused.
    """
    texts = [text for text in (render(CALLING), render(CALLING[:2])) if text is not None]
    return any(SENTINEL in text for text in texts) if texts else None


def called_names(conversation: list[dict]) -> list[str]:
    """The names of all tools that a conversation's assistant calls."""
    calls = [call for message in conversation for call in message.get("tool_calls") or ()]
    return [name for name in map(_name_of, calls) if name is not None]


def missing_name(tools: list[dict], text: str) -> str | None:
    """The name of the first tool that is not named in a rendered text, None if all are."""
    return next((name for name in map(_name_of, tools) if name is not None and name not in text), None)


def _name_of(tool: dict) -> str | None:
    """The name of a tool or of a call, in either form."""
    function = tool.get("function")
    name = tool.get("name") or (function.get("name") if isinstance(function, dict) else None)
    return name if isinstance(name, str) else None
