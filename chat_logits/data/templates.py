"""Chat templates: which one is used, and a conversation's text with the character spans of the assistant's turns.

A template tells the spans itself where it has generation blocks, ``{% generation %} … {% endgeneration %}``. The
stock templates of most models have none; then a template of ``templates/`` that renders the same takes its place, or
the spans come from rendering the conversation's prefixes.
"""

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from chat_logits.data.probes import PROBES, TOOL_PROBE
from chat_logits.data.render_process import OverLimit, render_process
from chat_logits.data.rendering import compile_text, render, text_by_transformers
from chat_logits.errors import ToolkitError, UsageError

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL, _IN_CLONE = _PACKAGE / "templates", _PACKAGE.parent / "templates"
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CLONE
RESERVED_KWARGS = {
    *("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"),
    "return_assistant_tokens_mask",
}

THREE_WAYS = (
    "Three ways out: a template of templates/ that fits the model's family (--chat_template templates/NAME.jinja); "
    "your own copy of the model's template with {% generation %} … {% endgeneration %} around each answer and its "
    "end-of-turn token; or other data, if only some conversations are at fault."
)


class TemplateError(ToolkitError):
    """A conversation that the template cannot render; the run skips it and counts the message as the reason."""


class TemplateLimit(TemplateError):
    """A template that takes more time or memory than rendering a conversation takes."""


class PrefixError(TemplateError):
    """A conversation whose prefixes do not render to prefixes of one another, so that spans cannot be derived."""

    exit_status = 2


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text with what is fixed when it renders: variables, the date, the tokenizer's special tokens.

    ``tools_text`` is another text for conversations with tools, None where it is the same.
    One that nobody here has chosen, as a downloaded dataset's, renders ``apart``: in a process with limits.
    """

    text: str
    special_tokens: dict[str, str]
    kwargs: dict
    date: str | None = None
    tools_text: str | None = None
    apart: bool = False

    def with_tools(self, tools: list[dict] | None) -> "ChatTemplate":
        """The template for a conversation with these tools of its own, itself for one without."""
        if tools is None:
            return self
        return replace(self, text=self.tools_text or self.text, kwargs={**self.kwargs, "tools": tools}, tools_text=None)

    @property
    def has_generation_blocks(self) -> bool:
        return GENERATION_BLOCK.search(self.text) is not None

    def render(self, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the character spans of the assistant's turns, in order.

        Raises TemplateError where the template refuses the conversation, and PrefixError where it has no
        generation blocks and its prefixes do not nest.
        """
        text, spans = self._render(conversation)
        return (text, spans) if self.has_generation_blocks else (text, self._prefix_spans(conversation, text))

    def render_all(self, talks: Sequence[tuple[list[dict], list[dict] | None]]) -> list[tuple[str, list]]:
        """``render`` of several conversations, each with its tools or None; those without, together where it is apart.

        Raises as ``render`` for one that is at fault.
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
        """The text alone, None where the template refuses the conversation."""
        try:
            return self._render(conversation, **options)[0]
        except TemplateError:
            return None

    def text_by_transformers(self, conversation: list[dict]) -> str | None:
        """The text as transformers renders it, None where it refuses the conversation."""
        try:
            return text_by_transformers(self.text, conversation, {**self.special_tokens, **self.kwargs}, self.date)
        except Exception:  # a template is a program: it may raise anything
            return None

    def _render(self, conversation: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        renders = render_process().render if self.apart else render
        try:
            return renders(self.text, conversation, {**self.special_tokens, **self.kwargs, **options}, self.date)
        except OverLimit as error:
            raise TemplateLimit(f"the chat template goes beyond what a template is given: {error}") from error
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateError(f"the chat template refuses it: {error}") from error

    def _prefix_spans(self, conversation: list[dict], whole: str) -> list[tuple[int, int]]:
        """Each turn from the end of its generation prompt to the end of the conversation up to it."""
        spans, before = [], ""
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(conversation[:i], add_generation_prompt=True)
            turn = whole if i + 1 == len(conversation) else self._render(conversation[: i + 1])[0]
            _check_nesting(before, prompt)
            _check_nesting(prompt, turn)
            answer, content = turn[len(prompt) :], (message.get("content") or "").strip()
            # Only without a generation prompt must the answer itself tell that the turn has no header in front.
            if not _begins_with(answer, content) and prompt == self._render(conversation[:i])[0]:
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
        "the chat template marks no answers, and a conversation's prefix renders otherwise alone: after "
        f"{longer[max(0, at - 20) : at]!r} it has {alone!r} alone and {inside!r} in the whole.\n{THREE_WAYS}"
    )


def _begins_with(answer: str, content: str) -> bool:
    """Whether a rendered answer visibly begins with the message's own words."""
    return bool(content) and answer.lstrip().startswith(content[:20])


def _refuse_header(answer: str, content: str) -> None:
    if not content:
        raise TemplateError(
            "an empty answer, and a chat template without generation prompt: no telling where it begins"
        )
    raise PrefixError(
        f"the chat template marks no answers and has no generation prompt, so the header of {answer[:30]!r} cannot "
        f"be told from the answer.\n{THREE_WAYS}"
    )


# --- choosing ---


@dataclass(frozen=True)
class TemplateChoice:
    """The template that renders, in words where its spans come from, and the one it stands in for, if any."""

    template: ChatTemplate
    mask_source: str
    own: ChatTemplate | None = None

    def render(self, conversation: list[dict], tools: list[dict] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """As ``ChatTemplate.render``, proven by transformers' rendering: of the model's own, where a shipped one stands
        for it. ``tools`` are the conversation's.

        Raises TemplateError, also where the two texts differ.
        """
        text, spans = self.template.with_tools(tools).render(conversation)
        if (self.own or self.template).with_tools(tools).text_by_transformers(conversation) != text:
            other = "the model's own template" if self.own else "transformers does"
            raise TemplateError(f"the {self.mask_source} renders it otherwise than {other}")
        return text, spans


def choose_template(
    argument: str | None,
    tokenizer,
    kwargs: dict,
    date: str | None,
    conversations: list[list[dict]],
    tools: Sequence[list[dict] | None] = (),
) -> TemplateChoice:
    """The template to use: ``argument`` (a path, the template's text, or the name of one of the tokenizer's), or None
    for the tokenizer's own, and for conversations with tools that for tools, if there is one.

    ``tools`` are those of each of the ``conversations``, or nothing. One without generation blocks is replaced by the
    shipped template that renders the same, over ``PROBES`` and over ``conversations``; else its spans are derived from
    prefixes. So is a model's own that has them, as some (SmolLM3's) take the header in.
    Raises UsageError for a template that is missing or does not parse.
    """
    text = template_text(argument, tokenizer, kwargs.get("tools") is not None)
    for_tools = template_text(argument, tokenizer, has_tools=True)
    date = date or (datetime.date.today().isoformat() if "strftime_now" in text + for_tools else None)
    template = ChatTemplate(text, tokenizer.special_tokens_map, kwargs, date)
    pairs = list(itertools.zip_longest(conversations, tools))
    if for_tools == text:
        return _choose_text(template, argument, pairs)
    plain = _choose_text(template, argument, [pair for pair in pairs if not pair[1]])
    calling = _choose_text(replace(template, text=for_tools), argument, [pair for pair in pairs if pair[1]])
    sources = f"{plain.mask_source}; with tools, {calling.mask_source}"
    return TemplateChoice(
        template=replace(plain.template, tools_text=calling.template.text),
        mask_source=plain.mask_source if plain.mask_source == calling.mask_source else sources,
        own=replace(template, tools_text=for_tools),
    )


def _choose_text(template: ChatTemplate, argument: str | None, conversations: list[tuple]) -> TemplateChoice:
    """The choice for one text; ``conversations`` are pairs of messages and tools."""
    _refuse_bomb(template, conversations)
    compile_template(template.text)
    if argument is not None and template.has_generation_blocks:
        return TemplateChoice(template, "generation blocks of --chat_template")
    own_texts: dict[tuple[int, bool], str | None] = {}
    for path in sorted(SHIPPED.glob("*.jinja")):
        shipped = replace(template, text=path.read_text(encoding="utf-8"))
        if _render_alike(template, shipped, conversations, own_texts):
            return TemplateChoice(shipped, f"shipped template {path.name}", own=template)
    if template.has_generation_blocks:
        return TemplateChoice(template, "generation blocks of the model's own template")
    return TemplateChoice(template, "prefixes of each conversation")


def _refuse_bomb(template: ChatTemplate, conversations: list[tuple]) -> None:
    """Render the first conversations where time and memory are limited, before the template is trusted here.

    Raises UsageError where it takes more; what else it raises is for the run to see.
    """
    limited, probes = replace(template, apart=True), [(probe, None) for probe in (*PROBES, TOOL_PROBE)]
    for conversation, tools in (*probes, *conversations):
        try:
            limited.with_tools(tools)._render(conversation)
        except TemplateLimit as error:
            raise UsageError(str(error)) from error
        except TemplateError:
            continue


def template_text(argument: str | None, tokenizer, has_tools: bool = False) -> str:
    """The text of ``argument`` (a path, a template, or the name of one of the tokenizer's), or the tokenizer's own
    template where there is none.

    Of several, transformers takes the one named "tool_use" for conversations with tools, else "default". Raises
    UsageError for a template that is missing.
    """
    template = getattr(tokenizer, "chat_template", None)  # one that was read from its files alone has none
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


def _render_alike(
    template: ChatTemplate,
    shipped: ChatTemplate,
    conversations: list[tuple[list[dict], list[dict] | None]],
    own_texts: dict[tuple[int, bool], str | None],
) -> bool:
    """Whether both give the same texts. ``own_texts`` keeps the first one's, for the next that it is compared with.

    A shipped template may refuse tools, though the family's own renders or drops them.
    """
    is_shown = False
    for i, (conversation, tools) in enumerate(_compared(template, conversations)):
        own_one, our_one = (_with_tools_alone(one, tools) for one in (template, shipped))
        for prompt in (False, True):
            if (i, prompt) not in own_texts:
                own_texts[i, prompt] = own_one.text_or_none(conversation, add_generation_prompt=prompt)
            own, ours = own_texts[i, prompt], our_one.text_or_none(conversation, add_generation_prompt=prompt)
            if own != ours and not (ours is None and _has_tools(conversation, tools)):
                return False
            is_shown |= ours is not None
    return is_shown


def _compared(template: ChatTemplate, conversations: list[tuple]) -> list[tuple[list[dict], list[dict] | None]]:
    """What tells templates apart, with tools: the probes without any, and whatever is there of those that have some."""
    tools_of_all = template.kwargs.get("tools")
    probes = [(probe, None) for probe in (*PROBES, TOOL_PROBE)]
    given = [(conversation, tools or tools_of_all) for conversation, tools in conversations]
    return [*probes, (PROBES[0], tools_of_all), *given]


def _with_tools_alone(template: ChatTemplate, tools: list[dict] | None) -> ChatTemplate:
    """The template with these tools in the place of those that all conversations have."""
    kwargs = {name: value for name, value in template.kwargs.items() if name != "tools"}
    return replace(template, kwargs=kwargs).with_tools(tools)


def _has_tools(conversation: list[dict], tools: list[dict] | None) -> bool:
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in conversation)


def portable_template(argument: str | None) -> str | None:
    """``argument`` as it holds on other machines: in the place of a path, the file's text."""
    is_path = argument is not None and not _is_template(argument) and Path(argument).expanduser().is_file()
    return read_template(argument) if argument is not None and is_path else argument


def _is_template(argument: str) -> bool:
    return "{%" in argument or "{{" in argument


def read_template(argument: str) -> str:
    """The text of ``argument``, a path or a template. Raises UsageError for a path that does not exist."""
    if _is_template(argument):
        return argument
    path = Path(argument).expanduser()
    if not path.is_file():
        raise UsageError(f"`chat_template` {argument}: no such file, and no template text ({{% … %}}) either")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"`chat_template` {argument}: expected UTF-8 text ({error})") from error


def compile_template(text: str):
    """The template compiled in Jinja's sandbox. Raises UsageError where it does not parse."""
    try:
        return compile_text(text)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"chat template, line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise UsageError("chat template: its expressions or blocks are nested too deep to be read") from error
