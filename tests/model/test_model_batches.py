"""Shards through a real tiny model: shared prefixes, out-of-memory, errors beside the model, bounded memory."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, make_tiny_model
from runs import assert_alike, rows_in

import extract_logits
from chat_logits.errors import ToolkitError
from chat_logits.extraction import shard_computer
from chat_logits.model import batching, probe
from chat_logits.model import memory as memory_budget
from chat_logits.model.batch_plan import Budget
from chat_logits.model.teacher import Teacher
from chat_logits.storage.dataset import open_dataset

SYSTEM = "You answer in one short sentence, whatever is asked, and never more than that."
ROWS = [{"question": f"What is {i} times {i}?", "answer": f"It is {i * i}." + " Sure." * (i % 5)} for i in range(20)]


@pytest.fixture
def extract(small_model, tmp_path, chat_file):
    """Run the command in this process on rows and give the stored rows."""

    def run(rows, *flags, out="out", **options) -> list[dict]:
        pairs = {"model_id": small_model, "dataset_id": chat_file(rows), "output_dir": tmp_path / out, **options}
        arguments = [str(part) for name, value in pairs.items() for part in (f"--{name}", value)]
        assert extract_logits.main([*arguments, "--device", "cpu", *flags]) == 0
        return rows_in(tmp_path / out)

    return run


def test_shared_prefixes_and_small_pieces_give_the_same_rows(extract):
    plain = extract(ROWS, "--no_prefix_cache", out="plain", system_prompt=SYSTEM)
    cached = extract(ROWS, out="cached", system_prompt=SYSTEM)
    pieces = extract(ROWS, out="pieces", system_prompt=SYSTEM, logit_memory=1, batch_tokens=64)
    assert_alike(cached, plain)
    assert_alike(pieces, plain)


def test_the_prefix_is_computed_once(extract, tmp_path, monkeypatch):
    held = []
    hold = Teacher.hold_prefix
    monkeypatch.setattr(Teacher, "hold_prefix", lambda self, ids: (held.append(len(ids)), hold(self, ids))[1])
    odd = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    chats = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in ROWS
    ]
    extract([*chats, odd])
    assert held[0] == 24 and held[1] > 20 and held[2:] == [0, 0]  # the probe's, the shard's; then none
    assert json.loads((tmp_path / "out" / "extraction.json").read_text())["prefix_cache"] is True


def test_budgets_are_recorded_as_they_were_used(extract, tmp_path):
    extract(ROWS[:3], batch_tokens=100, logit_memory=2)
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert manifest.batch_tokens == 100
    assert manifest.batch_logit_rows == 2 * 2**20 // (49_152 * 4)


def test_out_of_memory_halves_the_batches_and_goes_on(extract, monkeypatch, capsys):
    """A model that has room for 150 padded tokens and no more."""
    plain = extract(ROWS, "--no_prefix_cache", out="plain")
    forward = Teacher._forward

    def small(self, requests, pick):
        if max(len(r.input_ids) for r in requests) * len(requests) > 150:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, requests, pick)

    monkeypatch.setattr(Teacher, "_forward", small)
    found = extract(ROWS, "--no_prefix_cache", out="small")
    assert_alike(found, plain)
    said = [line for line in capsys.readouterr().err.splitlines() if "Out of memory: continuing with" in line]
    assert 1 <= len(said) <= 4 and "batches of 384 tokens" in said[0]


def test_halved_batches_grow_again_when_there_is_room(extract, monkeypatch, capsys):
    """Room for 150 padded tokens in the first eight passes, as beside another process that then ends."""
    plain = extract(5 * ROWS, "--no_prefix_cache", "--rows_per_shard", "10", out="plain")
    forward, sizes = Teacher._forward, []

    def short_at_first(self, requests, pick):
        sizes.append(max(len(r.input_ids) for r in requests) * len(requests))
        if len(sizes) <= 8 and sizes[-1] > 150:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, requests, pick)

    monkeypatch.setattr(batching, "GROW_AFTER", 2)
    monkeypatch.setattr(probe, "probe_model", lambda _model: batching.Sharing(prefix=False))
    monkeypatch.setattr(Teacher, "_forward", short_at_first)
    found = extract(5 * ROWS, "--no_prefix_cache", "--rows_per_shard", "10", out="found")
    assert_alike(found, plain)
    assert "Out of memory: continuing with" in capsys.readouterr().err
    assert max(sizes[8:]) > 300  # once more a batch is as large as a shard


def test_memory_that_another_process_has_for_a_while_costs_no_row(extract, monkeypatch, capsys):
    """A card that says others have its memory, in which nothing finds room at the first nine attempts."""
    plain = extract(ROWS[:3], out="plain")
    forward, attempts = Teacher._forward, []

    def taken(self, requests, pick):
        attempts.append(requests)
        if len(attempts) <= 9:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, requests, pick)

    monkeypatch.setattr(probe, "probe_model", lambda _model: batching.Sharing(prefix=False))
    monkeypatch.setattr(batching, "is_taken_by_others", lambda *_: True)
    monkeypatch.setattr(batching, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(Teacher, "_forward", taken)
    assert_alike(extract(ROWS[:3], out="found"), plain)
    assert "Out of memory because another process uses it: trying again in 0 s" in capsys.readouterr().err


def test_memory_that_another_process_keeps_ends_the_run_and_loses_no_row(
    small_model, tmp_path, chat_file, monkeypatch, capsys
):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    options = ("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--output_dir", tmp_path / "out")
    options = [*map(str, options), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(probe, "probe_model", lambda _model: batching.Sharing(prefix=False))
        patch.setattr(batching, "is_taken_by_others", lambda *_: True)
        patch.setattr(batching, "PAUSES", (0,))
        patch.setattr(Teacher, "_forward", full)
        assert extract_logits.main(options) == 1
    assert "another process uses its memory. End that process; the same command resumes" in capsys.readouterr().err
    assert extract_logits.main(options) == 0
    assert [row["source_index"] for row in rows_in(tmp_path / "out")] == list(range(len(ROWS)))


def test_out_of_memory_with_one_conversation_says_what_to_do(small_model, tmp_path, chat_file, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(batching, "Budget", lambda tokens, logit_rows: Budget(tokens, min(logit_rows, 4)))
    monkeypatch.setattr(probe, "probe_model", lambda _model: batching.Sharing(prefix=False))
    monkeypatch.setattr(Teacher, "_forward", full)
    options = ("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--output_dir", tmp_path / "out")
    assert extract_logits.main([*map(str, options), "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert f"{len(ROWS)} of {len(ROWS)} source rows are bad" in message
    assert f"{len(ROWS)} × out of memory, even as a batch of one. A lower" in message
    assert "--max_length" in message and "chats.jsonl, line 1: out of memory" in message


@pytest.mark.parametrize(("place", "name"), [("reader", "read"), ("shard_computer", "write_shard")])
def test_an_error_beside_the_model_stops_the_run_with_its_own_message(
    small_model, tmp_path, chat_file, monkeypatch, capsys, place, name
):
    """The disk is full, or the source cannot be read on, in one of the threads at the model's side."""
    from chat_logits.data.reader import Reader

    def failing(*_arguments):
        raise OSError(28, "No space left on device")

    owner = Reader if place == "reader" else shard_computer
    monkeypatch.setattr(owner, name, failing)
    options = ("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--output_dir", tmp_path / "out")
    assert extract_logits.main([*map(str, options), "--device", "cpu"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_batch_that_fails_leaves_no_shard_with_rows_missing(small_model, tmp_path, chat_file, monkeypatch, capsys):
    """The last batch of a shard fails in the writing thread, with the shard's end queued behind it."""
    encode, calls = shard_computer.encode, []

    def failing(encoding, members, pending):
        calls.append(members)
        if sum(map(len, calls)) == len(ROWS):
            time.sleep(0.5)
            raise ToolkitError("the model's logits are not finite")
        return encode(encoding, members, pending)

    monkeypatch.setattr(shard_computer, "encode", failing)
    options = ("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--output_dir", tmp_path / "out")
    assert extract_logits.main([*map(str, options), "--device", "cpu", "--batch_tokens", "100"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert len(calls) > 2 and not list((tmp_path / "out").glob("data/*/*.parquet"))


def test_what_was_read_before_a_reading_error_is_written(small_model, tmp_path, chat_file, monkeypatch):
    from chat_logits.data.reader import Reader

    read = Reader.read

    def failing(self, first, end):
        if first >= 16:
            raise OSError("the source is gone")
        return read(self, first, end)

    monkeypatch.setattr(Reader, "read", failing)
    options = ("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--output_dir", tmp_path / "out")
    assert extract_logits.main([*map(str, options), "--device", "cpu", "--rows_per_shard", "8"]) == 1
    dataset = open_dataset(str(tmp_path / "out"))
    assert [dataset.read_row(i)["source_index"] for i in range(dataset.num_rows)] == list(range(16))


def test_no_room_for_a_shared_prefix_goes_without(extract, monkeypatch):
    plain = extract(ROWS, "--no_prefix_cache", out="plain", system_prompt=SYSTEM)
    hold = Teacher.hold_prefix

    def full(self, ids):
        if len(ids) > 20:
            raise torch.OutOfMemoryError("tried to allocate")
        hold(self, ids)

    monkeypatch.setattr(Teacher, "hold_prefix", full)
    assert_alike(extract(ROWS, out="full", system_prompt=SYSTEM), plain)


HARD_CASE = r"""
import json, re, resource, sys
import extract_logits
from chat_logits.model import memory as memory_budget
from chat_logits.extraction import shard_computer
from chat_logits.model.batch_plan import Budget

seen = {}
run_shards = shard_computer.run_shards
def measured(model, manifest, *rest):
    budget = Budget(manifest.batch_tokens, manifest.batch_logit_rows)
    seen["formula"] = memory_budget.peak_memory(model, budget, 8000, 8000, manifest.prefix_cache)
    with open("/proc/self/statm") as file:
        seen["before"] = int(file.read().split()[1]) * resource.getpagesize()
    run_shards(model, manifest, *rest)
    # Not ru_maxrss: a process begins with its parent's.
    seen["peak"] = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
shard_computer.run_shards = measured
status = extract_logits.main(sys.argv[1:])
print("SEEN", json.dumps({**seen, "status": status}))
"""


def test_memory_stays_below_its_formula_on_a_hard_case(tmp_path, chat_file):
    """262,144 vocabulary rows, one conversation of about 8,000 tokens among short ones, 256 MiB for logits."""
    model = make_tiny_model(tmp_path / "wide", max_position_embeddings=9000)
    rows = [*ROWS, {"question": "Go on.", "answer": "word " * 7900}]
    options = ("--model_id", model, "--dataset_id", chat_file(rows), "--output_dir", tmp_path / "out")
    command = [sys.executable, "-c", HARD_CASE, *options, "--logit_memory", "256", "--device", "cpu", "--top_k", "8"]
    done = subprocess.run(list(map(str, command)), cwd=REPO, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    seen = json.loads(line.removeprefix("SEEN "))
    assert seen["status"] == 0, done.stderr
    dataset = open_dataset(str(tmp_path / "out"))
    assert max(dataset.read_row(i)["num_tokens"] for i in range(dataset.num_rows)) > 7000
    assert seen["peak"] - seen["before"] <= seen["formula"], seen
    whole = 7900 * 262_144 * 4
    assert seen["peak"] - seen["before"] < whole / 4, seen


def test_the_default_budget_follows_what_the_device_has(small_model, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_model)
    weights, budgets = sum(weights.nbytes for weights in model.parameters()), []
    for beside in (2**20, 2**30, 2**40):
        monkeypatch.setattr(memory_budget, "total_memory", lambda _device, beside=beside: weights + beside)
        budgets.append(memory_budget.choose_budget(model, None, None))
    assert budgets[0].tokens < budgets[1].tokens <= budgets[2].tokens == memory_budget.CPU_TOKENS
    assert budgets[0].logit_rows == 1 and budgets[1].logit_rows < budgets[2].logit_rows
    assert budgets[2].logit_rows * 49_152 * 4 <= 256 * 2**20
    assert memory_budget.choose_budget(model, 7, 1) == Budget(7, 5)


def test_memory_in_all_does_not_depend_on_the_moment():
    """What /proc/meminfo has for the machine, or less where a group limits this process; the same with some taken."""
    before = memory_budget.total_memory(torch.device("cpu"))
    held = torch.ones(2**26)
    assert memory_budget.total_memory(torch.device("cpu")) == before and held.numel()
    (total,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert 2**28 < before <= int(total) * 1024
