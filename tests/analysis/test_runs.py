"""How two runs' records differ, and the record of a dataset's run."""

import datetime
import json
import os

import pytest

from chat_logits.analysis.runs import RunDifference, run_differences, run_record
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import FORMAT_VERSION, Manifest

CONTENT = {
    "format_version": FORMAT_VERSION,
    **{"top_k": 64, "top_p": 0.98, "num_sampled": 16, "seed": 0, "rows_per_shard": 1000, "vocab_size": 1000},
    **{"model_id": "user/model", "model_revision": "a" * 40, "gguf_file": None, "tokenizer_fingerprint": "f" * 64},
    **{"dataset_id": "user/chats", "dataset_config": None, "split": "train", "dataset_revision": "b" * 40},
    **{"max_samples": 12, "max_length": 8192, "columns": {"messages": "conversations"}, "system_prompt": None},
    **{"chat_template": "{{ messages }}", "tools_template": None, "template_kwargs": {}, "template_date": None},
    **{"skipped_token_ids": [0, 1], "all_turns": False, "dtype": "float32", "head_dtype": "float32"},
    "attn_implementation": "sdpa",
}


def of(**changes) -> Manifest:
    return Manifest.from_json({**CONTENT, **changes}, "here")


def differences(first: dict, other: dict) -> list[tuple]:
    return [(each.key, each.first, each.other) for each in run_differences(of(**first), of(**other))]


def test_the_same_record_has_no_differences():
    assert run_differences(of(), of()) == []


def test_only_keys_that_differ_are_told_the_models_first():
    other = {"max_samples": 24, "dtype": "bfloat16", "model_revision": "c" * 40, "chat_template": "{{ messages }}!"}
    assert differences({}, other) == [
        ("model_revision", "a" * 40, "c" * 40),
        ("dtype", "float32", "bfloat16"),
        ("chat_template", "{{ messages }}", "{{ messages }}!"),
        ("max_samples", 12, 24),
    ]


def test_what_one_record_has_alone_is_told_and_objects_go_by_their_paths():
    first = {"versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "template_kwargs": {"thinking": True}}
    other = {"versions": {"torch": "2.11.0", "numpy": "2.4.6"}, "batch_tokens": 768, "of_another_writer": [1]}
    assert sorted(differences(first, other)) == [
        ("batch_tokens", None, 768),
        ("of_another_writer", None, [1]),
        ("template_kwargs.thinking", True, None),
        ("versions.torch", "2.13.0", "2.11.0"),
    ]


@pytest.mark.parametrize(("first", "other", "differ"), [(1, True, True), (1, 1.0, False), ([0], [0], False)])
def test_true_is_no_number(first, other, differ):
    found = run_differences(of(of_another_writer=first), of(of_another_writer=other))
    assert found == ([RunDifference("of_another_writer", first, other)] if differ else [])


def test_a_run_is_told_from_its_record(tmp_path):
    file = tmp_path / "extraction.json"
    file.write_text(json.dumps(CONTENT))
    moment = datetime.datetime(2026, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    os.utime(file, (moment.timestamp(), moment.timestamp()))
    record = run_record(StoredDataset(str(tmp_path), None, Manifest.read(file, "here"), []))
    assert (record.written, record.revision) == ("2026-02-03T04:05:06+00:00", None)
    assert (record.model_id, record.source_id, record.source_split) == ("user/model", "user/chats", "train")
    assert (record.top_k, record.top_p, record.num_sampled, record.dtype) == (64, 0.98, 16, "float32")
    there = run_record(StoredDataset("user/logits", "d" * 40, Manifest.read(file, "here"), []))
    assert (there.written, there.revision) == (None, "d" * 40)
