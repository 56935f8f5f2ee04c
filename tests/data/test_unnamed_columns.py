"""A column without a name, such as the row numbers that pandas writes first."""

import pandas as pd
import pytest
from conftest import MODEL, TEMPLATE

from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.model.limits import InputLimits

ROWS = {"question": ["Is it?", "And that?"], "answer": ["It is.", "That, too."]}


@pytest.mark.parametrize("index", [[0, 1], ["first", "second"]])
def test_a_column_without_a_name_is_no_column_of_tools(tmp_path, index):
    """As pandas writes it by default, and without."""
    read = []
    for name, has_index in (("with.csv", True), ("without.csv", False)):
        pd.DataFrame(ROWS, index=index).to_csv(tmp_path / name, index=has_index)
        config = SourceConfig(dataset_id=str(tmp_path / name), chat_template=str(TEMPLATE))
        reader = open_reader(config, load_tokenizer(str(MODEL)), InputLimits(49_152, None))
        assert not reader.first_skipped
        read.append([(one.messages, one.tools, one.input_ids.tolist()) for one in reader.first_ready])
    assert read[0] == read[1] and len(read[0]) == 2
