"""Turns of which the template shows something, as they stand or changed, and turns of which it shows nothing."""

import jinja2
import pytest
from conftest import MODEL

from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.roles import ALL, NOTHING, PART, shown_of_role
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError
from chat_logits.model.limits import InputLimits

TALK = [{"role": "user", "content": " Go to Oxford, x? "}, {"role": "assistant", "content": "No, to Oslo."}]
SYSTEM = {"role": "system", "content": "Oslo"}  # which the answer says as well
RENDERED = (
    "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{}{{{{ m.content }}}}{}"
    "{{% elif m.role == '{}' %}}<{{{{ {} }}}}>{{% else %}}[{{{{ m.content }}}}]{{% endif %}}{{% endfor %}}"
)
MARKED = ("{% generation %}", "{% endgeneration %}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


def opened(tokenizer, path, template: str):
    config = SourceConfig(dataset_id=str(path), chat_template=template)
    return open_reader(config, tokenizer, InputLimits(49_152, None))


def texts_of(role: str, expression: str, talk: list[dict]) -> tuple[str, str]:
    """A template that shows a role by an expression, and what plain Jinja makes of it without generation blocks."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    plain = environment.from_string(RENDERED.format("", "", role, expression))
    return RENDERED.format(*MARKED, role, expression), plain.render(messages=talk)


CHANGES = [
    *("m.content | upper", "m.content | lower", "m.content | title", "m.content.swapcase()", "m.content | reverse"),
    *("m.content | replace('o', '0')", "m.content | replace('x', '')", "m.content | trim", "m.content[:300]"),
    *("m.content | tojson", "m.content | urlencode", "m.content.split() | join('_')"),
]


@pytest.mark.parametrize("expression", CHANGES)
def test_a_turn_that_the_template_changes_is_shown(tokenizer, chat_file, expression):
    template, expected = texts_of("user", expression, TALK)
    reader = opened(tokenizer, chat_file([{"messages": TALK}]), template)
    (aligned,) = reader.first_ready
    assert aligned.input_ids.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(aligned.input_ids[aligned.positions]) == "No, to Oslo."


DROPS = [
    *("''", "m.role", "'a turn'", "m.content | length", "m.content | wordcount", "m.content is string"),
    *("'something' if m.content else ''", "m.content | truncate(3)", "range(10**5) | random"),
]


@pytest.mark.parametrize("expression", DROPS)
def test_a_turn_that_the_template_drops_or_counts_alone_is_refused(tokenizer, chat_file, expression):
    """Though its words stand in the answer; a number drawn at random is no trace of it."""
    template, _ = texts_of("system", expression, TALK)
    path = chat_file([{"messages": TALK}, {"messages": [SYSTEM, *TALK]}])
    reader = opened(tokenizer, path, template)
    assert [aligned.source_index for aligned in reader.first_ready] == [0]
    (skipped,) = reader.first_skipped
    nothing = "a turn of role 'system', of which the chat template shows nothing"
    at_random = "the generation blocks of --chat_template renders it differently than transformers does"
    assert skipped["reason"] in ((nothing, at_random) if "random" in expression else (nothing,))


PARTS = [
    *("m.content[:3]", "m.content[-2:]", "m.content.split()[0]", "m.content.split()[1:] | join(' ')"),
    *("'early' if m.content < 'C' else 'late'", "m.content[:3] ~ m.content[-3:]"),
]


@pytest.mark.parametrize("expression", PARTS)
def test_a_turn_that_the_template_cuts_is_refused(tokenizer, chat_file, expression):
    template, _ = texts_of("system", expression, TALK)
    reader = opened(tokenizer, chat_file([{"messages": TALK}, {"messages": [SYSTEM, *TALK]}]), template)
    (skipped,) = reader.first_skipped
    assert skipped["reason"] == "a turn of role 'system', of which the chat template shows only a part"


LAST_ALONE = """{% for m in messages %}{% if m.role == 'system' and loop.index > 1 %}{% elif m.role == 'assistant' %}
{% generation %}{{ m.content }}{% endgeneration %}{% else %}<{{ CONTENT }}>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("content", ["m.content", "m.content | upper"])
def test_a_turn_that_is_dropped_at_its_place_is_refused_though_its_role_is_shown(tokenizer, chat_file, content):
    """A system message in the middle, as some families' templates drop it."""
    later = {"role": "system", "content": "Now in rhyme."}
    rows = [{"messages": [SYSTEM, *TALK]}, {"messages": [SYSTEM, *TALK, later, *TALK]}]
    reader = opened(tokenizer, chat_file(rows), LAST_ALONE.replace("CONTENT", content))
    assert [aligned.source_index for aligned in reader.first_ready] == [0]
    (skipped,) = reader.first_skipped
    assert skipped["reason"] == "a turn of role 'system', of which the chat template shows nothing"


def test_a_dataset_all_of_whose_questions_are_dropped_is_refused(tokenizer, chat_file):
    template, _ = texts_of("user", "m.content | length", TALK)
    with pytest.raises(ToolkitError, match="2 × a turn of role 'user', of which the chat template shows nothing"):
        opened(tokenizer, chat_file([{"messages": TALK}] * 2), template)


# Of a single note it refuses to be asked.
PICKY = """{% if messages | selectattr('role', 'equalto', 'note') | list | length == 1 %}
{{ raise_exception('one note is too few') }}{% endif %}{% for m in messages %}{% if m.role == 'note' %}<NOTE>
{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}
{% else %}{{ m.content }}
{% endif %}{% endfor %}"""
# Nor of what it has not seen: the words are then looked up.
STRICT = PICKY.replace("{% for", "{{ raise_exception('x') if messages[0].content.startswith('x') }}{% for", 1)


@pytest.mark.parametrize(
    ("template", "note", "first", "is_shown"),
    [
        (PICKY, "m.content | upper", "Oslo", True),
        (PICKY, "m.content | upper", "xX", True),
        (PICKY, "m.content", "Oslo", True),
        (PICKY, "m.content | length", "Oslo", False),  # the word stands in the answer
        (PICKY, "m.content if loop.index > 1", "Oslo", False),
        (STRICT, "m.content", "Bergen", True),
        (STRICT, "'a note'", "Bergen", False),
    ],
)
def test_a_role_that_cannot_be_asked_alone_is_asked_in_its_conversation(
    tokenizer, chat_file, template, note, first, is_shown
):
    """Each turn by itself: another one's words are no trace of it."""
    template = template.replace("<NOTE>", "<{{ " + note + " }}>")
    notes = [{"role": "note", "content": first}, {"role": "note", "content": "Be brief."}]
    rows = [{"messages": TALK}, {"messages": [*notes, *TALK]}]
    reader = opened(tokenizer, chat_file(rows), template)
    assert [aligned.source_index for aligned in reader.first_ready] == ([0, 1] if is_shown else [0])
    reasons = [entry["reason"] for entry in reader.first_skipped]
    assert reasons == ([] if is_shown else ["a turn of role 'note', of which the chat template shows nothing"])


def test_what_is_asked_of_a_template_that_renders_otherwise_each_time():
    """Its own words are a trace; that two texts differ is none."""
    numbers = iter(range(99))
    assert shown_of_role("user", lambda talk: f"{next(numbers)} {talk[0]['content']}") == ALL
    assert shown_of_role("user", lambda talk: f"{next(numbers)} {talk[0]['content'].upper()}") is None
    assert shown_of_role("user", lambda _: f"{next(numbers)}") is None
    assert shown_of_role("user", lambda talk: talk[0]["content"].upper()) == ALL
    assert shown_of_role("user", lambda talk: talk[0]["content"][4:]) == PART
    assert shown_of_role("user", lambda talk: str(len(talk[0]["content"]))) == NOTHING
    assert shown_of_role("user", lambda _: None) is None
