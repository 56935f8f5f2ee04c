"""What of a dataset is not read, and that this is told."""

import logging

import pandas as pd
import pytest
from conftest import MODEL, TEMPLATE

from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
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


def test_thoughts_that_the_template_does_not_read_are_told_once(opened, chat_file, tmp_path, caplog):
    rows = [{"messages": [{"role": "user", "content": "Is it?"}, THOUGHT]}] * 3
    opened(chat_file(rows))
    told = "The chat template reads no 'reasoning_content': the model sees the answers without these thoughts"
    assert caplog.messages.count(told) == 1
    caplog.clear()
    showing = TEMPLATE.read_text().replace("message.content", "message.thinking | default('') + message.content")
    (tmp_path / "showing.jinja").write_text(showing)
    reader = opened(chat_file(rows), tmp_path / "showing.jinja")
    shown = load_tokenizer(str(MODEL)).decode(reader.first_ready[0].input_ids)
    assert ("Is it? Yes." in shown) and told not in caplog.messages
