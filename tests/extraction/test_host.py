"""A run whose rows several processes align and several threads write."""

from functools import partial

import numpy as np
import pytest
from runs import files_in, shards_in

import extract_logits
from chat_logits.extraction import shard_computer
from chat_logits.extraction.shard_computer import ReadWriteThreads


def test_with_several_workers_a_run_has_the_same_files(flags, quick_run, tmp_path):
    assert extract_logits.main(flags("out", "--num_cpu_workers", 3)) == 0
    assert files_in(tmp_path / "out") == files_in(quick_run)


def test_after_a_failure_no_shard_is_finished_with_rows_missing(flags, quick_run, tmp_path, monkeypatch):
    """The encoding of one batch fails, while others are encoded and written beside it."""
    encode, calls = shard_computer.append_rows, iter(range(1_000_000))

    def failing(*arguments):
        if next(calls) == 25:
            raise MemoryError("no room")
        encode(*arguments)

    monkeypatch.setattr(shard_computer, "append_rows", failing)
    assert extract_logits.main(flags("out", "--num_cpu_workers", 3)) == 1
    right = files_in(quick_run)
    written = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in shards_in(tmp_path / "out")}
    assert 0 < len(written) < len(shards_in(quick_run))
    assert all(right[name] == content for name, content in written.items())


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
