"""Chat templates: which one is used, and a conversation's text with the character spans of the assistant's turns.

A template tells the spans itself where it has generation blocks, ``{% generation %} … {% endgeneration %}``. The
stock templates of most models have none; then a template of ``templates/`` that renders the same takes its place, or
the spans come from rendering the conversation's prefixes.
"""

import datetime
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

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

# Conversations that tell the families apart: their renderings decide whether two templates are the same.
_ASK, _ANSWER = {"role": "user", "content": " Hi 🙂\n"}, {"role": "assistant", "content": "\n Hello.\n"}
_THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
_REASONED = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
PROBES = (
    [_ASK, _ANSWER],
    [_ASK],
    [{"role": "system", "content": " Be brief. "}, _ASK, _ANSWER, _ASK, _ANSWER],
    [{"role": "system", "content": ""}, _ASK, _ANSWER],
    [_ASK, _THOUGHT],
    [_ASK, _THOUGHT, _ASK, _THOUGHT, _ASK],
    [_ASK, _REASONED, _ASK, _REASONED],
    [_ASK, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, _ASK, _ANSWER],
)
_CALL = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"near": True, "k": 2}}}
TOOL_PROBE: list[dict] = [
    _ASK,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]  # a shipped template may refuse it

THREE_WAYS = (
    "Three ways out: a template of templates/ that fits the model's family (--chat_template templates/NAME.jinja); "
    "your own copy of the model's template with {% generation %} … {% endgeneration %} around each answer and its "
    "end-of-turn token; or other data, if only some conversations are at fault."
)


class TemplateError(ToolkitError):
    """A conversation that the template cannot render; the run skips it and counts the message as the reason."""


class PrefixError(TemplateError):
    """A conversation whose prefixes do not render to prefixes of one another, so that spans cannot be derived."""

    exit_status = 2


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text with what is fixed when it renders: variables, the date, the tokenizer's special tokens."""

    text: str
    special_tokens: dict[str, str]
    kwargs: dict
    date: str | None = None

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
        try:
            text, spans = render(self.text, conversation, {**self.special_tokens, **self.kwargs, **options}, self.date)
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateError(f"the chat template refuses it: {error}") from error
        return text, spans

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

    def render(self, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """As ``ChatTemplate.render``, proven by transformers' rendering: of the model's own, where a shipped one stands
        for it.

        Raises TemplateError, also where the two texts differ.
        """
        text, spans = self.template.render(conversation)
        if (self.own or self.template).text_by_transformers(conversation) != text:
            other = "the model's own template" if self.own else "transformers does"
            raise TemplateError(f"the {self.mask_source} renders it otherwise than {other}")
        return text, spans


def choose_template(
    argument: str | None, tokenizer, kwargs: dict, date: str | None, conversations: list[list[dict]]
) -> TemplateChoice:
    """The template to use: ``argument`` (a path or the template's text), or None for the tokenizer's own.

    One without generation blocks is replaced by the shipped template that renders the same, over ``PROBES`` and over
    ``conversations``; else its spans are derived from prefixes. So is a model's own that has them, as some (SmolLM3's)
    take the header in. Raises UsageError for a template that is missing or does not parse.
    """
    text = template_text(argument, tokenizer)
    compile_template(text)
    date = date or (datetime.date.today().isoformat() if "strftime_now" in text else None)
    template = ChatTemplate(text, tokenizer.special_tokens_map, kwargs, date)
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


def template_text(argument: str | None, tokenizer) -> str:
    """The text of ``argument`` (a path or a template), or the tokenizer's own template where there is none.

    Raises UsageError for a template that is missing.
    """
    if argument is not None:
        return read_template(argument)
    template = tokenizer.chat_template
    if template is None:
        raise UsageError(
            "the tokenizer has no chat template: is this a base model? Expected a chat model, or `chat_template` with "
            "the template that the model was trained with."
        )
    return template.get("default", next(iter(template.values()))) if isinstance(template, dict) else template


def _render_alike(
    template: ChatTemplate,
    shipped: ChatTemplate,
    conversations: list[list[dict]],
    own_texts: dict[tuple[int, bool], str | None],
) -> bool:
    """Whether both give the same texts. ``own_texts`` keeps the first one's, for the next that it is compared with."""
    for i, conversation in enumerate((*PROBES, TOOL_PROBE, *conversations)):
        for prompt in (False, True):
            if (i, prompt) not in own_texts:
                own_texts[i, prompt] = template.text_or_none(conversation, add_generation_prompt=prompt)
            own, ours = own_texts[i, prompt], shipped.text_or_none(conversation, add_generation_prompt=prompt)
            if own != ours and not (ours is None and _has_tools(conversation, template.kwargs)):
                return False
    return True


def _has_tools(conversation: list[dict], kwargs: dict) -> bool:
    """Whether a shipped template may refuse the conversation, though the family's own renders or drops its tools."""
    return "tools" in kwargs or any(message.get("tool_calls") or message["role"] == "tool" for message in conversation)


def read_template(argument: str) -> str:
    """The text of ``argument``, a path or a template. Raises UsageError for a path that does not exist."""
    if "{%" in argument or "{{" in argument:
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
