"""A row's tools: what they are read from, what the template makes of them, and what is refused."""

import copy
import json

import pytest
from conftest import MODEL, REPO

from chat_logits.data.columns import choose_columns
from chat_logits.data.config import SourceConfig
from chat_logits.data.conversations import ConversationError
from chat_logits.data.reader import open_reader
from chat_logits.data.template_choice import choose_template
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.data.tools import from_stored_tools, to_stored_tools, to_tools
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model.limits import InputLimits

QWEN = str(REPO / "templates" / "qwen2_5.jinja")
ASK, ANSWER = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Fine."}


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": "Looks it up.", "parameters": parameters}}


OSLO, KEYS = tool("weather", city={"type": "string"}), {"name": "zulu", "default": None, "alpha": 1, "é": 2.5}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([OSLO], [OSLO]),
        (json.dumps([OSLO, KEYS]), [OSLO, KEYS]),
        (json.dumps([OSLO]).encode(), [OSLO]),
        ([json.dumps(KEYS)], [KEYS]),
        *((nothing, None) for nothing in (None, "", " \n", "null", [], "[]")),
    ],
)
def test_tools_are_lists_or_json_text(value, expected):
    assert to_tools(value) == expected
    stored = to_stored_tools(expected)
    assert from_stored_tools(stored) == expected
    if expected:
        assert [list(one) for one in from_stored_tools(stored)] == [list(one) for one in expected]
        assert stored == json.dumps(expected, separators=(",", ":"), ensure_ascii=False)


def test_nulls_of_other_rows_are_dropped_at_every_depth_and_those_of_json_stay():
    in_arrow = tool("weather", city={"type": "string", "enum": None}, near=None)
    in_arrow["function"] |= {"strict": None, "parameters": {**in_arrow["function"]["parameters"], "required": ["city"]}}
    assert to_tools([in_arrow]) == [OSLO]
    assert (
        to_tools([KEYS], has_arrow_nulls=False)
        == to_tools(json.dumps([KEYS]))
        == to_tools([json.dumps(KEYS)])
        == [KEYS]
    )
    assert to_tools([KEYS]) == [{key: value for key, value in KEYS.items() if key != "default"}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("weather, time", "tools in a text that is not JSON: Expecting value"),
        (["weather"], "tools in a text that is not JSON"),
        ("{}", "tools that are not a list of objects but dict"),
        (7, "tools that are not a list of objects but int"),
        ([OSLO, None], "tools that are not a list of objects: an entry is NoneType"),
        ([[OSLO]], "tools that are not a list of objects: an entry is list"),
        ("[{}]", "tools that are not a list of objects: an entry is empty"),
        ([{"name": "\ud83d"}], "tools with a text that is not UTF-8"),
        ([{"name": "x", "limit": float("nan")}], "tools with a value that JSON does not have: Out of range"),
        ([{"name": "x", "example": b"\x00"}], "tools with a value that JSON does not have: .*bytes"),
    ],
)
def test_what_are_no_tools_is_refused(value, reason):
    with pytest.raises(ConversationError, match=reason):
        to_tools(value)


@pytest.mark.parametrize("text", ["{", "7", "[]", "null", "[7]", 7])
def test_damaged_stored_tools_are_refused(text):
    with pytest.raises(ToolkitError, match="column tools: "):
        from_stored_tools(text)


def test_the_column_has_three_names_and_may_be_named():
    for name in ("tools", "functions", "tool_defs"):
        assert choose_columns(["messages", name])["tools"] == name
        assert "tools" not in choose_columns(["messages", name], tools="")
        assert choose_columns(["messages", name, "mine"], tools="mine")["tools"] == "mine"
    with pytest.raises(UsageError, match="ambiguous columns: tools and functions all hold tools"):
        choose_columns(["messages", "functions", "tools"])
    with pytest.raises(UsageError, match="no column 'tools'; the dataset has: messages"):
        choose_columns(["messages"], tools="tools")


# --- rendered ---


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


def opened(tokenizer, path, **options):
    return open_reader(SourceConfig(dataset_id=str(path), **options), tokenizer, InputLimits(49_152, None))


def test_each_row_is_rendered_with_its_own_tools(tokenizer, chat_file):
    """As transformers renders it, whatever form the definitions have."""
    forms = [[tool("alpha")], json.dumps([tool("beta"), {"name": "bare"}]), None, [json.dumps(tool("gamma"))]]
    path = chat_file([{"messages": [ASK, ANSWER], "tools": form} for form in forms])
    ready, skipped = opened(tokenizer, path, chat_template=QWEN).align(0, 9)
    assert not skipped
    given = [[tool("alpha")], [tool("beta"), {"name": "bare"}], None, [tool("gamma")]]
    for aligned, tools in zip(ready, given, strict=True):
        template = (REPO / "templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
        expected = tokenizer.apply_chat_template([ASK, ANSWER], tools=tools, chat_template=template, return_dict=True)
        assert aligned.input_ids.tolist() == expected["input_ids"]
        assert tokenizer.decode(aligned.input_ids[aligned.positions]) == "Fine."
        assert aligned.tools == to_stored_tools(tools)


BLIND = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
NAMELESS = "{% for t in tools or [] %}{{ t.kind }}\n{% endfor %}" + BLIND
ONLY_TWO = "{{ raise_exception('two!') if tools and tools | length < 2 }}{{ (tools or []) | length }}\n" + BLIND


@pytest.mark.parametrize(
    ("template", "tools", "reason"),
    [
        (BLIND, [OSLO], "tools, of which the chat template shows nothing (`tools_column` '' for none)"),
        (NAMELESS, [{"kind": "search"}], "tools, of which the chat template shows nothing"),
        (QWEN, [OSLO, KEYS], None),
        (ONLY_TWO, [OSLO, OSLO], "a tool 'weather', which the chat template does not show"),
        (None, [OSLO], "the chat template refuses it: SmolLM 2 has no tools"),
        (QWEN, "weather", "tools in a text that is not JSON: Expecting value"),
    ],
)
def test_no_answer_is_scored_without_the_tools_it_was_written_with(tokenizer, chat_file, template, tools, reason):
    path = chat_file([{"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER], "functions": tools}])
    reader = opened(tokenizer, path, chat_template=template)
    assert [aligned.source_index for aligned in reader.first_ready] == ([0] if reason else [0, 1])
    assert [entry["reason"].startswith(reason) for entry in reader.first_skipped] == ([True] if reason else [])
    without = opened(tokenizer, path, chat_template=template, tools_column="")
    assert [aligned.tools for aligned in without.first_ready] == [None, None]


CALLED = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TOOL_LESS = BLIND.replace("m.content", "m.content or ''")
NOTED = TOOL_LESS.replace("{% generation %}", "{% generation %}{{ m.tool_calls }}")
EMPTY = TOOL_LESS.replace("{% generation %}", "{% generation %}{{ 'weather' if m.tool_calls }}")


@pytest.mark.parametrize(("template", "is_shown"), [(QWEN, True), (NOTED, True), (TOOL_LESS, False), (EMPTY, False)])
def test_no_answer_is_scored_without_the_call_before_it(tokenizer, chat_file, template, is_shown):
    """A template that drops calls leaves the tool's answer and what is said of it; its name elsewhere is no call."""
    rows = [
        [ASK, {"role": "assistant", **said}, {"role": "tool", "content": "weather: 7"}, ANSWER]
        for said in (
            {"content": "", "tool_calls": CALLED},
            {"tool_calls": CALLED},
            {"content": None, "function_call": CALLED[0]["function"]},
            {"content": "", "tool_calls": [CALLED[0]["function"]]},
        )
    ]
    reader = opened(
        tokenizer,
        chat_file([{"messages": [ASK, ANSWER]}, *({"messages": row} for row in rows)]),
        chat_template=template,
    )
    assert [aligned.source_index for aligned in reader.first_ready] == ([0, 1, 2, 3, 4] if is_shown else [0])
    assert {entry["reason"] for entry in reader.first_skipped} == (
        set() if is_shown else {"a call of a tool, of which the chat template shows nothing"}
    )


def test_tools_of_the_rows_and_of_the_option_are_too_many(tokenizer, chat_file):
    path = chat_file([{"messages": [ASK, ANSWER], "tool_defs": [OSLO]}])
    with pytest.raises(UsageError, match="`template_kwargs`: it has tools, and so has the column 'tool_defs'"):
        opened(tokenizer, path, chat_template=QWEN, template_kwargs={"tools": [KEYS]})


def test_a_column_that_has_something_else_is_told_how_to_leave_out(tokenizer, chat_file):
    path = chat_file([{"messages": [ASK, ANSWER], "functions": "weather"}] * 3)
    with pytest.raises(ToolkitError, match="3 × tools in a text that is not JSON") as refused:
        opened(tokenizer, path, chat_template=QWEN)
    assert str(refused.value).endswith("\nWithout the tools of the column 'functions': `tools_column` ''.")
    assert len(opened(tokenizer, path, chat_template=QWEN, tools_column="").first_ready) == 3


# --- named templates ---


class Named:
    """A tokenizer with several templates, of which transformers chooses by its own rule."""

    def __init__(self, tokenizer, templates: dict):
        self.inner, self.chat_template = tokenizer, templates
        self.special_tokens_map = tokenizer.special_tokens_map


PLAIN = "{% for m in messages %}P {{ m.role }} {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
CALLING = "{{ tools | tojson }}" + PLAIN.replace("P ", "T ")


@pytest.mark.parametrize("tools", [None, [OSLO]])
def test_of_several_templates_transformers_choice_renders(tokenizer, tools):

    theirs = copy.deepcopy(tokenizer)
    theirs.chat_template = {"default": PLAIN, "tool_use": CALLING, "rag": "never"}
    choice = choose_template(None, theirs, {}, None, [[ASK, ANSWER]], [tools])
    expected = theirs.apply_chat_template([ASK, ANSWER], tools=tools, tokenize=False)
    assert choice.render([ASK, ANSWER], tools)[0] == expected
    assert (choice.template.text, choice.template.tools_text) == (PLAIN, CALLING)
    in_kwargs = choose_template(None, theirs, {"tools": tools}, None, [])
    assert in_kwargs.render([ASK, ANSWER])[0] == expected
    assert choose_template("rag", theirs, {}, None, []).template.text == "never"


def test_several_templates_without_a_default_are_refused(tokenizer):
    with pytest.raises(UsageError, match="several chat templates, and none is named default: rag, tool_use"):
        choose_template(None, Named(tokenizer, {"tool_use": CALLING, "rag": PLAIN}), {}, None, [])
