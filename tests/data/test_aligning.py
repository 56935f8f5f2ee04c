"""Rows aligned by processes: what the reader itself makes of them, and no process left behind."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from conftest import CONVERSATIONS, MODEL

from chat_logits.data.aligning import AlignProcesses, start_aligning
from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError
from chat_logits.model.limits import InputLimits


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Of 80 conversations, some of which are not: no answer, an unknown role, a lone half of a surrogate pair."""
    path = tmp_path_factory.mktemp("aligning") / "chats.jsonl"
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines()[:80]
    lines[40], lines[50] = json.dumps({"conversations": []}), "{"
    lines[60] = json.dumps({"conversations": [{"from": "weather", "value": "rain"}, {"from": "gpt", "value": "Yes."}]})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_reader(SourceConfig(dataset_id=str(path)), load_tokenizer(str(MODEL)), InputLimits(49_152, None))


@pytest.fixture
def processes(reader):
    aligning = AlignProcesses(reader, 2)
    yield aligning
    aligning.close()
    assert all(process.process.poll() is not None for process in aligning.helpers.processes)


def test_processes_align_as_the_reader_does(reader, processes):
    futures = [(first, processes.submit(*reader.read(first, first + 20))) for first in range(0, 80, 20)]
    found = [reader.complete(first, first + 20, *future.result()) for first, future in futures]
    right_ready, right_skipped = reader.align(0, 80)
    ready = [aligned for part, _ in found for aligned in part]
    assert [entry for _, part in found for entry in part] == right_skipped
    assert len(right_skipped) == 3 and len(ready) == 77
    for one, other in zip(ready, right_ready, strict=True):
        assert (one.source_index, one.messages) == (other.source_index, other.messages)
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.positions, other.positions)
        assert one.alignment.checksum == other.alignment.checksum


def test_a_reader_that_cannot_go_to_others_aligns_here(reader, caplog):
    caplog.set_level("INFO")
    aligning = start_aligning(replace(reader, convert=lambda row: reader.convert(row)), 2)
    (ready, _), (right, _) = aligning.submit(*reader.read(40, 45)).result(), reader.align(40, 45)
    assert [one.alignment.checksum for one in ready] == [one.alignment.checksum for one in right]
    assert "aligned in this process, as their reader cannot be sent to others: Can't pickle" in caplog.text


def test_what_a_process_raises_arrives(processes):
    with pytest.raises(AttributeError, match="'int' object has no attribute"):
        processes.submit(0, [7]).result()
    assert processes.submit(0, []).result() == ([], [])  # it lives on


def test_the_death_of_a_process_is_told(reader, processes):
    for one in processes.helpers.processes:
        os.kill(one.process.pid, signal.SIGKILL)
    with pytest.raises(ToolkitError, match="a process that aligns conversations ended: -9"):
        processes.submit(*reader.read(35, 40)).result()
