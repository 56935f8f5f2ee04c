"""One bad record is one record: skipped, counted, its place named; a run in which they are the rule ends."""

import json

import pytest
from conftest import POISON, TEMPLATE

import extract_logits
from chat_logits.errors import ToolkitError
from chat_logits.extraction import shard_computer
from chat_logits.extraction.bad_rows import BadRows
from chat_logits.model.teacher import Teacher
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.shard_list import ShardEntry


@pytest.fixture
def extract(quick_model, tmp_path):
    """Status of a run over a file, whose shards have eight source rows."""

    def extracted(source, *more, out="out", model=quick_model) -> int:
        options = {"model_id": model, "dataset_id": source, "output_dir": tmp_path / out, "chat_template": TEMPLATE}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return extract_logits.main([*flags, "--device", "cpu", "--rows_per_shard", "8", *map(str, more)])

    return extracted


def entry(shard: int, rows: int, **bad: int) -> ShardEntry:
    return ShardEntry(f"data/00000/train-{shard:05d}.parquet", rows - sum(bad.values()), skipped=bad, bad=bad)


@pytest.mark.parametrize(
    ("limit", "rows", "most"),
    [(0.01, 50, 10), (0.01, 1000, 10), (0.01, 3000, 30), (0, 3000, 0), (5, 3000, 5), (0.5, 100, 100), (1, 100, 1)],
)
def test_a_share_is_of_the_first_thousand_and_then_of_all(limit, rows, most):
    BadRows(limit, [entry(0, rows, odd=most)]).check()
    if most < rows:
        with pytest.raises(ToolkitError, match=f"{most + 1:,} of {rows:,} source rows are bad, more than"):
            BadRows(limit, [entry(0, rows, odd=most + 1)]).check()


def test_reasons_are_told_the_most_common_first():
    tally = BadRows(0.01, [entry(0, 500, some=4, few=1)])
    tally.add(entry(1, 100, few=1))
    with pytest.raises(ToolkitError, match=r"14 of 700 .* allows: 8 × many; 4 × some; 2 × few\.\nWhat is finished"):
        tally.add(entry(2, 100, many=8))


def line(number: int) -> str:
    return json.dumps({"question": f"What is {number}?", "answer": f"It is {number}."})


def test_bad_lines_are_skipped_counted_and_named(extract, tmp_path, capsys):
    lines = [line(number) for number in range(20)]
    lines[3], lines[11], lines[12] = "{", lines[11].replace("What", "\\ud83d"), '{"question": "Hi", "answer": [7]}'
    lines[5] = json.dumps({"question": "Nothing?", "answer": ""})  # none of the file's fault
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    assert extract(tmp_path / "chats.jsonl") == 0
    told = capsys.readouterr()
    for number, reason in (
        (4, "a line that is not JSON"),
        (12, "half of a surrogate pair"),
        (13, "not a list of messages"),
    ):
        assert f"Skipped: chats.jsonl, line {number}: " in told.err and reason in told.err
    assert "Conversations  16 written, 4 skipped" in told.out and told.err.count("Skipped: ") == 3
    shards = json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]
    assert [sum(shard["bad"].values()) for shard in shards] == [1, 2, 0]
    assert [row["source_index"] for row in open_dataset(str(tmp_path / "out")).rows()] == [
        number for number in range(20) if number not in (3, 5, 11, 12)
    ]


def test_a_run_of_bad_rows_ends_and_goes_on_with_a_higher_limit(extract, tmp_path, capsys):
    lines = [line(number) if number < 40 or number % 2 else "{" for number in range(80)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    for _ in range(2):  # the second time before any model is loaded
        assert extract(tmp_path / "chats.jsonl") == 1
        told = capsys.readouterr().err
        reasons = "12 × a line that is not JSON"
        assert f"12 of 64 source rows are bad, more than --max_bad_rows 0.01 allows: {reasons}" in told
    assert "Loading" not in told
    assert len(list((tmp_path / "out").glob("data/*/[!.]*.parquet"))) == 8
    assert extract(tmp_path / "chats.jsonl", "--max_bad_rows", 0.5) == 0
    assert extract(tmp_path / "chats.jsonl", "--max_bad_rows", 0.5, out="whole") == 0
    found, whole = (list(open_dataset(str(tmp_path / out)).rows()) for out in ("out", "whole"))
    assert found == whole and len(found) == 60
    assert extract(tmp_path / "chats.jsonl", "--max_bad_rows", 19) == 1


def test_a_row_whose_logits_are_not_finite_is_skipped_and_its_neighbours_are_not(extract, poisoned, tmp_path, capsys):
    rows = [json.loads(line(number)) for number in range(12)]
    for number in (2, 9):
        rows[number]["question"] = f"What is a {POISON}?"
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert extract(path, model=poisoned) == 0
    told = capsys.readouterr()
    assert "2 × logits that are not finite" in told.out and "chats.jsonl, line 3: logits that are not" in told.err
    found = list(open_dataset(str(tmp_path / "out")).rows())
    assert [row["source_index"] for row in found] == [number for number in range(12) if number not in (2, 9)]
    assert extract(path, "--max_bad_rows", 1, model=poisoned, out="strict") == 1
    assert "2 × logits that are not finite. Try --dtype float32." in capsys.readouterr().err


def test_a_conversation_that_alone_is_too_large_is_skipped(extract, tmp_path, monkeypatch, capsys):
    """Device memory for 60 tokens; the others share batches as before, and the budget is not made smaller for one."""
    import torch

    forward, batches = Teacher._forward, []

    def small(self, requests, pick):
        lengths = [len(request.input_ids) for request in requests]
        batches.append(len(requests))
        if max(lengths) > 60:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, requests, pick)

    rows = [json.loads(line(number)) for number in range(8)]
    rows[5]["answer"] = "It is five. " * 30
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Teacher, "_forward", small)
    assert extract(path, "--no_prefix_cache", "--batch_tokens", 120) == 0
    told = capsys.readouterr()
    assert "1 × out of memory, even as a batch of one" in told.out
    assert "chats.jsonl, line 6: out of memory, even as" in told.err and "continuing with batches" not in told.err
    assert [row["source_index"] for row in open_dataset(str(tmp_path / "out")).rows()] == [0, 1, 2, 3, 4, 6, 7]
    assert max(batches) > 1


def test_a_conversation_that_cannot_fit_is_not_tried(extract, tmp_path, monkeypatch, capsys):
    """The formula asks for 25 KiB an extracted token; 3 MiB beside the weights have room for the short ones alone."""
    from chat_logits.model import memory

    rows = [json.loads(line(number)) for number in range(8)]
    rows[5]["answer"] = "It is five. " * 100
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tried, compute = [], shard_computer.Batches.compute

    def noted(self, ready):
        tried.extend(aligned.source_index for aligned in ready)
        return compute(self, ready)

    monkeypatch.setattr(memory, "_room", lambda _model, _device: 3 * 2**20)
    monkeypatch.setattr(shard_computer.Batches, "compute", noted)
    assert extract(path, "--batch_tokens", 256, "--logit_memory", 16) == 0
    assert sorted(tried) == [0, 1, 2, 3, 4, 6, 7]
    assert "1 × out of memory, even as a batch of one" in capsys.readouterr().out
