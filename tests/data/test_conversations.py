"""Source rows to conversations, and the form they are stored in."""

import datetime
import decimal
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_logits.data.columns import choose_columns
from chat_logits.data.conversations import ConversationError, to_conversation
from chat_logits.data.stored_messages import from_stored, to_stored
from chat_logits.data.text_rows import BadRow
from chat_logits.errors import ToolkitError, UsageError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "messages": [USER, ASSISTANT]},
        {"prompt": "the first user turn again", "prompt_id": "x", "messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "source": "x"},
        {"question": "Hi", "answer": "Hello", "reference_answer": "never this", "subject": "greetings"},
        {"conversation_id": "x", "model": "y", "conversation": [USER, ASSISTANT], "turn": 1},
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "category": "x"},
        {"query": "Hi", "response": "Hello"},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_format_becomes_the_same_conversation(row):
    assert to_conversation(row, choose_columns(list(row))) == [USER, ASSISTANT]


def parts(*texts, name="text"):
    return [{"type": "text", name: text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": parts("H", "i")}, {"role": "assistant", "content": parts("Hello")}]},
        {"messages": [{"role": "user", "content": parts("Hi", name="value")}, ASSISTANT]},
        {"messages": [{"role": "user", "content": ["H", "i"]}, ASSISTANT]},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"messages": [{"role": "Human", "content": "Hi"}, {"role": "GPT", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": b"Hi"}, {"role": "bot", "content": "Hello"}]},
        {"conversations": [{"from": "User", "value": "Hi"}, {"from": "model", "value": "Hello"}]},
        {"prompt": b"Hi", "completion": b"Hello"},
    ],
    ids=lambda row: repr(row)[:60],
)
def test_other_shapes_become_the_same_conversation(row):
    assert to_conversation(row, choose_columns(list(row))) == [USER, ASSISTANT]


def test_whole_columns_of_numbers_are_texts_and_single_numbers_are_not():
    columns = {"prompt": "question", "response": "answer"}
    row = {"question": "2 + 5?", "answer": 7}
    assert to_conversation(row, columns, number_columns={"answer"})[1]["content"] == "7"
    assert to_conversation({**row, "answer": False}, columns, number_columns={"answer"})[1]["content"] == "False"
    with pytest.raises(ConversationError, match="content is not text but int"):
        to_conversation(row, columns)


@pytest.mark.parametrize("value", [0.5, {"text": "7"}, [7], datetime.date(2024, 1, 1), decimal.Decimal("1.50")])
def test_what_is_no_number_in_a_column_of_numbers_is_no_text(value):
    """The first rows of a JSON file are integers; a later one may be anything."""
    columns = {"prompt": "question", "response": "answer"}
    with pytest.raises(
        ConversationError, match=f"content is not text but {type(value).__name__}|not a list of messages"
    ):
        to_conversation({"question": "How many?", "answer": value}, columns, number_columns={"answer"})
    text = to_conversation({"question": "How many?", "answer": "seven"}, columns, number_columns={"answer"})
    assert text[1]["content"] == "seven"


@pytest.mark.parametrize(
    ("instruction", "given", "prompt"),
    [
        (b"Add caf\xc3\xa9.", "1, 2", "Add café.\n\n1, 2"),
        ("Add.", b"1, \xc3\xa9", "Add.\n\n1, é"),
        (b"", b"1", "1"),
        ("Add.", 5, None),
        ("Add.", ["1", "2"], None),
        ("Add.", {"a": 1}, None),
        (["Add", "."], "1, 2", None),
        (decimal.Decimal("1.50"), "1, 2", None),
        (b"Add \xff", "1, 2", None),
    ],
)
def test_instruction_and_input_are_joined_as_texts_and_as_nothing_else(instruction, given, prompt):
    row = {"instruction": instruction, "input": given, "output": "3"}
    if prompt is None:
        with pytest.raises(ConversationError, match=r"that is not text but (int|list|dict|Decimal)|not UTF-8 text"):
            to_conversation(row, choose_columns(list(row)))
    else:
        assert to_conversation(row, choose_columns(list(row)))[0]["content"] == prompt


def test_alpacas_history_comes_before_the_question():
    row = {"instruction": "And in May?", "input": "", "output": "Warm.", "history": [["Winter?", "Cold."]]}
    texts = [message["content"] for message in to_conversation(row, choose_columns(list(row)))]
    assert texts == ["Winter?", "Cold.", "And in May?", "Warm."]
    assert to_conversation({**row, "history": None}, choose_columns(list(row)))[0]["content"] == "And in May?"


def test_a_question_may_come_again_behind_its_answer():
    row = {"prompt": "Hi", "completion": [ASSISTANT, USER, ASSISTANT]}
    assert to_conversation(row, choose_columns(list(row))) == [USER, ASSISTANT, USER, ASSISTANT]


def test_roles_that_the_template_names_keep_their_names():
    row = {"messages": [{"role": "developer", "content": "Be kind"}, USER, ASSISTANT]}
    assert to_conversation(row, {"messages": "messages"})[0]["role"] == "system"
    assert to_conversation(row, {"messages": "messages"}, template_roles={"developer"})[0]["role"] == "developer"


def test_calls_in_every_form_are_the_same_object():
    """OpenAI's arguments are JSON in a string; ShareGPT's call is a turn; Arrow adds other rows' keys as nulls."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    with_nulls = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "k": None}}}
    expected = [USER, {"role": "assistant", "tool_calls": [call]}]
    for each in (call, as_text, with_nulls):
        row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [each]}]}
        assert to_conversation(row, {"messages": "messages"}) == expected
    value = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]
    assert to_conversation({"conversations": turns}, {"messages": "conversations"}) == expected


@pytest.mark.parametrize("arguments", [{"k": None}, '{"k": null}'])
def test_older_and_barer_calls_are_calls(arguments):
    """OpenAI's ``function_call`` beside the content, and calls of a name and arguments without ``function``."""
    call = {"name": "find", "arguments": arguments}
    old = {"messages": [USER, {"role": "assistant", "content": None, "function_call": call}]}
    meant = [{"type": "function", "function": {"name": "find", "arguments": {"k": None}}}]
    columns = {"messages": "messages"}
    for row in (old, {"messages": [USER, {"role": "assistant", "function_call": json.dumps(call)}]}):
        assert to_conversation(row, columns, has_arrow_nulls=False)[1] == {"role": "assistant", "tool_calls": meant}
    bare = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    found = to_conversation(bare, columns, has_arrow_nulls=False)[1]["tool_calls"]
    assert found == [{"name": "find", "arguments": {"k": None}}]
    read = to_conversation(old, columns, has_arrow_nulls=False, template_words={"function_call"})[1]
    assert "tool_calls" not in read and read["function_call"] == call
    with pytest.raises(ConversationError, match="a turn with tool_calls and a function_call"):
        turn = {"role": "assistant", "function_call": call, "tool_calls": [call]}
        to_conversation({"messages": [USER, turn]}, columns)


def test_speakers_in_any_case_and_in_bytes_are_known():
    asked = {"from": b"human", "value": b"Hi"}
    call = {"from": "Function_Call ", "value": '{"name": "find"}'}
    found = to_conversation({"conversations": [asked, call]}, {"messages": "conversations"})
    assert found[0] == USER and found[1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {}}


def test_a_system_column_that_is_not_used_is_told():
    own, told = {"role": "system", "content": "Be kind"}, []
    row = {"messages": [own, USER, ASSISTANT], "system": "Be brief"}
    assert to_conversation(row, choose_columns(list(row)), tell=told.append) == [own, USER, ASSISTANT]
    assert told == ["Conversations with a system message of their own are stored without the one of the system column"]
    to_conversation({**row, "system": "Be kind"}, choose_columns(list(row)), "Be short", tell=told.append)
    assert len(told) == 1


def test_an_alpaca_input_follows_the_instruction():
    row = {"instruction": "Translate.", "input": "Hej", "output": "Hello"}
    assert to_conversation(row, choose_columns(list(row)))[0]["content"] == "Translate.\n\nHej"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": []}, {"messages": "chosen"}),
        ({"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {"messages": "dialog"}),
        ({"q": "Hi", "a": "Hello", "question": "?", "answer": "!"}, {"prompt": "q", "response": "a"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {}),
        ({"prompt": [USER], "completion": "Hello"}, {}),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, {"prompt": "prompt", "response": "chosen"}),
    ],
)
def test_columns_may_be_named_and_hold_messages(row, named):
    assert to_conversation(row, choose_columns(list(row), **named)) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"messages": "missing"}, "no column 'missing'; the dataset has: question, answer"),
        ({"prompt": "question"}, "`prompt_column` and `response_column` together"),
        ({"messages": "question", "response": "answer"}, "`messages_column` alone"),
    ],
)
def test_columns_that_are_named_wrongly_are_refused(named, message):
    with pytest.raises(UsageError, match=message):
        choose_columns(["question", "answer"], **named)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_system_prompts_beside_the_conversation(name):
    row = {"question": "Hi", "answer": "Hello", name: "Be kind"}
    columns = choose_columns(list(row))
    system = {"role": "system", "content": "Be kind"}
    assert to_conversation(row, columns) == [system, USER, ASSISTANT]
    assert to_conversation({**row, name: ""}, columns) == [USER, ASSISTANT]
    assert to_conversation({**row, name: None}, columns, "Fixed")[0]["content"] == "Fixed"
    assert to_conversation(row, columns, "Fixed")[0] == system
    own = {"messages": [{"role": "system", "content": "Own"}, USER, ASSISTANT]}
    assert to_conversation(own, {"messages": "messages"}, "Fixed")[0]["content"] == "Own"


def test_other_keys_of_messages_are_kept_and_nulls_are_not():
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    conversation = to_conversation({"messages": [USER, calling]}, {"messages": "messages"})
    assert conversation == [USER, {"role": "assistant", "tool_calls": [call]}]


def test_an_alpaca_input_without_instruction_is_the_prompt():
    columns = {"prompt": "instruction", "response": "output", "input": "input"}
    row = {"instruction": None, "input": "Hi", "output": "Hello"}
    assert to_conversation(row, columns) == [USER, ASSISTANT]
    assert to_conversation({**row, "instruction": "Hi", "input": " \n"}, columns) == [USER, ASSISTANT]


@pytest.mark.parametrize("value", [datetime.datetime(2024, 5, 1, 12, 30), [{"at": b"x"}], {"sum": decimal.Decimal(1)}])
def test_keys_that_json_has_not_are_left_out_aloud_or_the_row_is(value):
    """WildChat's messages carry timestamps. No text is made of them: a template that reads one gets none."""
    row, told = {"messages": [USER, {**ASSISTANT, "timestamp": value, "score": 1}]}, []
    found = to_conversation(row, {"messages": "messages"}, tell=told.append)
    kind = type(value).__name__
    assert found == [USER, {**ASSISTANT, "score": 1}]
    assert told == [f"Messages are stored without 'timestamp': JSON has no {kind}, and the template does not read it"]
    with pytest.raises(ConversationError, match=f"a message whose 'timestamp' is {type(value).__name__}, which JSON"):
        to_conversation(row, {"messages": "messages"}, template_words={"message", "timestamp"})


def test_sharegpt_roles():
    turns = [("system", "Be kind"), ("user", "Hi"), ("chatgpt", "Hello"), ("tool", "7"), ("model", "Seven")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    roles = [message["role"] for message in to_conversation(row, {"messages": "conversations"})]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_unknown_columns_are_listed():
    with pytest.raises(UsageError, match="no chat columns among: text, label"):
        choose_columns(["text", "label"])


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["question;answer"], "separated by semicolons: save it with commas"),
        (["question\tanswer"], "separated by tabs"),
        (["\xff\xfeq\0u\0e\0"], "UTF-16: save it as UTF-8"),
        (["Question", "Answer"], "'Question' is matched exactly"),
        (["question", "  answer"], "'  answer' is matched exactly"),
        (["question", "label"], "Name the ones that are meant"),
        (["prompt", "chosen", "rejected"], "`prompt_column` prompt and `response_column` chosen"),
        (["custom_id", "method", "url", "body"], "joined by custom_id"),
        (["id", "custom_id", "response", "error"], "joined by custom_id"),
    ],
)
def test_tables_without_chat_columns_get_a_hint(names, hint):
    with pytest.raises(UsageError, match="no chat columns among") as refused:
        choose_columns(names)
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([{"version": 1, "data": [{}, {}]}], "'data' has a list of 2 objects. Make them the rows: `jq -c '.data[]' "),
        (
            [{"test": [{}], "train": [{}] * 3}],
            "'train' has a list of 3 objects. Make them the rows: `jq -c '.train[]' ",
        ),
        ([{"all chats": [{}]}], """`jq -c '.["all chats"][]' FILE"""),
        ([{"data": {"messages": []}}] * 2, "'data' is an object with chat columns. Make them the rows: `jq -c .data "),
        ([{"1": {"messages": []}, "2": {"messages": []}}], "`jq -c '.[]' FILE"),
        ([{"dialog": [USER, ASSISTANT], "tags": [{}]}], "`messages_column` dialog"),
        ([{"tags": [{}], "text": "a"}] * 2, "Name the ones that are meant"),
    ],
)
def test_what_stands_below_a_key_is_told_with_the_way_to_it(rows, hint):
    with pytest.raises(UsageError, match="no chat columns among") as refused:
        choose_columns(list(rows[0]), first_rows=[BadRow("a line that is not JSON")] * (len(rows) - 1) + rows)
    assert hint in str(refused.value)


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
        choose_columns(columns)
    assert ", ".join(columns) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": None}, "not a list of messages, but nothing"),
        ({"messages": "Hi"}, "not a list of messages, but text that is not JSON"),
        ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "not a list of messages, but text that is not JSON"),
        ({"messages": "\n\nHuman: Hi\n\nAssistant: Hello"}, "not a list of messages, but a transcript in one text"),
        ({"messages": "<|im_start|>user\nHi<|im_end|>"}, "not a list of messages, but a transcript in one text"),
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, "and 'value', but human, assistant$"),
        ({"prompt": "Hi", "completion": [USER, ASSISTANT]}, "a response that has its prompt in it"),
        ({"prompt": [USER], "completion": [{"from": "human", "value": "Hi"}]}, "a response that has its prompt in it"),
        ({"messages": '"Hi"'}, "not a list of messages, but JSON text of something else"),
        ({"messages": {"role": "user", "content": "Hi"}}, "not a list of messages, but one object"),
        ({"messages": ["Hi", "Hello"]}, "not a list of messages, but a list with str in it"),
        ({"messages": 7}, "not a list of messages, but a value of type int"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a turn of role 'assistant' without content"),
        ({"messages": [{"content": "Hi"}, ASSISTANT]}, "a turn with neither 'role' nor 'from' and 'value'"),
        ({"messages": [{"role": 1, "content": "Hi"}, ASSISTANT]}, "unknown speaker 1"),
        ({"messages": [{"role": "narrator", "content": "Hi"}, ASSISTANT]}, "unknown speaker 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "content is not text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown speaker 'alien'"),
        ({"conversations": [{"value": "x"}]}, "a turn with neither 'role' nor 'from' and 'value'"),
        ({"question": "Hi", "answer": None}, "a turn of role 'assistant' without content"),
        ({"question": "Hi", "answer": 7}, "content is not text"),
        ({"question": None, "answer": "Hello"}, "a turn of role 'user' without content"),
        ({"conversations": [None]}, "not a list of messages"),
        ({"messages": "[" * 100_000}, "not a list of messages"),
        ({"messages": [USER, {"role": "assistant", "value": "Hello"}]}, "a turn of role 'assistant' without content"),
        ({"messages": [USER, {"role": "assistant", "refusal": "No."}]}, "a turn of role 'assistant' without content"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "a turn of role 'assistant' without content"),
        ({"messages": [{**USER, "from": "human", "value": "Ho"}, ASSISTANT]}, "whose 'content' and 'value' differ"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}, ASSISTANT]},
            "a part whose 'text' and 'value' differ",
        ),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "unknown speaker"),
        ({"messages": [USER, {**ASSISTANT, "score": float("nan")}]}, "a number that JSON does not have"),
        ({"question": "When?", "answer": datetime.datetime(2024, 1, 1)}, "content is not text but datetime"),
        ({"question": "How many?", "answer": 0.5}, "content is not text but float"),
        ({"question": "Which?", "answer": decimal.Decimal("1.50")}, "content is not text but Decimal"),
        ({"question": b"Hi \xff", "answer": "Hello"}, "bytes that are not UTF-8 text"),
        ({"question": "Hi \ud83d", "answer": "Hello"}, "a text with half of a surrogate pair"),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi"]}}, "differ in length"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]}, "a part without any"),
        ({"conversations": [{"from": "function_call", "value": "find it"}]}, "a function_call that is not a JSON"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": "find it"}]},
            "tool_calls that are not a list of objects",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["find"]}]}, "tool_calls that are not a list"),
        ({"instruction": "Hi", "output": "Hello", "history": ["Ho"]}, "a history that is not a list of questions"),
    ],
)
def test_rows_that_are_no_conversation_say_why(row, reason):
    with pytest.raises(ConversationError, match=reason):
        to_conversation(row, choose_columns(list(row)))


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


@pytest.mark.parametrize("extra", ["{", "[1, 2]", "7", 7])
def test_a_damaged_extra_is_refused(extra):
    with pytest.raises(ToolkitError, match="column messages: extra is not a JSON object"):
        from_stored([{"role": "user", "content": "Hi", "extra": extra}])


@pytest.mark.parametrize("message", [None, {}, {"role": None, "content": "x", "extra": None}])
def test_a_damaged_message_is_refused(message):
    with pytest.raises(ToolkitError, match=r"column messages: found .*, expected role"):
        from_stored([message])
