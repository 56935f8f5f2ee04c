"""Rendering in a process of its own: the same texts and spans as here, and an end to what takes too much."""

import os
import signal

import pytest
from conftest import REPO

from chat_logits.data.probes import PROBES
from chat_logits.data.render_process import OverLimit, RefusedRendering, RenderProcess
from chat_logits.data.rendering import render
from chat_logits.data.template_choice import choose_template
from chat_logits.data.templates import ChatTemplate, TemplateLimit
from chat_logits.errors import UsageError

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "memory": "{{ 'a' * 10**10 }}",
    "memory by the data": "{{ messages[0].content * 10**10 }}",
    "time": NESTED,
    "time within one instruction": "{{ 9 ** (9 ** 10) }}",
    "text": "{% for i in range(100) %}{{ 'a' * 10**6 }}{% endfor %}",
}
CONVERSATION = [{"role": "user", "content": "Hi 🙂 \ud83d"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="module")
def process():
    process = RenderProcess()
    yield process
    process.close()


@pytest.mark.parametrize("path", sorted(REPO.glob("templates/*.jinja")), ids=lambda path: path.stem)
def test_texts_and_spans_are_those_of_rendering_here(process, path):
    text, date = path.read_text(encoding="utf-8"), "2024-02-29"
    for conversation in (CONVERSATION, *PROBES):
        try:
            expected = render(text, conversation, {"bos_token": "<s>"}, date)
        except Exception as error:
            with pytest.raises(RefusedRendering) as refused:
                process.render(text, conversation, {"bos_token": "<s>"}, date)
            assert str(refused.value) == str(error)[:300]
        else:
            assert process.render(text, conversation, {"bos_token": "<s>"}, date) == expected


@pytest.mark.parametrize("family", ["llama3_1", "qwen3", "smollm2"])
def test_conversations_rendered_together_are_as_one_by_one(process, family):
    text = (REPO / f"templates/{family}.jinja").read_text(encoding="utf-8")
    asked = [text, {"bos_token": "<s>"}, "2024-02-29"]
    conversations = [CONVERSATION, *PROBES[:5], CONVERSATION]
    expected = [render(text, conversation, *asked[1:]) for conversation in conversations]
    assert process.render_together(text, conversations, *asked[1:]) == expected


def test_none_is_rendered_where_one_of_several_is_at_fault(process):
    bomb = "{% if messages[0].content == 'now' %}" + NESTED + "{% endif %}{{ messages[0].content }}"
    refused = "{% if messages[0].content == 'now' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    calm, fault = [[{"role": "user", "content": word}] for word in ("then", "now")]
    for text in (bomb, refused):
        assert process.render_together(text, [calm, fault, calm], {}) is None
        assert process.render_together(text, [calm, calm], {}) == [("then", [])] * 2


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_takes_too_much_is_ended_and_the_next_one_renders(process, bomb):
    with pytest.raises(OverLimit, match=r"more than 5 s of computing|of memory|a text of 100,000,000 characters"):
        process.render(BOMBS[bomb], CONVERSATION, {})
    assert process.render("{{ messages[1].content }}", CONVERSATION, {}) == ("Hello.", [])


def test_a_template_that_calls_itself_is_refused_in_words(process):
    with pytest.raises(RefusedRendering, match="recursion"):
        process.render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CONVERSATION, {})


def test_a_process_that_was_ended_is_replaced(process):
    process.render("{{ 1 }}", CONVERSATION, {})
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(OverLimit):
        process.render("{{ 1 }}", CONVERSATION, {})
    assert process.render("{{ 1 }}", CONVERSATION, {})[0] == "1"


def test_a_model_whose_template_takes_too_much_is_refused_before_it_renders_here():
    class Tokenizer:
        special_tokens_map: dict = {}  # noqa: RUF012
        chat_template = "{% if messages|length == 7 %}" + NESTED + "{% endif %}{{ messages[0].content }}"

    assert choose_template(None, Tokenizer, {}, None, [CONVERSATION]).mask_source == "prefixes of each conversation"
    with pytest.raises(UsageError, match="the chat template exceeds its limits: it took more than 5"):
        choose_template(None, Tokenizer, {}, None, [CONVERSATION, [CONVERSATION[0]] * 7])


def test_what_is_over_a_limit_has_a_name_of_its_own():
    template = ChatTemplate(BOMBS["memory"], {}, {}, apart=True)
    with pytest.raises(TemplateLimit, match="it took more than 1,024 MiB of memory"):
        template.render(CONVERSATION)
