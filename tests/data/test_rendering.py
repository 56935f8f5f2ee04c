"""Templates rendered by Jinja alone, held against transformers' own rendering: text, spans, and what is refused."""

import subprocess
import sys

import pytest
from template_families import CONVERSATIONS, FAMILIES
from test_templates import ours_text, stock
from transformers.utils.chat_template_utils import render_jinja_template

from chat_logits.data.rendering import render, text_by_transformers

QUESTION, ANSWER = (
    {"role": "user", "content": "Hi <b> 🙂"},
    {"role": "assistant", "content": " Hello.\n", "n": [1, 2.5]},
)
BLOCK = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
SMALL = {
    "two blocks": f"ab{BLOCK}c{BLOCK}d",
    "a block in a macro": f"{{% macro turn() %}}x{BLOCK}{{% endmacro %}}ab{{{{ turn() }}}}{{{{ turn() }}}}",
    "a block in a loop": "{% for m in messages %}-{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "a block in a set block": f"ab{{% set x %}}{BLOCK}{{% endset %}}{{{{ x | trim }}}}",
    "an empty block": "a{% generation %}{% endgeneration %}b",
    "white space": "  {% if true %}\n  x\n  {% endif %}\n\n{%- generation -%}\n y \n{%- endgeneration %}\n",
    "break and continue": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages[1] | tojson(indent=2, sort_keys=True) }} {{ 'é<' | tojson(True) }}",
    "namespaces": "{% set ns = namespace(self=1, a=2) %}{% set ns.a = 3 %}{{ ns.self }}{{ ns.a }}{{ ns.b }}",
    "dicts": "{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 3) }}{{ {'a': 1}.items() | list }}",
    "absent values": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing is defined }}",
    "thoughts": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ messages[3].reasoning_content }}",
    "a refusal": "{{ raise_exception('no') }}",
    "a missing attribute": "{{ messages[0].a.b }}",
    "a class": "{{ ().__class__.__bases__ }}",
    "a private name in a namespace": "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "a private name in a new namespace": "{% set ns = namespace(__call__=1) %}",
    "a change of a message": "{{ messages.append(1) }}",
    "a change of a dict": "{{ messages[0].update(a=1) }}",
    "an unsafe format": "{{ '{0.__class__}'.format(1) }}",
    "no string": "{{ 1 + messages }}",
    "an object": "{{ messages[4].content }}",
}
REFUSED = ("a refusal", "a missing attribute", "a class", "a private name", "a change", "no string")
MESSAGES = [
    QUESTION,
    ANSWER,
    {"role": "assistant", "content": "", "thinking": "Hm"},
    {"role": "assistant", "content": "", "reasoning": "Ha"},
    {"role": "user", "content": object},
]


def theirs(text: str, messages: list[dict], variables: dict):
    """Text and spans as transformers has them, None where it refuses."""
    try:
        texts, spans = render_jinja_template(
            [messages], chat_template=text, return_assistant_tokens_mask=True, **variables
        )
    except Exception:
        return None
    return texts[0], spans[0]


def ours(text: str, messages: list[dict], variables: dict):
    try:
        return render(text, messages, variables)
    except Exception:
        return None


@pytest.mark.parametrize("name", SMALL)
def test_each_part_of_the_language_is_transformers(name):
    expected = theirs(SMALL[name], MESSAGES, {"bos_token": "<s>"})
    assert ours(SMALL[name], MESSAGES, {"bos_token": "<s>"}) == expected
    assert (expected is None) == any(part in name for part in REFUSED)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_template_renders_as_in_transformers(family):
    known = FAMILIES[family]
    tokens = {"bos_token": known.bos, "eos_token": known.eos}
    rendered = 0
    for text in (ours_text(family), stock(known.source)):
        for chat in CONVERSATIONS.values():
            for prompt in (False, True):
                variables = {**tokens, **chat.kwargs, "add_generation_prompt": prompt}
                expected = theirs(text, chat.messages, variables)
                found = ours(text, chat.messages, variables)
                assert found == expected or found == theirs(text, chat.messages, variables)  # after midnight
                rendered += expected is not None
    assert rendered > len(CONVERSATIONS)


def test_tools_are_objects():
    for tools in (["find"], [print]):
        with pytest.raises(TypeError, match="tools has entries that are not JSON objects"):
            render("x", [QUESTION], {"tools": tools})


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from chat_logits.data.templates import ChatTemplate; "
        "ChatTemplate('{% generation %}x{% endgeneration %}', {}, {}).render([]); "
        "print({'transformers', 'torch', 'pandas', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_is_transformers_text_with_the_date_pinned(family):
    known = FAMILIES[family]
    tokens = {"bos_token": known.bos, "eos_token": known.eos}
    text = stock(known.source)
    for chat in CONVERSATIONS.values():
        expected = theirs(text, chat.messages, {**tokens, **chat.kwargs})
        if expected is not None and "strftime_now" not in text:
            assert text_by_transformers(text, chat.messages, {**tokens, **chat.kwargs}) == expected[0]
    dated = "{{ strftime_now('%d %b %Y') }}" + text
    shown = text_by_transformers(dated, CONVERSATIONS[next(iter(CONVERSATIONS))].messages, tokens, "2020-02-29")
    assert shown.startswith("29 Feb 2020")
