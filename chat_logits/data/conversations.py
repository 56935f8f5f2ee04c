"""Source rows to conversations: lists of ``{"role", "content", ...}`` messages.

Values that are not text are never converted to text: a row with one is skipped, and the reason recorded.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping

from chat_logits.data.rendering import REASONING
from chat_logits.data.roles import to_role
from chat_logits.errors import ToolkitError

logger = logging.getLogger(__name__)

SPOKEN = ("role", "content", "from", "value")  # speaker and text; a value here that is not text is refused
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content's parts
NO_ANSWER = "no assistant turn"
TRANSCRIPT = re.compile(r"^\s*(assistant|gpt|bot|ai)\s*:|<\|im_start\|>|\[/INST\]", re.IGNORECASE | re.MULTILINE)
WITHOUT_CONTENT = ("tool_calls", "function_call", *REASONING)  # an answer with one of these needs no content


class ConversationError(ToolkitError):
    """A source row that is not a conversation; the run skips it and counts the message as the reason."""


class NothingToExtract(ConversationError):
    """A valid conversation with nothing to extract."""


class TellOnce:
    """Logs each text once. Unlike a cached function, it can be pickled for another process."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)


def to_conversation(
    row: dict,
    columns: dict[str, str],
    system_prompt: str | None = None,
    template_roles: Collection[str] = (),
    number_columns: Collection[str] = (),
    has_arrow_nulls: bool = True,
    features: Mapping[str, object] | None = None,
    template_words: Collection[str] = (),
    tell: Callable[[str], None] = logger.warning,
) -> list[dict]:
    """The row's messages, each with a string as ``content``; ``system_prompt`` is added if no system message is there.

    ``template_roles`` are the roles that the chat template itself names. ``number_columns`` hold only integers or
    booleans, which are read as texts. With ``has_arrow_nulls``, objects have keys of other rows as nulls; these are
    dropped at every depth, except in values that are JSON according to the columns' ``features`` (of ``datasets``). A
    message's key whose value JSON cannot hold, such as a time, is dropped if it is not among the ``template_words``.
    ``tell`` is called about that, and about messages whose own system message differs from the one in the row's system
    column. Raises ConversationError; its message is the skip reason.
    """
    if has_arrow_nulls:
        row = {name: without_nulls(row.get(name), (features or {}).get(name)) for name in columns.values()}
    if "messages" in columns:
        messages, num_asked = _turns(row.get(columns["messages"])), 0
    else:
        row = {**row, **{name: _number_text(row.get(name)) for name in number_columns}}
        messages = _prompt_turns(row, columns)
        num_asked = len(messages)
        messages += _as_turns(row.get(columns["response"]), "assistant")
    messages = [_with_json_alone(message, template_words, tell) for message in messages]
    messages = [_message(_with_calls(message, template_words), template_roles) for message in messages]
    _refuse_repeated(messages[:num_asked], messages[num_asked:])
    messages = _with_system(messages, row.get(columns.get("system")), system_prompt, template_roles, tell)
    if not any(message["role"] == "assistant" for message in messages):
        raise NothingToExtract(NO_ANSWER)
    return messages


def _refuse_repeated(prompt: list[dict], response: list[dict]) -> None:
    """Raise ConversationError if the response begins with the prompt's last message, which would then appear twice."""
    if prompt and prompt[-1] in itertools.takewhile(lambda message: message["role"] != "assistant", response):
        raise ConversationError("a response that has its prompt in it: name its column as `messages_column`")


def _with_system(
    messages: list[dict],
    column: object,
    system_prompt: str | None,
    template_roles: Collection[str],
    tell: Callable[[str], None],
) -> list[dict]:
    """The messages with their own system message, else the column's, else ``system_prompt``, if there is any."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and column and column not in own:
        tell("Conversations with a system message of their own are stored without the one of the system column")
    system = column or system_prompt
    if own or not system:
        return messages
    return [_message({"role": "system", "content": system}, template_roles), *messages]


def _number_text(value):
    """The text of an integer or a boolean; any other value unchanged."""
    return str(value) if isinstance(value, int) else value


def _prompt_turns(row: dict, columns: dict[str, str]) -> list[dict]:
    prompt = row.get(columns["prompt"])
    added = row.get(columns["input"]) if "input" in columns else None
    added = _plain_text(added, "input") if added is not None else ""
    if added.strip():
        prompt = f"{_plain_text(prompt, 'instruction')}\n\n{added}" if prompt else added
    return _history(row.get(columns.get("history"))) + _as_turns(prompt, "user")


def _history(rounds) -> list[dict]:
    """Earlier rounds, each a question and its answer."""
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in rounds or ()):
        raise ConversationError("a history that is not a list of questions with their answers")
    pairs = [zip(("user", "assistant"), each, strict=True) for each in rounds or ()]
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


def _as_turns(value, role: str) -> list[dict]:
    """A text as one turn of ``role``; a list of messages unchanged."""
    return _turns(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _turns(turns) -> list[dict]:
    """Messages given as a list, as JSON text of a list, or as an object of lists."""
    given = turns
    if isinstance(turns, str):
        turns = _parsed(turns)
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len(set(map(len, turns.values()))) > 1:
            raise ConversationError("an object of lists of messages' parts, which differ in length")
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError(f"not a list of messages, but {_kind(given)}")
    return turns


def _kind(value) -> str:
    """Describe a value that is not a list of messages."""
    if isinstance(value, str):
        if _parsed(value) is not None:
            return "JSON text of something else"
        return "a transcript in one text" if TRANSCRIPT.search(value) else "text that is not JSON"
    if isinstance(value, list):
        return f"a list with {type(next(each for each in value if not isinstance(each, dict))).__name__} in it"
    return {type(None): "nothing", dict: "one object"}.get(type(value), f"a value of type {type(value).__name__}")


def _parsed(text: str):
    """The value of a JSON text, None if it is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message(turn: dict, template_roles: Collection[str]) -> dict:
    """One checked message in OpenAI's form; ShareGPT's ``from`` and ``value`` become role and content."""
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn:
        if "from" not in turn or "value" not in turn:
            found = f", but {', '.join(turn):.60}" if turn else ""
            raise ConversationError(f"a turn with neither 'role' nor 'from' and 'value'{found}")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": turn["from"], "content": turn["value"], **others}
    if {"from", "value", "content"} <= set(turn) and turn["content"] != turn["value"]:
        raise ConversationError("a turn whose 'content' and 'value' differ")
    speaker = _text(turn["role"]) if isinstance(turn["role"], bytes) else turn["role"]
    turn["role"] = speaker
    if isinstance(speaker, str) and speaker.strip().lower() == "function_call":
        turn = _call_turn(turn)
    role = to_role(turn["role"], template_roles)
    if role is None:
        raise ConversationError(f"unknown speaker {speaker!r}")
    if "content" in turn:
        turn["content"] = _text(turn["content"])
    elif role != "assistant" or not any(turn.get(name) for name in WITHOUT_CONTENT):
        raise ConversationError(f"a turn of role {role!r} without content")
    return _plain({**_with_objects(turn), "role": role})


def _text(content) -> str:
    if isinstance(content, bytes):
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConversationError("bytes that are not UTF-8 text") from error
    if isinstance(content, list):
        return "".join(map(_part_text, content))
    if not isinstance(content, str):
        raise ConversationError(f"a message whose content is not text but {type(content).__name__}")
    return content


def _plain_text(value: object, name: str) -> str:
    """A text that is joined with another one. Raises ConversationError for a value that is not text."""
    if isinstance(value, str | bytes):
        return _text(value)
    raise ConversationError(f"an {name} that is not text but {type(value).__name__}")


def _part_text(part) -> str:
    if isinstance(part, str):
        return _text(part)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS:
        raise ConversationError(f"a message whose content is not text: a part of type {kind!r}")
    texts = [part[name] for name in ("text", "value") if part.get(name) is not None]
    if not texts or not all(isinstance(text, str | bytes) for text in texts):
        raise ConversationError("a message whose content is not text: a part without any")
    if texts[1:] and texts[0] != texts[1]:
        raise ConversationError("a message whose content is not one text: a part whose 'text' and 'value' differ")
    return _text(texts[0])


def without_nulls(value, feature: object = None):
    """The value without the nulls that Arrow adds to an object for keys that only other rows have.

    ``feature`` is the value's type in ``datasets``: in values stored as JSON, nulls are the data's own and are kept.
    """
    if getattr(feature, "_type", "") == "Json":
        return value
    if isinstance(value, dict):
        kinds = feature if isinstance(feature, dict) else {}
        return {key: without_nulls(entry, kinds.get(key)) for key, entry in value.items() if entry is not None}
    kind = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [without_nulls(entry, kind) for entry in value] if isinstance(value, list) else value


def _call_turn(turn: dict) -> dict:
    """ShareGPT's ``function_call`` turn (its value is the call as JSON text) as a turn of the assistant."""
    return {"role": "assistant", "tool_calls": [_to_call(turn.get("content"))]}


def _with_calls(turn: dict, template_words: Collection[str]) -> dict:
    """OpenAI's older ``function_call`` as ``tool_calls``, unless the template reads it itself."""
    call = turn.get("function_call")
    if call is None or "function_call" in template_words:
        return turn
    if turn.get("tool_calls"):
        raise ConversationError("a turn with tool_calls and a function_call")
    others = {key: value for key, value in turn.items() if key != "function_call"}
    return {**others, "tool_calls": [_to_call(call)]}


def _to_call(value: object) -> dict:
    """A call with its name and arguments, or JSON text of one, in the form of ``tool_calls``."""
    call = _parsed(value) if isinstance(value, str) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ConversationError("a function_call that is not a JSON object with a name")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _with_objects(turn: dict) -> dict:
    """The turn with its calls as a list of objects, and their arguments as objects. Either may be given as JSON text;
    for arguments, OpenAI's API does that."""
    if "tool_calls" not in turn:
        return turn
    calls = turn["tool_calls"]
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConversationError("tool_calls that are not a list of objects")
    return {**turn, "tool_calls": [*map(_with_object, calls)]}


def _with_object(call: dict) -> dict:
    """The call, in OpenAI's form or with only name and arguments, with its arguments as an object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    arguments = _parsed(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _with_json_alone(message: dict, template_words: Collection[str], tell: Callable[[str], None]) -> dict:
    """The message without keys that the template does not read and whose values JSON cannot hold."""
    kept = {}
    for key, value in message.items():
        if key in SPOKEN or _is_json(value):
            kept[key] = value
        elif key in template_words:
            raise ConversationError(f"a message whose {key!r} is {type(value).__name__}, which JSON does not have")
        else:
            kind = type(value).__name__
            tell(f"Messages are stored without {key!r}: JSON has no {kind}, and the template does not read it")
    return kept


def _is_json(value: object) -> bool:
    """Whether JSON has all types in a value; numbers such as NaN, which JSON does not have, are not checked here."""
    try:
        json.dumps(value)
    except (TypeError, RecursionError):
        return False
    except ValueError:
        return True
    return True


def _plain(message: dict) -> dict:
    """The message after a round trip through JSON, so that the stored row renders to the same text later."""
    try:
        text = json.dumps(message, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
        return json.loads(text)
    except UnicodeEncodeError as error:
        raise ConversationError("a text with half of a surrogate pair") from error
    except ValueError as error:
        raise ConversationError("a message with a number that JSON does not have") from error
