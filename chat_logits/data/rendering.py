"""Render chat templates as transformers does, but with Jinja only: importing transformers takes a second of CPU time.

Reading stored rows needs nothing else. An extraction compares each conversation's text with transformers' own.

A template is a program from the Hub: it runs in Jinja's immutable sandbox and gets plain values only. The tests compare
each template's text and spans with those of ``transformers.apply_chat_template``.
"""

import datetime
import json
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's thoughts, in order of precedence

# What a rendering has written so far, and the spans of its generation blocks in it.
_written: ContextVar[tuple[list[str], list[tuple[int, int]]]] = ContextVar("written")


class GenerationBlocks(Extension):
    """``{% generation %} … {% endgeneration %}``: writes its content and records the span of it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser) -> nodes.Node:
        """The tag as a call of ``_note`` with the block's text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        pieces, spans = _written.get()
        start = sum(map(len, pieces))
        spans.append((start, start + len(text)))
        return text


class _Namespace(Namespace):
    """A template's namespace, which refuses names that have a special meaning in Python or Jinja."""

    def __init__(*args, **values):  # as Jinja's: a template may have a value named "self"
        self, *mappings = args
        Namespace.__init__(self)
        for name, value in dict(*mappings, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")
        Namespace.__setitem__(self, name, value)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes of HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """The ``dict`` of templates, instead of the class itself."""

    def __call__(self, *args, **values) -> dict:
        return dict(*args, **values)

    def fromkeys(self, keys, value=None) -> dict:
        return dict.fromkeys(keys, value)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment


@lru_cache(maxsize=128)
def compile_text(text: str) -> jinja2.Template:
    """A template ready to render. Raises jinja2.TemplateSyntaxError if it does not parse."""
    return _environment().from_string(text)


def render(
    text: str, conversation: list[dict], variables: dict, date: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and the character spans of the template's generation blocks in it, in order.

    ``variables`` are further values for the template, including ``tools`` and ``documents`` (lists of dicts). ``date``
    (YYYY-MM-DD) is the date for ``strftime_now``, None for the clock's. Raises anything that the template raises.
    """
    for name in ("tools", "documents"):
        if any(not isinstance(entry, dict) for entry in variables.get(name) or ()):
            raise TypeError(f"{name} has entries that are not JSON objects; expected a list of objects")
    defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
    clock = {"strftime_now": datetime.date.fromisoformat(date).strftime} if date else {}
    values = {**clock, **_plain({**defaults, **variables}), "messages": _messages(conversation)}
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    before = _written.set((pieces, spans))
    try:
        for piece in compile_text(text).generate(values):
            pieces.append(piece)
    finally:
        _written.reset(before)
    return "".join(pieces), spans


def text_by_transformers(text: str, conversation: list[dict], variables: dict, date: str | None = None) -> str:
    """The text that transformers renders, as for a served model; arguments are ``render``'s."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    # The library passes no functions to templates, and its strftime_now uses the clock: set it on the compiled one.
    pinned = _compile_jinja_template(text).globals
    pinned.pop("strftime_now", None)
    if date:
        pinned["strftime_now"] = datetime.date.fromisoformat(date).strftime
    return render_jinja_template([conversation], chat_template=text, **variables)[0][0]


def _messages(conversation: list[dict]) -> list[dict]:
    """Plain messages. Thoughts are given under the key that most templates read, and under gpt-oss's ``thinking``."""
    messages = []
    for message in _plain(conversation):
        thoughts = next((message[name] for name in REASONING if message.get(name) is not None), None)
        messages.append(
            message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}
        )
    return messages


def _plain(value):
    """The value in JSON's types; anything else, such as a picture, becomes its type's name, so that templates cannot
    call its methods."""
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or type(value) in (bool, int, float, str) else f"<{type(value).__name__}>"
