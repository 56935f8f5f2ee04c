"""A run whose rows several processes align, encode and write."""

import json
import threading
from concurrent.futures import wait
from functools import partial

import numpy as np
import pytest
from runs import files_in, shards_in

import extract_logits
from chat_logits.extraction import shard_computer
from chat_logits.extraction.shard_computer import ReadWriteThreads, default_workers


def test_with_several_workers_a_run_has_the_same_files(flags, quick_run, tmp_path):
    assert extract_logits.main(flags("out", "--num_cpu_workers", 3)) == 0
    assert files_in(tmp_path / "out") == files_in(quick_run)


def test_after_a_failure_no_shard_is_finished_with_rows_missing(flags, quick_run, tmp_path, monkeypatch):
    """The encoding of one batch fails, while others are encoded and written beside it."""
    encode, calls = shard_computer.encode, iter(range(1_000_000))

    def failing(*arguments):
        if next(calls) == 25:
            raise MemoryError("no room")
        return encode(*arguments)

    monkeypatch.setattr(shard_computer, "encode", failing)
    assert extract_logits.main(flags("out", "--num_cpu_workers", 3)) == 1
    assert 0 < len(shards_in(tmp_path / "out")) < len(shards_in(quick_run))
    assert_shards_of(tmp_path / "out", quick_run)


def test_a_process_that_dies_ends_the_run_which_goes_on_later(flags, quick_run, tmp_path, monkeypatch, capsys):
    """As the system ends one where memory is short: nothing hangs, and what is written is right."""
    started = []
    start = shard_computer.start_encoding
    monkeypatch.setattr(shard_computer, "start_encoding", lambda count: started.append(start(count)) or started[-1])
    encode, calls = shard_computer.encode, iter(range(1_000_000))

    def killing(*arguments):
        if next(calls) == 25:
            for helper in started[0].helpers.processes:
                helper.process.kill()
        return encode(*arguments)

    monkeypatch.setattr(shard_computer, "encode", killing)
    assert extract_logits.main(flags("out", "--num_cpu_workers", 3)) == 1
    assert "a process that encodes and writes ended: -9" in capsys.readouterr().err
    assert_shards_of(tmp_path / "out", quick_run)
    monkeypatch.undo()
    assert extract_logits.main(flags("out", "--num_cpu_workers", 2)) == 0
    assert files_in(tmp_path / "out") == files_in(quick_run)


def assert_shards_of(folder, right_folder):
    """All of the shards in a folder are those of the other, byte for byte, and no other file is among them."""
    right = files_in(right_folder)
    written = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "data").rglob("*.*")}
    assert all(right[name] == content for name, content in written.items())


def test_bad_rows_are_told_by_processes_as_here(small_model, chat_file, tmp_path, monkeypatch):
    """Logits that are not finite, of some conversations: skipped with their reason, whoever encodes."""
    from chat_logits.model import batching

    select = batching.Teacher.distributions

    def spoiling(self, requests, settings):
        found = select(self, requests, settings)
        ends = np.cumsum([len(request.positions) for request in requests])
        for request, end in zip(requests, ends, strict=True):
            if len(request.positions) % 2:
                found._tensors["logsumexp"][end - 1] = float("nan")
        return found

    monkeypatch.setattr(batching.Teacher, "distributions", spoiling)
    rows = [{"question": f"Say {n}.", "answer": "word " * n} for n in range(1, 30)]
    for name, workers in (("one", 1), ("three", 3)):
        options = ("--model_id", small_model, "--dataset_id", chat_file(rows), "--output_dir", tmp_path / name)
        more = ("--device", "cpu", "--num_cpu_workers", workers, "--rows_per_shard", 10, "--max_bad_rows", 100)
        assert extract_logits.main([*map(str, (*options, *more))]) == 0
    assert files_in(tmp_path / "one") == files_in(tmp_path / "three")
    entries = json.loads((tmp_path / "one" / "shards.json").read_text())
    assert 0 < sum(sum(entry["bad"].values()) for entry in entries["shards"]) < 29


@pytest.mark.parametrize("writers", [1, 4])
def test_a_task_waits_for_those_before_it(writers):
    """Whatever the order in which tasks are done, one that is to come after others finds all of them done."""
    done, seen, rng = [], [], np.random.default_rng(writers)

    def work(group: int, size: int) -> None:
        np.ones(size).sum()
        done.append(group)

    with ReadWriteThreads(writers) as threads:
        for group in range(30):
            sizes = rng.integers(1, 200_000, rng.integers(1, 6))
            before = [threads.write(partial(work, group, size)) for size in sizes]
            threads.write(lambda group=group, before=before: seen.append(done.count(group) == len(before)), before)
        threads.wait_for_writing()
    assert seen == [True] * 30


@pytest.mark.parametrize(
    ("cores", "devices", "of", "workers"),
    [(16, 1, 1, 4), (12, 1, 1, 3), (2, 1, 1, 1), (16, 1, 4, 1), (192, 1, 8, 4), (26, 8, 8, 4), (64, 2, 8, 4)],
)
def test_a_model_has_a_quarter_of_the_cores_for_its_devices(cores, devices, of, workers):
    assert default_workers(cores, devices, of) == workers


def test_the_wait_for_rows_is_one_whichever_shard_is_written_first(monkeypatch):
    """A shard takes long, the one behind it is done: the model's thread sleeps until there are rows, or a failure."""
    gate, done = threading.Event(), []

    def noting(futures, **how):
        done.append([future.done() for future in futures])
        gate.set()
        return wait(futures, **how)

    monkeypatch.setattr(shard_computer, "wait", noting)
    with ReadWriteThreads(2) as threads:
        threads.write(partial(gate.wait, 60))
        threads.write(lambda: None).result()
        assert threads._wait_for_reading(threads._reading.submit(gate.wait, 60))
    assert done[0] == [False, False]
