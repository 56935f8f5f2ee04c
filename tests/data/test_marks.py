"""Answers marked not to be trained on: which marks are understood, and what is left of a conversation."""

import pytest
from conftest import MODEL, REPO, TEMPLATE

from chat_logits.data.config import SourceConfig
from chat_logits.data.conversations import ConversationError, NothingToExtract
from chat_logits.data.marks import left_out_spans
from chat_logits.data.reader import open_reader
from chat_logits.data.templates import TemplateError
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.model.limits import InputLimits

QWEN = str(REPO / "templates" / "qwen2_5.jinja")
PREFIXES = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Two answers in a row in one block: spans and messages are not one to one.
JOINED = """{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}
{% elif loop.index == 2 %}{% generation %}
{{- m.content }}{{ messages[2].content if messages | length > 2 }}{% endgeneration %}
{% endif %}{% endfor %}"""


def talk(*marks: dict) -> list[dict]:
    turns = []
    for number, mark in enumerate(marks):
        turns.append({"role": "user", "content": f"Question {number}?"})
        turns.append({"role": "assistant", "content": f"Answer {number}.", **mark})
    return turns


OFF = [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}, {"train": 0}, {"loss": False}]
ON = [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"weight": None}, {"other": 0}, {}]


@pytest.mark.parametrize("mark", OFF)
def test_marks_that_leave_a_turn_out(mark):
    assert left_out_spans(talk(mark, {}, mark), [(0, 1), (2, 3), (4, 5)]) == {0, 2}


@pytest.mark.parametrize("mark", ON)
def test_marks_that_leave_it_in(mark):
    assert left_out_spans(talk(mark, {}), []) == frozenset()


def test_marks_on_other_speakers_say_nothing_of_answers():
    assert left_out_spans([{"role": "user", "content": "Hi", "weight": 0, "train": "no"}, *talk({})], []) == frozenset()


@pytest.mark.parametrize(
    ("marks", "error", "reason"),
    [
        ([{"weight": 0.5}, {}], ConversationError, "an answer with weight 0.5, expected 0 or 1, false or true"),
        ([{"train": "no"}, {}], ConversationError, "an answer with train 'no', expected 0 or 1, false or true"),
        ([{"weight": 2}, {}], ConversationError, "an answer with weight 2, expected"),
        ([{"loss": []}, {}], ConversationError, r"an answer with loss \[\], expected"),
        ([{"weight": 0, "train": True}, {}], ConversationError, "marks contradict each other: weight, train"),
        ([{"weight": 0}, {"loss": False}], NothingToExtract, "every answer is marked not to be trained on"),
        ([{"weight": 0}, {}], TemplateError, "the chat template has 1 turns for 2"),
    ],
)
def test_marks_that_are_not_understood_say_why(marks, error, reason):
    with pytest.raises(error, match=reason):
        left_out_spans(talk(*marks), [(0, 1)])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


def first(tokenizer, path, **options):
    reader = open_reader(SourceConfig(dataset_id=str(path), **options), tokenizer, InputLimits(49_152, None))
    extracted = [tokenizer.decode(one.input_ids[one.positions]) for one in reader.first_ready]
    return extracted, [one.alignment.turns_left_out for one in reader.first_ready], reader.first_skipped


@pytest.mark.parametrize("template", [str(TEMPLATE), QWEN, PREFIXES, None])
def test_the_marked_turn_alone_is_left_out(tokenizer, chat_file, template):
    """Wherever the spans come from. What is left is what is left of each answer alone."""
    rows = [talk({}, {"weight": 0}, {"weight": 1}), talk({"train": False}, {}, {}), talk({}, {}, {"loss": False})]
    path = chat_file([{"messages": row} for row in rows])
    extracted, counts, skipped = first(tokenizer, path, chat_template=template)
    assert extracted == ["Answer 0.Answer 2.", "Answer 1.Answer 2.", "Answer 0.Answer 1."]
    assert counts == [1, 1, 1] and not skipped
    everything = first(tokenizer, path, chat_template=template, all_turns=True)
    assert everything == (["Answer 0.Answer 1.Answer 2."] * 3, [0] * 3, [])


def test_conversations_whose_marks_cannot_be_heeded_are_skipped(tokenizer, chat_file):
    rows = [talk({}, {}), talk({"weight": 0.5}, {}), talk({"weight": 0}), talk({"weight": 0}, {})]
    rows[3].pop(2)  # two answers in a row
    template = JOINED
    path = chat_file([{"messages": row} for row in (talk({}), *rows[1:])])
    extracted, _, skipped = first(tokenizer, path, chat_template=template)
    assert len(extracted) == 1
    assert [entry["reason"] for entry in skipped] == [
        "an answer with weight 0.5, expected 0 or 1, false or true",
        "every answer is marked not to be trained on (weight, train, loss)",
        "answers are marked not to be trained on, but the chat template has 1 turns for 2",
    ]
