"""The choice of the chat template: the one given, the model's own, or a shipped one that renders the same."""

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chat_logits.data.probes import PROBES, TOOL_PROBE
from chat_logits.data.templates import (
    SHIPPED,
    ChatTemplate,
    TemplateError,
    TemplateLimit,
    compile_template,
    template_text,
)
from chat_logits.errors import UsageError


@dataclass(frozen=True)
class TemplateChoice:
    """The template that renders, a description of where its spans come from, and the one it replaces, if any."""

    template: ChatTemplate
    mask_source: str
    own: ChatTemplate | None = None

    def render(self, conversation: list[dict], tools: list[dict] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """As ``ChatTemplate.render``, compared with transformers' rendering (of the model's own template, if a shipped
        one replaces it). ``tools`` are the conversation's.

        Raises TemplateError, also if the two texts differ.
        """
        text, spans = self.template.with_tools(tools).render(conversation)
        if (self.own or self.template).with_tools(tools).text_by_transformers(conversation) != text:
            other = "the model's own template" if self.own else "transformers does"
            raise TemplateError(f"the {self.mask_source} renders it differently than {other}")
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
    for the tokenizer's own; conversations with tools use the tokenizer's template for tools, if there is one.

    ``tools`` has the tools of each of the ``conversations``, or is empty. A template without generation blocks is
    replaced by the shipped template that renders ``PROBES`` and ``conversations`` alike; if there is none, its spans
    are derived from prefixes. A model's own template is replaced even if it has generation blocks, as the blocks of
    some (SmolLM3's) include the header. Raises UsageError for a template that is missing or does not parse.
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
    """Render the first conversations with limits on time and memory, before the template is run in this process.

    Raises UsageError if it exceeds them; other errors of the template are left to the run.
    """
    limited, probes = replace(template, apart=True), [(probe, None) for probe in (*PROBES, TOOL_PROBE)]
    for conversation, tools in (*probes, *conversations):
        try:
            limited.with_tools(tools).rendered(conversation)
        except TemplateLimit as error:
            raise UsageError(str(error)) from error
        except TemplateError:
            continue


def _render_alike(
    template: ChatTemplate,
    shipped: ChatTemplate,
    conversations: list[tuple[list[dict], list[dict] | None]],
    own_texts: dict[tuple[int, bool], str | None],
) -> bool:
    """Whether both give the same texts. ``own_texts`` caches those of ``template`` for the next comparison.

    A shipped template may refuse tools, although the family's own renders or drops them.
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
    """Conversations to compare templates on, each with its tools: the probes without tools, one with those given to
    all conversations, and the given conversations."""
    tools_of_all = template.kwargs.get("tools")
    probes = [(probe, None) for probe in (*PROBES, TOOL_PROBE)]
    given = [(conversation, tools or tools_of_all) for conversation, tools in conversations]
    return [*probes, (PROBES[0], tools_of_all), *given]


def _with_tools_alone(template: ChatTemplate, tools: list[dict] | None) -> ChatTemplate:
    """The template with these tools instead of those given to all conversations."""
    kwargs = {name: value for name, value in template.kwargs.items() if name != "tools"}
    return replace(template, kwargs=kwargs).with_tools(tools)


def _has_tools(conversation: list[dict], tools: list[dict] | None) -> bool:
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in conversation)
