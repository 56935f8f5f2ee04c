"""What of a dataset is not read, and that this is told."""

import logging

import pandas as pd
import pytest
from conftest import MODEL, TEMPLATE

from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.remarks import SPECIAL, THOUGHTS, UNASKED
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.model.limits import InputLimits

ROWS = {"question": ["Is it?", "And that?"], "answer": ["It is.", "That, too."]}
THOUGHT = {"role": "assistant", "content": "It is.", "reasoning_content": "Is it? Yes."}


@pytest.fixture
def opened(caplog):
    """The reader of a file, and what is told of it."""
    caplog.set_level(logging.INFO, logger="chat_logits")

    def read(path, template=TEMPLATE):
        config = SourceConfig(dataset_id=str(path), chat_template=str(template))
        return open_reader(config, load_tokenizer(str(MODEL)), InputLimits(49_152, None))

    return read


@pytest.mark.parametrize("index", [[0, 1], ["first", "second"]])
def test_a_column_without_a_name_is_no_column_of_tools(opened, tmp_path, index):
    """The row numbers or names that pandas writes by default."""
    read = []
    for name, has_index in (("with.csv", True), ("without.csv", False)):
        pd.DataFrame(ROWS, index=index).to_csv(tmp_path / name, index=has_index)
        reader = opened(tmp_path / name)
        assert not reader.first_skipped
        read.append([(one.messages, one.tools, one.input_ids.tolist()) for one in reader.first_ready])
    assert read[0] == read[1] and len(read[0]) == 2


def test_columns_that_are_not_read_are_named(opened, chat_file, caplog):
    row = {"question": "Where?", "context": "It rains in Zaragoza.", "answer": "There.", "id": 7}
    reader = opened(chat_file([row]))
    assert [message["content"] for message in reader.first_ready[0].messages] == ["Where?", "There."]
    assert "Columns: question, answer; not read: context, id" in caplog.messages
    caplog.clear()
    opened(chat_file([{"question": "Where?", "answer": "There."}]))
    assert not [message for message in caplog.messages if message.startswith("Columns")]


QWEN3 = TEMPLATE.with_name("qwen3.jinja")
SHOWING = TEMPLATE.read_text().replace("message.content", "message.thinking | default('') + message.content")
ASKED, PLAIN = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}
WITHIN = {"role": "assistant", "content": "<think>\nIs it? Yes.\n</think>\n\nIt is."}
ENDING = {"role": "user", "content": "What is <|im_end|>?"}


@pytest.mark.parametrize(
    ("template", "talk", "words", "found", "remark"),
    [
        (TEMPLATE, [ASKED, THOUGHT], "Yes.", 0, THOUGHTS),
        (SHOWING, [ASKED, THOUGHT], "Yes.", 1, None),
        (TEMPLATE, [ASKED, WITHIN], "Yes.", 1, None),
        (QWEN3, [ASKED, THOUGHT], "Yes.", 1, None),
        (QWEN3, [ASKED, THOUGHT, ASKED, PLAIN], "Yes.", 0, THOUGHTS),
        (QWEN3, [ASKED, WITHIN, ASKED, PLAIN], "Yes.", 0, THOUGHTS),
        (TEMPLATE, [ENDING, PLAIN], "<|im_end|>", 4, SPECIAL),
        (TEMPLATE, [ASKED, PLAIN, ASKED, PLAIN], "<|im_end|>", 5, None),
        (TEMPLATE, [PLAIN, ASKED, PLAIN], "<|im_start|>assistant\nIt is.", 2, UNASKED),
        (TEMPLATE, [{"role": "system", "content": "Be brief."}, PLAIN], "user", 0, UNASKED),
    ],
)
def test_what_the_model_reads_otherwise_is_counted(opened, chat_file, caplog, template, talk, words, found, remark):
    """Each kind once, the first time that it is found; ``words`` stand so often in the tokens themselves."""
    reader = opened(chat_file([{"messages": each} for each in ([ASKED, PLAIN], talk, talk)]), template)
    tokenizer = load_tokenizer(str(MODEL))
    for one in reader.first_ready[1:]:
        pieces = "".join(map(tokenizer.decode, one.input_ids.tolist()))
        assert pieces.count(words) == found
    told = [message for message in caplog.messages if message.startswith("From source row")]
    assert told == ([f"From source row 0 on, 2 of 3 conversations have {remark}"] if remark else [])
    reader.align(0, 3)
    assert len([message for message in caplog.messages if message.startswith("From source row")]) == len(told)


def folder_of(folder, files: dict[str, int]):
    """A folder of files with so many conversations each."""
    for name, count in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = pd.DataFrame({"question": ["Is it?"] * count, "answer": ["It is."] * count})
        if name == "dataset_infos.json":
            (folder / name).write_text("{}")
        elif name.endswith(".parquet"):
            rows.to_parquet(folder / name)
        else:
            rows.to_json(folder / name, orient="records", lines=True)
    return folder


@pytest.mark.parametrize(
    ("files", "count", "told"),
    [
        ({"a.jsonl": 2, "b.parquet": 1}, 1, "(train): a.jsonl."),
        ({"train.jsonl": 1, "more.jsonl": 3, "deep/chats.jsonl": 3}, 1, "(train): deep/chats.jsonl, more.jsonl."),
        ({"train.jsonl": 1, "test.jsonl": 3}, 1, ""),
        ({"a.jsonl": 1, "deep/b.jsonl": 3, ".hidden.jsonl": 1, "dataset_infos.json": 1}, 4, ""),
    ],
)
def test_files_of_a_folder_that_are_in_no_split_are_named(opened, tmp_path, caplog, files, count, told):
    """Which formats and names come first is for ``datasets`` to say."""
    reader = opened(folder_of(tmp_path / "data", files))
    assert reader.num_rows == count
    named = [message.partition("splits ")[2] for message in caplog.messages if message.startswith("Not read of")]
    assert named == ([f"{told} Name one, or move them."] if told else [])


def test_a_folder_with_a_formats_name_is_not_taken_for_the_dataset(opened, chat_file, tmp_path, caplog, monkeypatch):
    folder_of(tmp_path, {"json/other.jsonl": 3})
    monkeypatch.chdir(tmp_path)
    assert opened(chat_file([{"question": "Is it?", "answer": "It is."}])).num_rows == 1
    assert not [message for message in caplog.messages if message.startswith("Not read of")]


def test_what_a_card_names_is_its_owners_choice(opened, tmp_path, caplog):
    folder = folder_of(tmp_path / "data", {"a.jsonl": 2, "b.jsonl": 1})
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    assert opened(folder).num_rows == 2
    assert not [message for message in caplog.messages if message.startswith("Not read of")]
