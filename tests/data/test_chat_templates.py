"""Which template is used, how it renders, and spans from prefixes where it marks no answers."""

import datetime

import pytest
from conftest import TEMPLATE

from chat_logits.data.template_choice import choose_template
from chat_logits.data.templates import ChatTemplate, PrefixError, TemplateError, portable_template
from chat_logits.errors import UsageError

SHIPPED = TEMPLATE.read_text(encoding="utf-8")
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "Yes"}
PLAIN = """{% for m in messages %}[{{ m.role }}]
{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}[assistant]
{% endif %}"""


LONG = "You are a helpful assistant. " * 200  # longer than the name of a file or a path may be


class Tokenizer:
    """As much of a tokenizer as a choice of template needs."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template
        self.special_tokens_map = {"bos_token": "<s>"}


def template(text: str, **options) -> ChatTemplate:
    return ChatTemplate(text, {"bos_token": "<s>"}, {}, **options)


def choose(argument, tokenizer, conversations=()):
    return choose_template(argument, tokenizer, {}, None, list(conversations))


# --- the choice ---


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no/such/file.jinja", "no such file"),
        ("templates/qwen2.5.jinja", "no such file.* names like it: qwen2_5"),
        (LONG, f"^`chat_template` {LONG[:255]}: no such file, and not a template's text"),
        ("{% for m in messages %}", "chat template, line 1"),
        (None, "no chat template: is this a base model"),
    ],
)
def test_templates_that_cannot_work_are_refused(argument, message):
    with pytest.raises(UsageError, match=message):
        choose(argument, Tokenizer())


def test_what_holds_on_other_machines_is_the_text_of_a_file():
    given = str(TEMPLATE), "smollm2", SHIPPED, LONG, "tool_use", None
    assert [portable_template(each) for each in given] == [SHIPPED, SHIPPED, SHIPPED, LONG, "tool_use", None]


def test_a_template_is_a_path_or_its_text_or_a_shipped_ones_name():
    for argument in (str(TEMPLATE), SHIPPED, "smollm2", "smollm2.jinja"):
        choice = choose(argument, Tokenizer())
        assert (choice.template.text, choice.mask_source, choice.own) == (
            SHIPPED,
            "generation blocks of --chat_template",
            None,
        )


def test_the_models_own_template_is_used_where_it_marks_answers():
    marked = PLAIN.replace("{{ m.content }}<end>", "{% generation %}{{ m.content }}<end>{% endgeneration %}")
    for own in (marked, {"rag": PLAIN, "default": marked}):
        choice = choose(None, Tokenizer(own))
        assert choice.template.text == marked
        assert choice.mask_source == "generation blocks of the model's own template"


def test_an_unmarked_template_is_replaced_by_the_shipped_one_that_renders_the_same(smollm2):
    choice = choose(None, smollm2[1])
    assert (choice.template.text, choice.mask_source) == (SHIPPED, "shipped template smollm2.jinja")
    assert choice.own.text == smollm2[1].chat_template
    assert choose(smollm2[1].chat_template, Tokenizer()).mask_source == "shipped template smollm2.jinja"


def test_a_template_that_no_shipped_one_equals_goes_by_prefixes(smollm2):
    other = smollm2[1].chat_template.replace("SmolLM", "Other")
    choice = choose(None, Tokenizer(other))
    assert (choice.template.text, choice.mask_source) == (other, "prefixes of each conversation")


def test_a_dataset_that_tells_two_templates_apart_goes_by_prefixes(smollm2):
    """Equal over the probes, but not over the dataset's own conversations."""
    sly = smollm2[1].chat_template.replace("message['content']", "(message['content'] | replace('sly', 'fox'))")
    plain, telling = [QUESTION, ANSWER], [QUESTION, {"role": "assistant", "content": "sly"}]
    assert choose(None, Tokenizer(sly), [plain]).mask_source == "shipped template smollm2.jinja"
    assert choose(None, Tokenizer(sly), [plain, telling]).mask_source == "prefixes of each conversation"
    choice = choose(None, Tokenizer(sly), [plain])
    choice.render(plain)
    with pytest.raises(TemplateError, match=r"smollm2\.jinja renders it differently than the model's own"):
        choice.render(telling)


def test_tools_among_the_first_conversations_decide_nothing(smollm2):
    """The shipped template refuses them in words, wherever they stand in the dataset."""
    calling = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": {}}]}]
    choice = choose(None, smollm2[1], [calling, [QUESTION, ANSWER]])
    assert choice.mask_source == "shipped template smollm2.jinja"
    with pytest.raises(TemplateError, match="SmolLM 2 has no tools"):
        choice.render(calling)


# --- prefixes ---


def spans(text: str, conversation: list[dict], **options) -> list[str]:
    rendered, spans = template(text, **options).render(conversation)
    return [rendered[start:end] for start, end in spans]


def test_prefixes_give_each_turn_without_its_header():
    system = {"role": "system", "content": "S"}
    conversation = [system, QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": ""}, QUESTION]
    assert spans(PLAIN, conversation) == ["Yes<end>\n", "<end>\n"]
    assert spans(PLAIN, [QUESTION]) == []


def test_prefixes_of_a_template_without_header_or_generation_prompt():
    turn = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    text = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    assert spans(text, [QUESTION, ANSWER] * 2) == [" Yes</s>", " Yes</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages | length }}" + PLAIN, "renders differently alone than inside the whole: after '' it has '1"),
        (PLAIN.replace("<end>", "{{ '!' if loop.last }}"), r"after '\[user\]\\nQ' it has '!\\n"),
        (PLAIN.replace("[assistant]", "[model]"), r"it has 'model\]\\n' alone and 'assistant\]"),
        (PLAIN.split("{% if add")[0], r"no generation prompt, so the header of '\[assistant\]"),
    ],
)
def test_prefixes_that_do_not_nest_are_refused_with_the_difference(text, message):
    with pytest.raises(PrefixError, match=message) as caught:
        spans(text, [QUESTION, ANSWER, QUESTION, ANSWER])
    assert "Three ways out" in str(caught.value) and "--chat_template" in str(caught.value)


# --- rendering ---


@pytest.mark.parametrize(
    "body", ["raise_exception('no system role')", "messages[0].nothing.at.all", "1 + 'a'", "1 / 0", "[][9] + 1"]
)
def test_a_template_that_raises_is_a_reason(body):
    with pytest.raises(TemplateError, match="the chat template refuses it"):
        template(f"{PLAIN}{{{{ {body} }}}}").render([QUESTION, ANSWER])


def test_templates_cannot_leave_the_sandbox():
    with pytest.raises(TemplateError, match="unsafe"):
        template("{% generation %}{{ ().__class__.__bases__ }}{% endgeneration %}").render([QUESTION, ANSWER])


def test_a_recorded_date_is_the_templates_date():
    text = "{{ strftime_now('%d %b %Y') }} {% generation %}x{% endgeneration %}"
    before = datetime.date.today()
    assert choose(text, Tokenizer()).template.date in {day.isoformat() for day in (before, datetime.date.today())}
    assert choose(SHIPPED, Tokenizer()).template.date is None
    for date, shown in (("2024-07-26", "26 Jul 2024 x"), ("2025-01-02", "02 Jan 2025 x")):
        assert template(text, date=date).render([QUESTION])[0] == shown


def test_a_date_does_not_stay_behind():
    text = "{{ strftime_now('%Y') }}"
    assert template(text, date="1999-12-31").text_or_none([QUESTION]) == "1999"
    before = datetime.date.today()
    assert template(text).text_or_none([QUESTION]) in {str(day.year) for day in (before, datetime.date.today())}


def test_special_tokens_and_variables_reach_the_template():
    text = "{{ bos_token }}{{ mood }}{% generation %}{{ messages[1].reasoning_content }}{% endgeneration %}"
    calm = ChatTemplate(text, {"bos_token": "<s>"}, {"mood": "calm"})
    for key in ("reasoning_content", "thinking"):
        assert calm.render([QUESTION, {**ANSWER, key: "Hm"}])[0] == "<s>calmHm"


def test_smollm2_template_renders_as_the_models_own(smollm2):
    system = {"role": "system", "content": "Be brief"}
    for content in ("Paris", " Paris", "\nParis\n", "", "ok 🙂", "<think>\n</think>x", "{{ 1 }} <b>"):
        turn = [QUESTION, {"role": "assistant", "content": content}]
        for messages in (turn, [system, *turn], turn * 3, [QUESTION]):
            for prompt in (False, True):
                own = smollm2[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                shipped = template(SHIPPED).text_or_none(messages, add_generation_prompt=prompt)
                assert shipped == own
