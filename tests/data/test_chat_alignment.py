"""Masks, skipped tokens, templates and checksums, against hand-written expectations and transformers itself."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TEMPLATE

from chat_logits.data import alignment as chat_alignment
from chat_logits.data.alignment import Aligner
from chat_logits.data.row_alignment import AlignmentError, RowAligner, align_row
from chat_logits.data.stored_messages import to_stored
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import skipped_token_ids, token_text
from chat_logits.errors import UsageError

SHIPPED = TEMPLATE.read_text(encoding="utf-8")
BARE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
QUESTION = {"role": "user", "content": "Q"}
# A template with think blocks as several families write them, and a newline inside the generation block.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{% if '<think>' not in m.content %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""


@pytest.fixture
def align(smollm2):
    """Align a conversation and give its tokens' texts and reasons."""
    tokenizer = smollm2[1]

    def run(messages, template=SHIPPED, skip=(), keep=()):
        chat_template = ChatTemplate(template, tokenizer.special_tokens_map, {})
        alignment = Aligner(tokenizer, chat_template, skipped_token_ids(tokenizer, skip, keep)).align(messages)
        texts = [token_text(tokenizer, int(i)) for i in alignment.input_ids]
        return list(zip(texts, alignment.reasons, strict=True))

    return run


def assistant(content: str) -> list[dict]:
    return [QUESTION, {"role": "assistant", "content": content}]


def answer_part(aligned: list) -> list:
    """Tokens after the last header."""
    last = max(i for i, (text, _) in enumerate(aligned) if text == "<|im_start|>")
    return aligned[last + 1 :]


SPECIAL = chat_alignment.SPECIAL_REASON


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris", [("Paris", None), ("<|im_end|>", SPECIAL)]),
        ("ok 🙂", [("ok", None), (" 🙂", None), ("<|im_end|>", SPECIAL)]),
        ("a 🦩", [("a", None), (" \udcf0\udc9f", None), ("\udca6", None), ("\udca9", None), ("<|im_end|>", SPECIAL)]),
        ("\nParis", [("\n", None), ("Paris", None), ("<|im_end|>", SPECIAL)]),
        (" Paris", [(" Paris", None), ("<|im_end|>", SPECIAL)]),
        ("", [("<|im_end|>", SPECIAL)]),
        ("a<|im_end|>b", [("a", None), ("<|im_end|>", SPECIAL), ("b", None), ("<|im_end|>", SPECIAL)]),
    ],
)
def test_masks_token_by_token(align, answer, expected):
    tokens = answer_part(align(assistant(answer)))
    assert tokens[:3] == [("ass", "prompt"), ("istant", "prompt"), ("\n", "prompt")]
    assert tokens[3:-1] == expected
    assert tokens[-1] == ("\n", "prompt")


@pytest.mark.parametrize(("space", "edge"), [("  ", "\n "), ("\n\n", "\n\n")])
def test_a_token_that_straddles_the_spans_edge_is_extracted(align, space, edge):
    """The header's newline and the answer's first space are one token here."""
    tokens = answer_part(align(assistant(f"{space}Paris")))
    assert tokens[:3] == [("ass", "prompt"), ("istant", "prompt"), (edge, None)]
    assert "".join(text for text, reason in tokens[2:] if reason is None) == f"\n{space}Paris"


def test_every_assistant_turn_is_extracted(align):
    messages = [{"role": "system", "content": "Be brief"}]
    for content in ("one", "two", "three"):
        messages += assistant(content)
    extracted = [text for text, reason in align(messages) if reason is None]
    assert extracted == ["one", "two", "three"]


def test_think_tags_are_skipped_and_thoughts_are_not(align):
    tokens = answer_part(align(assistant("<think>\nHm\n</think>\n\nYes"), THINKING))[3:]
    thoughts = [text for text, reason in tokens if reason is None]
    tags = [text for text, reason in tokens if reason == chat_alignment.THINK_TAG_REASON]
    assert "".join(thoughts) == "\nHm\n\n\nYes"
    assert "".join(tags) == "<think></think>"


def test_an_empty_think_block_is_skipped_whole(align):
    tokens = answer_part(align(assistant("Yes"), THINKING))[3:]
    block = [text for text, reason in tokens if reason == chat_alignment.EMPTY_THINK_REASON]
    assert "".join(block) == "<think>\n\n</think>\n\n"
    assert [text for text, reason in tokens if reason is None] == ["Yes"]


def test_what_follows_the_end_of_the_turn_is_skipped(align):
    assert align(assistant("Yes"), THINKING)[-2:] == [
        ("<|im_end|>", SPECIAL),
        ("\n", chat_alignment.AFTER_END_REASON),
    ]


def test_the_first_token_of_all_has_nothing_that_predicts_it(align):
    tokens = align(assistant("Yes no"), BARE)
    assert tokens[0][1] == chat_alignment.FIRST_TOKEN_REASON
    assert [reason for _, reason in tokens[1:]] == [None] * (len(tokens) - 1)


def test_ids_are_apply_chat_templates(smollm2, source_rows, real_alignments):
    for row, aligned in zip(source_rows, real_alignments, strict=False):
        turns = row["conversations"]
        messages = assistant(turns[1]["value"])
        messages[0] = {"role": "user", "content": turns[0]["value"]}
        expected = smollm2[1].apply_chat_template(messages, return_dict=True)["input_ids"]
        assert aligned.input_ids.tolist() == expected


def test_tokens_may_be_kept_and_skipped(align):
    messages = assistant("Yes, Paris")
    assert answer_part(align(messages))[3:] == [
        *(("Yes", None), (",", None), (" Paris", None)),
        *(("<|im_end|>", SPECIAL), ("\n", "prompt")),
    ]
    marks_newline = THINKING.replace("if '<think>' not in", "if 0 and")
    changed = answer_part(align(messages, marks_newline, skip=["ĠParis"], keep=["<|im_end|>"]))
    assert changed[3:] == [
        *(("Yes", None), (",", None), (" Paris", chat_alignment.CHOSEN_REASON)),
        *(("<|im_end|>", None), ("\n", chat_alignment.AFTER_END_REASON)),
    ]


@pytest.mark.parametrize("option", ["skip", "keep"])
def test_texts_that_are_no_token_are_refused(align, option):
    with pytest.raises(UsageError, match=f"`{option}_tokens` 'two words': not one token"):
        align(assistant("Yes"), **{option: ["two words"]})


# --- stored rows ---


@pytest.fixture
def stored(smollm2):
    """A stored row's alignment columns and what its dataset records."""
    tokenizer = smollm2[1]
    extraction = {
        "chat_template": TEMPLATE.read_text(encoding="utf-8"),
        "skipped_token_ids": sorted(skipped_token_ids(tokenizer)),
        "template_kwargs": {},
        "template_date": None,
        "tools_template": None,
        "all_turns": False,
    }
    aligned = Aligner.from_recorded(tokenizer, SimpleNamespace(**extraction, keep_end_of_turn=None)).align(
        assistant("Paris, France")
    )
    row = {
        "messages": to_stored(assistant("Paris, France")),
        "num_tokens": len(aligned.positions),
        "alignment_checksum": aligned.checksum,
        "tools": None,
    }
    return row, extraction, aligned


def test_align_row_gives_ids_and_positions(smollm2, stored):
    row, extraction, aligned = stored
    rebuilt = align_row(row, smollm2[1], extraction)
    np.testing.assert_array_equal(rebuilt.input_ids, aligned.input_ids)
    assert smollm2[1].decode(rebuilt.input_ids[rebuilt.positions]) == "Paris, France"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("named SmolLM", "called SmolLM", r"token 9 is ' called' \(\d+\), expected ' named' \(\d+\)"),
        ("+ '<|im_end|>' }}\n        {%- endgen", "}}\n        {%- endgen", r"token \d+ is .* expected '<\|im_end\|>'"),
        (
            "{%- generation %}\n            {{- message.content",
            "{{- message.content[:5] }}{%- generation %}{{- message.content[5:]",
            r"it skips token \d+, which was extracted",
        ),
        ("    {{- '\\n' }}\n{%- endfor", "{%- endfor", r"it gives \d+ tokens|token \d+ is"),
    ],
)
def test_another_template_is_told_where_it_differs(smollm2, stored, before, after, message):
    row, extraction, _ = stored
    other = extraction["chat_template"].replace(before, after)
    assert other != extraction["chat_template"]
    with pytest.raises(AlignmentError, match=f"this chat template does not fit the extraction: ({message})"):
        align_row(row, smollm2[1], extraction, other)


def test_changed_messages_do_not_match_the_checksum(smollm2, stored):
    row, extraction, _ = stored
    changed = {**row, "messages": to_stored(assistant("Paris, Texas"))}
    with pytest.raises(AlignmentError, match=r"column alignment_checksum: .* is not the one extracted"):
        align_row(changed, smollm2[1], extraction)


REFUSING = "{% if 'Rome' in messages[1].content %}{{ raise_exception('not that one') }}{% endif %}"
FAULTS = {
    "other words": ({"messages": to_stored(assistant("Paris, Texas"))}, "column alignment_checksum: the rebuilt"),
    "fewer tokens": ({"num_tokens": 2}, "column num_tokens: found 2, expected 3 extracted tokens"),
    "a message of another form": ({"messages": [{"content": "Q"}]}, "column messages: found {'content': 'Q'}"),
    "tools that are no JSON": ({"tools": "["}, "column tools: not JSON"),
    "refused": (
        {"messages": to_stored(assistant("Rome"))},
        "the conversation cannot be rebuilt: the chat template refuses it: not that one",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_of_many_rows_the_one_at_fault_is_named(smollm2, stored, changes, message):
    """By its number in the dataset where the caller knows it, else by its source row, and it says which."""
    row, extraction, _ = stored
    recorded = {**extraction, "chat_template": REFUSING + extraction["chat_template"], "keep_end_of_turn": None}
    rows = [{**row, "source_index": 3 * i} for i in range(70)]  # more than are rendered together
    rows[66] = {**rows[66], **changes}
    aligner = RowAligner(smollm2[1], SimpleNamespace(**recorded))
    assert len(aligner.align_all(rows[:66], range(66))) == 66
    for numbers, name in ((range(100, 170), "row 166"), (None, "source row 198")):
        with pytest.raises(AlignmentError) as error:
            aligner.align_all(rows, numbers)
        assert str(error.value).startswith(f"{name}: {message}")
    with pytest.raises(AlignmentError, match=r"^row 5: "):
        aligner.align(rows[66], 5)


def test_a_template_that_does_not_parse_is_no_fault_of_a_row(smollm2, stored):
    row, extraction, _ = stored
    with pytest.raises(UsageError, match=r"^chat template, line 1: ") as error:
        align_row(row, smollm2[1], extraction, "{% if %}")
    assert "row" not in str(error.value)
