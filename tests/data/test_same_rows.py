"""The same rows with tools, nulls and text parts, in JSON, in Arrow and made by ``datasets``: the same tokens."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MODEL, REPO

import extract_logits
from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.model.limits import InputLimits
from chat_logits.storage.dataset import open_dataset

QWEN = str(REPO / "templates" / "qwen2_5.jinja")
ROWS = 200
ARGUMENTS = [{"city": "Oslo"}, {"near": {"place": "Bergen", "within": [1, 2]}, "k": 3}, {}, {"k": 7}]


def tool(number: int) -> dict:
    properties = [
        {"city": {"type": "string", "description": "Où?"}},
        {"near": {"type": "object", "properties": {"place": {"type": "string"}}}, "k": {"type": "integer"}},
        {},
        {"k": {"type": "integer", "enum": [3, 7]}},
    ][number % 4]
    parameters = {"type": "object", "properties": properties} | ({"required": ["k"]} if number % 4 == 3 else {})
    function = {"name": f"find_{number % 7}", "description": "Finds.", "parameters": parameters}
    return {"type": "function", "function": function | ({"strict": True} if number % 5 == 0 else {})}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def row(number: int) -> dict:
    call = {"id": f"call{number:05}", "type": "function"}
    call |= {"function": {"name": f"find_{number % 7}", "arguments": ARGUMENTS[number % 4]}}
    messages = [
        {"role": "user", "content": parts(f"Question {number}: ", "where?")},
        {"role": "assistant", "content": parts(""), "tool_calls": [call]},
        {"role": "tool", "content": parts(f"{number} degrees"), "tool_call_id": call["id"], "name": "find"},
        {"role": "assistant", "content": parts("It is ", f"{number}."), **({"weight": 1} if number % 3 else {})},
    ]
    if number % 4 == 1:
        messages = [{"role": "system", "content": parts("Be brief.")}, messages[0], messages[3]]
    return {"id": number, "messages": messages, "tools": None if number % 6 == 2 else [tool(number), tool(number + 1)]}


def json_lines(folder, rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def json_text_in_lines(folder, rows):
    """Both columns as JSON text, as writers do who know what Arrow does to objects."""
    texts = [{name: json.dumps(each[name]) for name in ("messages", "tools")} for each in rows]
    json_lines(folder, texts)


def arrow(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=70)


def made_by_datasets(folder, rows):
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")


def json_columns(folder, rows):
    features = datasets.Features({"id": datasets.Value("int64"), "messages": datasets.Json(), "tools": datasets.Json()})
    datasets.Dataset.from_list(rows, features).to_parquet(folder / "a.parquet")


FORMS = [json_text_in_lines, arrow, made_by_datasets, json_columns]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


@pytest.fixture
def written(tmp_path):
    def write(form, rows):
        (tmp_path / form.__name__).mkdir()
        form(tmp_path / form.__name__, rows)
        return tmp_path / form.__name__

    return write


def read(folder, tokenizer, streaming=False) -> list[tuple]:
    config = SourceConfig(dataset_id=str(folder), chat_template=QWEN, streaming=streaming)
    ready, skipped = open_reader(config, tokenizer, InputLimits(49_152, None)).align(0, ROWS)
    assert not skipped
    return [(one.alignment.checksum, one.messages, one.tools) for one in ready]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_checksums_and_the_same_stored_texts(form, written, tokenizer):
    rows = [row(number) for number in range(ROWS)]
    expected = read(written(json_lines, rows), tokenizer)
    assert len(expected) == ROWS == len({checksum for checksum, _, _ in expected})
    folder = written(form, rows)
    assert read(folder, tokenizer) == expected
    assert read(folder, tokenizer, streaming=True) == expected


def test_the_tokens_are_those_of_transformers(written, tokenizer):
    rows, template = [row(number) for number in range(12)], Path(QWEN).read_text(encoding="utf-8")
    config = SourceConfig(dataset_id=str(written(made_by_datasets, rows)), chat_template=QWEN)
    ready, _ = open_reader(config, tokenizer, InputLimits(49_152, None)).align(0, 12)
    for each, aligned in zip(rows, ready, strict=True):
        plain = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in each["messages"]]
        tokens = tokenizer.apply_chat_template(plain, tools=each["tools"], chat_template=template, return_dict=True)
        assert aligned.input_ids.tolist() == tokens["input_ids"]


@pytest.mark.parametrize("form", [json_text_in_lines, json_columns])
def test_nulls_of_the_data_stay_where_they_can_be_told(form, written, tokenizer):
    rows = [row(number) for number in range(40)]
    for each in rows[::2]:
        each["tools"] = [{"name": "find", "parameters": {"k": {"type": "integer", "default": None}}}]
    expected = read(written(json_lines, rows), tokenizer)
    assert '"default":null' in expected[0][2]
    assert read(written(form, rows), tokenizer) == expected


def test_runs_over_all_forms_store_the_same_checksums(written, quick_model, tmp_path):
    """Through the command."""
    rows, stored = [row(number) for number in range(ROWS)], {}
    for form in (json_lines, arrow, made_by_datasets):
        out = tmp_path / f"{form.__name__}-out"
        options = {"model_id": quick_model, "dataset_id": written(form, rows), "output_dir": out, "chat_template": QWEN}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert extract_logits.main([*flags, "--device", "cpu", "--top_k", "2", "--num_sampled", "1"]) == 0
        stored[form] = [
            (found["alignment_checksum"], found["tools"], found["messages"]) for found in open_dataset(str(out)).rows()
        ]
    assert len(stored[json_lines]) == ROWS and stored[json_lines] == stored[arrow] == stored[made_by_datasets]
