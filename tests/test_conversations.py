"""Source rows to conversations, and the form they are stored in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import ConversationError, detect_columns, from_stored, to_conversation, to_stored
from errors import ToolkitError, UsageError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "messages": [USER, ASSISTANT]},
        {"prompt": "the first user turn again", "prompt_id": "x", "messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "source": "x"},
        {"question": "Hi", "answer": "Hello", "reference_answer": "never this", "subject": "greetings"},
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "category": "x"},
        {"query": "Hi", "response": "Hello"},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_format_becomes_the_same_conversation(row):
    assert to_conversation(row, detect_columns(list(row))) == [USER, ASSISTANT]


def test_an_alpaca_input_follows_the_instruction():
    row = {"instruction": "Translate.", "input": "Hej", "output": "Hello"}
    assert to_conversation(row, detect_columns(list(row)))[0]["content"] == "Translate.\n\nHej"


def test_sharegpt_roles():
    turns = [("system", "Be kind"), ("user", "Hi"), ("chatgpt", "Hello"), ("tool", "7"), ("model", "Seven")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    found = [message["role"] for message in to_conversation(row, {"conversations": "conversations"})]
    assert found == ["system", "user", "assistant", "tool", "assistant"]


def test_unknown_columns_are_listed():
    with pytest.raises(UsageError, match="no chat columns among: text, label"):
        detect_columns(["text", "label"])


@pytest.mark.parametrize(
    "columns",
    [
        ["question", "answer", "prompt", "completion"],
        ["messages", "conversations"],
        ["messages", "instruction", "output"],
    ],
)
def test_ambiguous_columns_are_listed(columns):
    with pytest.raises(UsageError, match="ambiguous columns") as caught:
        detect_columns(columns)
    assert ", ".join(columns) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": None}, "no list of messages"),
        ({"messages": "Hi"}, "no list of messages"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "an assistant turn without content"),
        ({"messages": [{"content": "Hi"}, ASSISTANT]}, "a message without a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "content is not text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown speaker 'alien'"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "a turn without 'from' and 'value'"),
        ({"question": "Hi", "answer": None}, "an assistant turn without content"),
        ({"question": "Hi", "answer": 7}, "content is not text"),
    ],
)
def test_rows_that_are_no_conversation_say_why(row, reason):
    with pytest.raises(ConversationError, match=reason):
        to_conversation(row, detect_columns(list(row)))


values = st.none() | st.booleans() | st.integers() | st.text()
extras = st.dictionaries(
    st.text(min_size=1).filter(lambda key: key not in ("role", "content")),
    values.filter(lambda value: value is not None) | st.lists(values) | st.dictionaries(st.text(), values),
    max_size=3,
)


@given(st.lists(st.tuples(st.text(), st.none() | st.text(), extras)))
def test_stored_messages_give_the_conversation_back(parts):
    conversation = [
        {"role": role, **({} if content is None else {"content": content}), **extra} for role, content, extra in parts
    ]
    stored = to_stored(conversation)
    assert all(set(message) == {"role", "content", "extra"} for message in stored)
    assert from_stored(stored) == conversation
    assert [list(message) for message in from_stored(stored)] == [list(message) for message in conversation]


def test_a_damaged_extra_is_refused():
    with pytest.raises(ToolkitError, match="column messages: extra is no JSON object"):
        from_stored([{"role": "user", "content": "Hi", "extra": "{"}])
