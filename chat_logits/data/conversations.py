"""Source rows to conversations: lists of ``{"role", "content", ...}`` messages.

What is no text is not turned into one: a row with anything else is skipped with its reason.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping

from chat_logits.data.rendering import REASONING
from chat_logits.data.roles import to_role
from chat_logits.errors import ToolkitError

logger = logging.getLogger(__name__)

SPOKEN = ("role", "content", "from", "value")  # who says what; what is no text there is refused
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content's parts
NO_ANSWER = "no assistant turn"
WITHOUT_CONTENT = ("tool_calls", "function_call", *REASONING)  # one of them does


class ConversationError(ToolkitError):
    """A source row that is no conversation; the run skips it and counts the message as the reason."""


class NothingToExtract(ConversationError):
    """A conversation in which there is nothing to extract, through no fault of its own."""


class TellOnce:
    """Logs each text once. Unlike a function with a cache, it can go to another process."""

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
    """The row's messages, ``content`` a string each; ``system_prompt`` goes before those that have none.

    ``template_roles`` are the roles that the chat template names itself; ``number_columns`` hold integers or booleans
    and nothing else, which are then texts. With ``has_arrow_nulls``, objects have other rows' keys as nulls, which are
    dropped at every depth, but in values that the columns' ``features``, of ``datasets``, say are JSON. A message's key
    whose value JSON has not, such as a time, is left out where it is not among the ``template_words``; ``tell`` says
    so, and where messages have a system message of their own beside another in the row's column, or thoughts that the
    template does not read. Raises ConversationError, whose message is a skip reason.
    """
    if has_arrow_nulls:
        row = {name: without_nulls(row.get(name), (features or {}).get(name)) for name in columns.values()}
    if "messages" in columns:
        messages = _turns(row.get(columns["messages"]))
    else:
        row = {**row, **{name: _number_text(row.get(name)) for name in number_columns}}
        messages = _prompt_turns(row, columns) + _as_turns(row.get(columns["response"]), "assistant")
    messages = [_with_json_alone(message, template_words, tell) for message in messages]
    messages = [_message(_with_calls(message, template_words), template_roles) for message in messages]
    _tell_of_thoughts(messages, template_words, tell)
    messages = _with_system(messages, row.get(columns.get("system")), system_prompt, template_roles, tell)
    if not any(message["role"] == "assistant" for message in messages):
        raise NothingToExtract(NO_ANSWER)
    return messages


def _tell_of_thoughts(messages: list[dict], template_words: Collection[str], tell: Callable[[str], None]) -> None:
    """Say so where messages have thoughts and the template reads none."""
    given = {"reasoning_content", "thinking"}  # whatever the message calls them, templates get them by these names too
    for name in REASONING if template_words else ():
        if {name, *given}.isdisjoint(template_words) and any(message.get(name) for message in messages):
            tell(f"The chat template reads no {name!r}: the model sees the answers without these thoughts")


def _with_system(
    messages: list[dict],
    column: object,
    system_prompt: str | None,
    template_roles: Collection[str],
    tell: Callable[[str], None],
) -> list[dict]:
    """The messages with their own system message, or the column's, or ``system_prompt``, if there is one."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and column and column not in own:
        tell("Conversations with a system message of their own are stored without the one of the system column")
    system = column or system_prompt
    if own or not system:
        return messages
    return [_message({"role": "system", "content": system}, template_roles), *messages]


def _number_text(value):
    """The text of an integer or a boolean; anything else as it is."""
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
        raise ConversationError("a history that is no list of questions with their answers")
    pairs = [zip(("user", "assistant"), each, strict=True) for each in rounds or ()]
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


def _as_turns(value, role: str) -> list[dict]:
    """A text as one turn of ``role``; a list of messages as it is."""
    return _turns(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _turns(turns) -> list[dict]:
    """Messages as a list, as JSON text of one, or as one object of lists."""
    given = turns
    if isinstance(turns, str):
        turns = _parsed(turns)
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len(set(map(len, turns.values()))) > 1:
            raise ConversationError("an object of lists of messages' parts, which differ in length")
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError(f"no list of messages, but {_kind(given)}")
    return turns


def _kind(value) -> str:
    """What a value is that is no list of messages."""
    if isinstance(value, str):
        return "text that is no JSON" if _parsed(value) is None else "JSON text of something else"
    if isinstance(value, list):
        return f"a list with {type(next(each for each in value if not isinstance(each, dict))).__name__} in it"
    return {type(None): "nothing", dict: "one object"}.get(type(value), f"a value of type {type(value).__name__}")


def _parsed(text: str):
    """What a JSON text says, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message(turn: dict, template_roles: Collection[str]) -> dict:
    """One checked message of OpenAI's form; ShareGPT's ``from`` and ``value`` are its role and content."""
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn:
        if "from" not in turn or "value" not in turn:
            raise ConversationError("a turn with neither 'role' nor 'from' and 'value'")
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
            raise ConversationError("bytes that are no UTF-8 text") from error
    if isinstance(content, list):
        return "".join(map(_part_text, content))
    if not isinstance(content, str):
        raise ConversationError(f"a message whose content is not text but {type(content).__name__}")
    return content


def _plain_text(value: object, name: str) -> str:
    """A text to be joined with another one."""
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
    """Without the nulls that Arrow gives an object whose keys are other rows' alone.

    ``feature`` is the value's type in ``datasets``: what is kept as JSON has its own nulls, which stay.
    """
    if getattr(feature, "_type", "") == "Json":
        return value
    if isinstance(value, dict):
        kinds = feature if isinstance(feature, dict) else {}
        return {key: without_nulls(entry, kinds.get(key)) for key, entry in value.items() if entry is not None}
    kind = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [without_nulls(entry, kind) for entry in value] if isinstance(value, list) else value


def _call_turn(turn: dict) -> dict:
    """ShareGPT's ``function_call``, whose value is the call as JSON text, as an assistant's turn."""
    return {"role": "assistant", "tool_calls": [_to_call(turn.get("content"))]}


def _with_calls(turn: dict, template_words: Collection[str]) -> dict:
    """OpenAI's older ``function_call`` as ``tool_calls``, where the template does not read it itself."""
    call = turn.get("function_call")
    if call is None or "function_call" in template_words:
        return turn
    if turn.get("tool_calls"):
        raise ConversationError("a turn with tool_calls and a function_call")
    others = {key: value for key, value in turn.items() if key != "function_call"}
    return {**others, "tool_calls": [_to_call(call)]}


def _to_call(value: object) -> dict:
    """A call with its name and arguments, or JSON text of one, as ``tool_calls`` have it."""
    call = _parsed(value) if isinstance(value, str) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ConversationError("a function_call that is no JSON object with a name")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _with_objects(turn: dict) -> dict:
    """Calls as a list of objects, also where they are JSON text of one, and their arguments as objects, where they are
    JSON text of one, as OpenAI's API gives them."""
    if "tool_calls" not in turn:
        return turn
    calls = turn["tool_calls"]
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConversationError("tool_calls that are no list of objects")
    return {**turn, "tool_calls": [*map(_with_object, calls)]}


def _with_object(call: dict) -> dict:
    """The call, OpenAI's or one with its name and arguments alone, with its arguments as an object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    arguments = _parsed(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _with_json_alone(message: dict, template_words: Collection[str], tell: Callable[[str], None]) -> dict:
    """The message without keys whose values JSON has not, and the template does not read."""
    kept = {}
    for key, value in message.items():
        if key in SPOKEN or _is_json(value):
            kept[key] = value
        elif key in template_words:
            raise ConversationError(f"a message whose {key!r} is {type(value).__name__}, which JSON has not")
        else:
            kind = type(value).__name__
            tell(f"Messages are stored without {key!r}: JSON has no {kind}, and the template does not read it")
    return kept


def _is_json(value: object) -> bool:
    """Whether JSON has all types in a value; a number that it has not, such as NaN, is another matter."""
    try:
        json.dumps(value)
    except (TypeError, RecursionError):
        return False
    except ValueError:
        return True
    return True


def _plain(message: dict) -> dict:
    """The message as JSON gives it back, so that what is rendered now is what can be rendered from the stored row."""
    try:
        text = json.dumps(message, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
        return json.loads(text)
    except UnicodeEncodeError as error:
        raise ConversationError("a text with half of a surrogate pair") from error
    except ValueError as error:
        raise ConversationError("a message with a number that JSON has not") from error
