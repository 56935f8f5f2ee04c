"""Chat templates: their texts, and a conversation's text with the character spans of the assistant's turns.

A template with generation blocks, ``{% generation %} … {% endgeneration %}``, gives the spans itself. The stock
templates of most models have none. Then a template in ``templates/`` that renders the same is used instead
(template_choice.py), or the spans come from rendering the conversation's prefixes.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from chat_logits.data.render_process import OverLimit, render_process
from chat_logits.data.rendering import compile_text, render, text_by_transformers
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.paths import is_there

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL, _IN_CLONE = _PACKAGE / "templates", _PACKAGE.parent / "templates"
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CLONE
RESERVED_KWARGS = {
    *("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"),
    "return_assistant_tokens_mask",
}

THREE_WAYS = (
    "Three ways out: a shipped template that fits the model's family (--chat_template NAME, from docs/templates.md); "
    "your own copy of the model's template with {% generation %} … {% endgeneration %} around each answer and its "
    "end-of-turn token; or other data, if only some conversations cause this."
)


class TemplateError(ToolkitError):
    """A conversation that the template cannot render; the run skips it and counts the message as the reason."""


class TemplateLimit(TemplateError):
    """A template that exceeds the limits on time or memory for rendering a conversation."""


class PrefixError(TemplateError):
    """A conversation whose prefixes do not render to prefixes of each other, so that spans cannot be derived."""

    exit_status = 2


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text with its fixed inputs: variables, the date, the tokenizer's special tokens.

    ``tools_text`` is a separate text for conversations with tools, None if it is the same. With ``apart``, an untrusted
    template (such as a downloaded dataset's) is rendered in a separate process with limits.
    """

    text: str
    special_tokens: dict[str, str]
    kwargs: dict
    date: str | None = None
    tools_text: str | None = None
    apart: bool = False

    def with_tools(self, tools: list[dict] | None) -> "ChatTemplate":
        """The template for a conversation with these tools of its own; the same template for None."""
        if tools is None:
            return self
        return replace(self, text=self.tools_text or self.text, kwargs={**self.kwargs, "tools": tools}, tools_text=None)

    @property
    def has_generation_blocks(self) -> bool:
        return GENERATION_BLOCK.search(self.text) is not None

    def render(self, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the character spans of the assistant's turns, in order.

        Raises TemplateError if the template refuses the conversation, and PrefixError if the template has no
        generation blocks and the conversation's prefixes do not nest.
        """
        text, spans = self.rendered(conversation)
        return (text, spans) if self.has_generation_blocks else (text, self._prefix_spans(conversation, text))

    def render_all(self, talks: Sequence[tuple[list[dict], list[dict] | None]]) -> list[tuple[str, list]]:
        """``render`` of several conversations, each with its tools or None; with ``apart``, those without tools are
        rendered together.

        Raises as ``render`` for the conversation that is wrong.
        """
        plain = [conversation for conversation, tools in talks if tools is None]
        together = None
        if self.apart and self.has_generation_blocks and len(plain) > 1:
            variables = {**self.special_tokens, **self.kwargs}
            together = render_process().render_together(self.text, plain, variables, self.date)
        rendered = iter(together or [self.render(conversation) for conversation in plain])
        return [
            next(rendered) if tools is None else self.with_tools(tools).render(conversation)
            for conversation, tools in talks
        ]

    def text_or_none(self, conversation: list[dict], **options) -> str | None:
        """Only the text, None if the template refuses the conversation."""
        try:
            return self.rendered(conversation, **options)[0]
        except TemplateError:
            return None

    def text_by_transformers(self, conversation: list[dict]) -> str | None:
        """The text as transformers renders it, None if it refuses the conversation."""
        try:
            return text_by_transformers(self.text, conversation, {**self.special_tokens, **self.kwargs}, self.date)
        except Exception:  # a template is a program: it may raise anything
            return None

    def rendered(self, conversation: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        """As ``render``, with further variables for the template; without generation blocks, the spans are empty."""
        renders = render_process().render if self.apart else render
        try:
            return renders(self.text, conversation, {**self.special_tokens, **self.kwargs, **options}, self.date)
        except OverLimit as error:
            raise TemplateLimit(f"the chat template exceeds its limits: {error}") from error
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateError(f"the chat template refuses it: {error}") from error

    def _prefix_spans(self, conversation: list[dict], whole: str) -> list[tuple[int, int]]:
        """The span of each turn: from the end of its generation prompt to the end of the conversation up to it."""
        spans, before = [], ""
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            prompt, _ = self.rendered(conversation[:i], add_generation_prompt=True)
            turn = whole if i + 1 == len(conversation) else self.rendered(conversation[: i + 1])[0]
            _check_nesting(before, prompt)
            _check_nesting(prompt, turn)
            answer, content = turn[len(prompt) :], (message.get("content") or "").strip()
            # Without a generation prompt, only the answer's own text can show that no header precedes it.
            if not _begins_with(answer, content) and prompt == self.rendered(conversation[:i])[0]:
                _refuse_header(answer, content)
            spans.append((len(prompt), len(turn)))
            before = turn
        _check_nesting(before, whole)
        return spans


def _check_nesting(shorter: str, longer: str) -> None:
    if longer.startswith(shorter):
        return
    at = next(i for i, (a, b) in enumerate(zip(shorter + "\0", longer + "\0", strict=False)) if a != b)
    inside, alone = longer[at : at + 20], shorter[at : at + 20]
    raise PrefixError(
        "the chat template has no {% generation %} blocks, and a prefix of the conversation renders differently alone "
        f"than inside the whole: after {longer[max(0, at - 20) : at]!r} it has {alone!r} alone and {inside!r} inside "
        f"the whole.\n{THREE_WAYS}"
    )


def _begins_with(answer: str, content: str) -> bool:
    """Whether a rendered answer visibly begins with the message's own words."""
    return bool(content) and answer.lstrip().startswith(content[:20])


def _refuse_header(answer: str, content: str) -> None:
    if not content:
        raise TemplateError(
            "an empty answer, and a chat template without generation prompt: it is not known where it begins"
        )
    raise PrefixError(
        "the chat template has no {% generation %} blocks and no generation prompt, so the header of "
        f"{answer[:30]!r} cannot be told from the answer.\n{THREE_WAYS}"
    )


# --- a template's text ---


def template_text(argument: str | None, tokenizer, has_tools: bool = False) -> str:
    """The text of ``argument`` (a path, a template, or the name of one of the tokenizer's), or the tokenizer's own
    template if it is None.

    If the tokenizer has several, the one named "tool_use" is taken for conversations with tools, else "default", as
    transformers does. Raises UsageError for a template that is missing.
    """
    template = getattr(tokenizer, "chat_template", None)  # a FileTokenizer has none
    if argument is not None:
        return template[argument] if isinstance(template, dict) and argument in template else read_template(argument)
    if template is None:
        raise UsageError(
            "the tokenizer has no chat template: is this a base model? Expected a chat model, or `chat_template` with "
            "the template that the model was trained with."
        )
    if not isinstance(template, dict):
        return template
    wanted = [name for name in (("tool_use",) * has_tools + ("default",)) if name in template]
    if not wanted:
        raise UsageError(
            f"the tokenizer has several chat templates, and none is named default: {', '.join(sorted(template))}. "
            "Choose one by its name: `chat_template`."
        )
    return template[wanted[0]]


def portable_template(argument: str | None) -> str | None:
    """``argument`` in a form for other machines: a path or a shipped template's name is replaced by the file's text."""
    if argument is None or _is_template(argument):
        return argument
    return read_template(argument) if _file_of(argument) else argument


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def _file_of(argument: str) -> Path | None:
    """The file of a template: the one at this path, else the shipped one with this name, with or without ``.jinja``."""
    path, name = Path(argument).expanduser(), argument.removesuffix(".jinja")
    if is_there(path) and path.is_file():
        return path
    return SHIPPED / f"{name}.jinja" if name in _shipped_names() else None


def _is_template(argument: str) -> bool:
    return "{%" in argument or "{{" in argument


def read_template(argument: str) -> str:
    """The text of ``argument``: a path, a template, or a shipped one's name. Raises UsageError for anything else."""
    if _is_template(argument):
        return argument
    path = _file_of(argument)
    if path is None:
        near = difflib.get_close_matches(Path(argument).name.removesuffix(".jinja"), _shipped_names())
        raise UsageError(
            f"`chat_template` {argument:.255}: no such file, and not a template's text ({{% … %}}) either"
            + (f". Shipped templates with names like it: {', '.join(near)}" if near else "")
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"`chat_template` {argument}: expected UTF-8 text ({error})") from error


def compile_template(text: str):
    """The template compiled in Jinja's sandbox. Raises UsageError if it does not parse."""
    try:
        return compile_text(text)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"chat template, line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise UsageError("chat template: its expressions or blocks are nested too deep to be read") from error
