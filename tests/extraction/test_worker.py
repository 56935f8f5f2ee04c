"""One worker without Ray: shards given from several threads, failures that pass, and places that are not the run's."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
from runs import files_in, options_for

from chat_logits.errors import ToolkitError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import WORKERS
from chat_logits.extraction.run_description import open_run
from chat_logits.extraction.worker import ShardWorker, assign
from chat_logits.storage import shard as shard_files
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard_list import shard_path


@pytest.fixture
def assignment(quick_model, calm_source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORKERS).write_text("ours")
    config = ExtractConfig(**options_for(quick_model, calm_source, tmp_path / "out"))
    return assign(open_run(config), tmp_path / "out", "ours")


@pytest.fixture
def worker(assignment):
    with closing(ShardWorker()) as worker:
        worker.load(assignment)
        yield worker


@pytest.fixture
def manifest(quick_run) -> Manifest:
    return Manifest.read(quick_run / "extraction.json", str(quick_run))


def test_shards_given_from_several_threads_are_those_of_the_plain_run(worker, manifest, quick_run, tmp_path):
    worker.begin(manifest)
    wanted = [7, 3, 59, 4, 0]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(worker.compute, wanted))
    assert [entry.shard for entry, _ in answers] == wanted
    there = files_in(quick_run)
    assert files_in(tmp_path / "out") == {
        name: there[name] for name in (shard_path("train", shard) for shard in wanted)
    }


def test_after_a_shard_without_rows_has_failed_the_worker_goes_on(worker, manifest, tmp_path):
    worker.begin(manifest)
    with pytest.raises(ToolkitError, match="the source has changed since it was opened"):
        worker.compute(1000)
    assert worker.compute(5)[0].shard == 5
    (tmp_path / "out" / WORKERS).write_text("another driver's")
    for _ in range(2):
        with pytest.raises(ToolkitError, match="does not see the run in `output_dir`"):
            worker.compute(6)
    assert list(files_in(tmp_path / "out")) == [shard_path("train", 5)]


def test_a_worker_thought_dead_gives_no_shard_its_name_in_the_next_runs_folder(worker, manifest, tmp_path, monkeypatch):
    """It has begun to write when another process takes the folder over."""
    worker.begin(manifest)

    def late(path, table, metadata):
        write_table(path, table, metadata)
        (tmp_path / "out" / WORKERS).write_text("another driver's")

    write_table = shard_files._write_table
    monkeypatch.setattr(shard_files, "_write_table", late)
    with pytest.raises(ToolkitError, match="does not see the run in `output_dir`"):
        worker.compute(6)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != WORKERS]


def test_a_folder_that_is_not_the_runs_is_refused_before_any_work(assignment, manifest, tmp_path):
    for elsewhere in (replace(assignment, folder=tmp_path / "missing"), replace(assignment, token="older")):
        worker = ShardWorker()
        worker.load(elsewhere)
        with pytest.raises(ToolkitError, match="give a folder that all machines share, or leave `output_dir` out"):
            worker.begin(manifest)


def test_a_machine_that_would_make_other_rows_is_refused(worker, manifest):
    with pytest.raises(ToolkitError, match=r"would make other rows than the run .*seed: 5 there, 0 here"):
        worker.begin(replace(manifest, seed=5))
