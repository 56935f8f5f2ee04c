"""Source rows once: read once, rendered once and proven once by transformers, tokenized together."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import CONVERSATIONS, MODEL, TEMPLATE

import extract_logits
from chat_logits.data import templates
from chat_logits.data.alignment import AT_ONCE, Aligner
from chat_logits.data.config import SourceConfig
from chat_logits.data.json_rows import JsonRows
from chat_logits.data.reader import open_reader
from chat_logits.data.source import FIRST_ROWS, open_source
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import load_tokenizer, skipped_token_ids
from chat_logits.model.limits import InputLimits

ROWS, SHARD = 50, 20
PREFIXES = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def counted(monkeypatch, function: str) -> Counter:
    """How often each conversation was rendered by a function of ``templates``, by its last message."""
    counts, render = Counter(), getattr(templates, function)

    def counting(text, conversation, *arguments):
        counts[conversation[-1]["content"]] += 1
        return render(text, conversation, *arguments)

    monkeypatch.setattr(templates, function, counting)
    return counts


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(str(TEMPLATE), id="generation blocks"),
        pytest.param(None, id="a shipped one for the spans and the model's own for the proof"),
        pytest.param(PREFIXES, id="prefixes end in the question or the answer"),
    ],
)
def test_a_source_row_is_read_and_rendered_once(small_model, tmp_path, monkeypatch, template):
    renderings, proofs = counted(monkeypatch, "render"), counted(monkeypatch, "text_by_transformers")
    reads, read = Counter(), JsonRows.read

    def counting(rows, first, end):
        source_rows = read(rows, first, end)
        reads.update(range(first, first + len(source_rows)))
        return source_rows

    monkeypatch.setattr(JsonRows, "read", counting)
    options = ["--model_id", str(small_model), "--dataset_id", str(CONVERSATIONS), "--max_samples", str(ROWS)]
    options += ["--rows_per_shard", str(SHARD), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    options += ["--chat_template", template] if template else []
    assert extract_logits.main(options) == 0
    assert reads == dict.fromkeys(range(ROWS), 1)
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines()[FIRST_ROWS:ROWS]
    answers = [json.loads(line)["conversations"][1]["value"] for line in lines]
    assert {renderings[answer] for answer in answers} == {proofs[answer] for answer in answers} == {1}


SPEAKERS = """{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}
{% elif m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}

{% elif m.role == 'note' %}{{ raise_exception('one note is the most') if loop.index > 1 else m.content }}
{% endif %}{% endfor %}"""


def test_a_conversation_with_a_turn_that_the_template_does_not_show_is_skipped(chat_file):
    """Whatever its words: "Yes" stands in the answer as well. What the template refuses to be asked is looked up."""
    asked, answer = ("user", "Right?"), ("assistant", "Yes, it is.")
    talks = [
        [asked, answer],
        [("system", "Yes"), asked, answer],
        [asked, ("tool", "7"), answer],
        [("system", "  "), asked, answer],
        [("note", "Be brief."), asked, answer],
        [asked, ("note", "Be brief."), answer],
        [("narrator", "Once upon a time"), asked, answer],
    ]
    rows = [{"messages": [dict(zip(("role", "content"), turn, strict=True)) for turn in talk]} for talk in talks]
    config = SourceConfig(dataset_id=str(chat_file(rows)), chat_template=SPEAKERS)
    reader = open_reader(config, load_tokenizer(str(MODEL)), InputLimits(49_152, None))
    assert [aligned.source_index for aligned in reader.first_ready] == [0, 3, 4]
    assert reader.first_skipped == [
        {"row": 1, "reason": "a turn of role 'system', of which the chat template shows nothing"},
        {"row": 2, "reason": "a turn of role 'tool', of which the chat template shows nothing"},
        {"row": 5, "reason": "the chat template refuses it: one note is the most"},
        {"row": 6, "reason": "unknown speaker 'narrator'", "place": "chats.jsonl, line 7"},
    ]


@pytest.mark.parametrize("known", [0, 3, 32])
@pytest.mark.parametrize(("first", "end"), [(0, 10), (2, 4), (5, 40), (32, 40), (33, 36), (38, 60), (70, 80)])
def test_rows_read_at_the_start_come_in_their_places(tmp_path, known, first, end):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"i": {i}}}\n' for i in range(45)), encoding="utf-8")
    source = open_source(str(file))
    assert [row["i"] for row in source.first_rows] == list(range(FIRST_ROWS))
    source.first_rows = source.first_rows[:known] if known else source.first_rows
    assert [row["i"] for row in source.read(first, end)] == list(range(45))[first:end]


def test_texts_tokenized_together_are_aligned_as_each_alone(source_rows):
    """More than a batch, of all lengths, after a call that has left padding and truncation switched on."""
    tokenizer = load_tokenizer(str(MODEL))
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"), tokenizer.special_tokens_map, {})
    aligner = Aligner(tokenizer, template, skipped_token_ids(tokenizer))
    talks = [[dict(zip(("role", "content"), turn, strict=True)) for turn in _turns(row)] for row in source_rows]
    talks = [*talks[: AT_ONCE - 1], [{"role": "user", "content": ""}], *talks[AT_ONCE - 1 : 150]]
    together = aligner.align_rendered([template.render(talk) for talk in talks])
    assert len(together) == len(talks) > 2 * AT_ONCE
    for talk, alignment in zip(talks, together, strict=True):
        ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        assert alignment.input_ids.tolist() == ids
        assert np.array_equal(alignment.positions, aligner.align(talk).positions)
    assert aligner.align_rendered([]) == []


def _turns(row: dict) -> list[tuple[str, str]]:
    question, answer = (turn["value"] for turn in row["conversations"])
    return [("user", question), ("assistant", answer)]
