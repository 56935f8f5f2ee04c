"""Shards on Ray: the same rows as one plain process's, whatever happens to workers and the driver meanwhile."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REPO
from ray_runs import Command, held, is_running, workers_of
from runs import ROWS, SHARDS, files_in, flags_for, shards_in, without

import extract_logits
from chat_logits.storage.dataset import open_dataset


@pytest.fixture
def undisturbed(quick_run) -> dict[str, bytes]:
    return files_in(quick_run)


@pytest.fixture
def gate(tmp_path) -> Path:
    """Where workers that are ``held`` go on as soon as something is there."""
    return tmp_path / "gate"


def wait_for_end(workers: list[int]) -> None:
    """Ray ends what it started, not at the driver's end but soon after; its own agents take a minute."""
    until = time.monotonic() + 120
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_two_workers_give_the_files_of_one_plain_process_though_one_is_killed_in_mid_shard_and_one_hangs(
    flags, undisturbed, gate, tmp_path
):
    hasty = "from chat_logits.extraction import workers; workers.LONG = 30.0"
    slow = held(gate, batches=4, seconds=5)
    run = Command(flags("two", "--num_workers", 2), first=hasty + slow)
    run.until(lambda: run.said.count("has its model") >= 2 and len(shards_in(tmp_path / "two")) > 8)
    before = workers_of(run.process.pid)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    run.until(lambda: run.said.count("has its model") >= 3)
    assert len(set(workers_of(run.process.pid)) - set(before)) == 1
    os.kill(before[1], signal.SIGSTOP)
    gate.touch()
    assert run.wait() == 0, run.said
    assert "it died, or its machine did\nTo be computed again: source rows" in run.said
    assert re.search(r"no answer for \d+ s; the slowest so far took \d+\nTo be computed again", run.said)
    assert "Traceback" not in run.said
    assert files_in(tmp_path / "two") == undisturbed
    assert not is_running(before[1])


def test_stopped_and_then_killed_a_run_goes_on_with_workers_and_then_without(quick_model, calm_source, tmp_path):
    """With paths relative to where the command is given, which workers know by other names: the record has them so."""
    relative = [os.path.relpath(path, REPO) for path in (quick_model, calm_source)]
    out = tmp_path / "out"
    stopped = Command([*flags_for(*relative, out), "--num_workers", "2"], first=held(tmp_path / "never", batches=8))
    stopped.until(lambda: stopped.said.count("has its model") >= 2 and len(shards_in(out)) > 4)
    workers = workers_of(stopped.process.pid)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 143, stopped.said
    finished = len(shards_in(out))
    assert "Traceback" not in stopped.said and f"Stopped. {finished} finished" in stopped.said
    assert len(workers) == 2
    wait_for_end(workers)
    printed = shlex.split(stopped.said.splitlines()[-1])
    assert printed[-2:] == ["--num_workers", "2"]

    killed = Command(printed[2:], first=held(tmp_path / "never", batches=8))
    killed.until(lambda: len(shards_in(out)) > finished + 4)
    workers = workers_of(killed.process.pid)
    killed.process.send_signal(signal.SIGKILL)
    wait_for_end(workers)
    assert workers and len(shards_in(out)) < SHARDS

    with contextlib.chdir(REPO):
        for folder in (out, tmp_path / "plain"):
            assert extract_logits.main(flags_for(*relative, folder)) == 0
    assert files_in(out) == files_in(tmp_path / "plain")
    extraction = json.loads((out / "extraction.json").read_text(encoding="utf-8"))
    assert [extraction["model_id"], extraction["dataset_id"]] == relative


@pytest.fixture
def damaged_source(tmp_path) -> Path:
    """The rows as Parquet, three a row group, with a page of one group overwritten."""
    import pyarrow as pa

    path = tmp_path / "chats.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3, compression="none", use_dictionary=False)
    place = pq.read_metadata(path).row_group(21).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    return path


def test_a_shard_that_fails_three_times_is_told_and_all_others_are_done(flags, damaged_source, quick_run, tmp_path):
    wanted = flags("gap", "--num_workers", 2, "--streaming", "--dataset_id", damaged_source)
    run = Command(wanted)
    assert run.wait() == 1, run.said
    assert "Traceback" not in run.said and "Unhandled" not in run.said
    assert run.said.count("To be computed again: source rows 63 to 65") == 2
    assert "Given up after 3 failures: source rows 63 to 65" in run.said
    told = run.said.splitlines()[-2:]
    assert told[0].startswith("error: 1 of the shards failed 3 times and were left out; all others are done")
    assert re.match(r"source rows 63 to 65; the last because: .*chats\.parquet", told[1])
    expected = [row for row in stored(quick_run) if row["source_index"] // 3 != 21]
    assert stored(tmp_path / "gap") == expected
    assert len(shards_in(tmp_path / "gap")) == SHARDS - 1


def stored(folder: Path) -> list[dict]:
    dataset = open_dataset(str(folder))
    return [dataset.read_row(i) for i in range(dataset.num_rows)]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num_workers", "9999"], r"--num_workers 9999: this machine has \d+ CPUs and no GPU, room for \d+"),
        (["--num_workers", "9999", "--tensor_parallel", "2"], r"and no GPU, room for \d+, each with 2 processes$"),
        (["--num_workers", "2", "--device", "cuda:0"], "each worker gets its own accelerator"),
        (["--gpus_per_worker", "2"], "it goes with --num_workers and --device_map"),
    ],
)
def test_wrong_use_is_told_in_a_line(flags, tmp_path, more, told):
    run = Command(flags("wrong", *more))
    assert run.wait() == 2, run.said
    last = run.said.splitlines()[-1]
    assert last.startswith("error: ") and re.search(told, last)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("more", [["--num_workers", "2"], ["--ray_address", "127.0.0.1:6379"]])
def test_without_ray_its_requirements_are_named(flags, more):
    missing = "from chat_logits.extraction import cluster; cluster.find_spec = lambda name: None"
    run = Command(flags("missing", *more), first=missing)
    assert run.wait() == 2
    assert run.lines == ["error: workers need Ray, which is not installed: pip install -r requirements-ray.txt"]


def test_a_temporary_folder_that_is_too_deep_for_ray_is_told(flags, tmp_path):
    deep = tmp_path / ("deep" * 25)
    deep.mkdir()
    run = Command(flags("out", "--num_workers", 2), env={**os.environ, "TMPDIR": str(deep)})
    assert run.wait() == 1
    assert re.match("error: Ray does not start on this machine: .*TMPDIR", run.said.splitlines()[-1])


def test_an_option_that_is_wrong_for_every_worker_ends_the_run_at_once_as_without_workers(flags, tmp_path):
    wanted = without(
        "--device", flags("wrong", "--num_workers", 2, "--device_map", "auto", "--max_memory", '{"7": "60GiB"}')
    )
    run = Command(wanted)
    assert run.wait() == 2, run.said
    assert run.said.splitlines()[-1].startswith("error: --max_memory: no place '7'. Available: cpu, disk")
    assert "died" not in run.said and not (tmp_path / "wrong").exists()


def test_a_worker_that_cannot_begin_says_why_and_the_run_ends_when_none_can(flags, tmp_path):
    """Their machine has lost the model's weights since the command was given."""
    copy = shutil.copytree(flags("model")[1], tmp_path / "copy")
    first = f"""
import pathlib
from chat_logits.extraction import shard_plan, workers
shard_plan.FIRST_PAUSE, workers.STARTS = 0.01, 2
connect = workers.connect
def late(config):
    pathlib.Path({str(copy)!r}, "model.safetensors").unlink()
    return connect(config)
workers.connect = late
"""
    run = Command(flags("lost", "--num_workers", 2, "--model_id", copy), first=first)
    assert run.wait() == 1, run.said
    assert re.search(r"Worker \d did not begin \(1 of 2 times\): .*model\.safetensors", run.said)
    assert run.said.count("did not begin (2 of 2 times)") == 2 and "died" not in run.said
    assert re.match(r"error: .*model\.safetensors", run.said.splitlines()[-1])


def test_a_stream_without_a_length_is_refused(flags, chat_file):
    source = chat_file([{"question": "Who?", "answer": "Nobody has counted these."}] * 5)  # nor cached them
    run = Command(flags("stream", "--num_workers", 2, "--streaming", "--dataset_id", source))
    assert run.wait() == 2, run.said
    assert "is streamed and its length is not known. Leave out --streaming" in run.said
