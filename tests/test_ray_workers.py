"""Shards on Ray: the same rows as one plain process's, whatever happens to workers, nodes and the driver meanwhile."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REPO
from loopback_hub import SIGNATURE, TOKEN, LoopbackHub
from runs import ROWS, SHARDS, files_in, flags_for, shards_in

import extract_logits
from logit_dataset import open_dataset


class Command:
    """The command in a process of its own, with its output in a file."""

    def __init__(self, flags: list[str], log: Path, env=None):
        self.log = log
        with log.open("w") as file:
            command = [sys.executable, "extract_logits.py", *flags]
            self.process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=file, env=env)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def until(self, condition, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.01)


@pytest.fixture
def flags(small_model, calm_source, tmp_path):
    def of(out, *more) -> list[str]:
        return [*flags_for(small_model, calm_source, tmp_path / out), *map(str, more)]

    return of


@pytest.fixture
def undisturbed(calm_run) -> dict[str, bytes]:
    return files_in(calm_run)


def children(pid: int) -> list[int]:
    """All processes below one, those of Ray among them."""
    pairs = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            own, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        pairs.append((int(own.split()[0]), int(rest.split()[1])))
    found, todo = [], [pid]
    while todo:
        below = [own for own, parent in pairs if parent == todo[-1]]
        todo.pop()
        found += below
        todo += below
    return found


def workers_of(pid: int) -> list[int]:
    return [child for child in children(pid) if b"ray::ShardWorker" in command_line(child)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- this machine ---


def test_two_workers_give_the_files_of_one_plain_process_though_one_is_killed_in_mid_shard(
    flags, undisturbed, tmp_path
):
    run = Command(flags("two", "--num_workers", 2), tmp_path / "log")
    run.until(lambda: len(shards_in(tmp_path / "two")) > 8)
    before = workers_of(run.process.pid)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    run.until(lambda: len(set(workers_of(run.process.pid)) - set(before)) == 1)
    assert run.wait() == 0, run.said
    assert "it died, or its machine did" in run.said and "To be computed again: source rows" in run.said
    assert files_in(tmp_path / "two") == undisturbed


def test_the_driver_and_all_workers_killed_a_plain_process_goes_on(flags, undisturbed, tmp_path):
    run = Command(flags("killed", "--num_workers", 2), tmp_path / "log")
    run.until(lambda: len(shards_in(tmp_path / "killed")) > 4)
    workers = workers_of(run.process.pid)
    run.process.kill()
    until = time.monotonic() + 60
    while any(map(is_running, workers)):  # Ray ends what it started; its own agents take a minute
        assert time.monotonic() < until
        time.sleep(0.1)
    assert 4 < len(shards_in(tmp_path / "killed")) < SHARDS
    assert extract_logits.main(flags("killed")) == 0
    assert files_in(tmp_path / "killed") == undisturbed


def test_ctrl_c_ends_workers_and_run_in_order_and_prints_the_command_that_goes_on(flags, undisturbed, tmp_path):
    run = Command(flags("stopped", "--num_workers", 2), tmp_path / "log")
    run.until(lambda: len(shards_in(tmp_path / "stopped")) > 4)
    workers = workers_of(run.process.pid)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143, run.said
    assert "Traceback" not in run.said and f"Stopped. {len(shards_in(tmp_path / 'stopped'))} finished" in run.said
    assert len(workers) == 2 and not any(map(is_running, workers))
    printed = shlex.split(run.said.splitlines()[-1])
    assert printed[-2:] == ["--num_workers", "2"]
    again = Command(printed[2:], tmp_path / "again")
    assert again.wait() == 0, again.said
    assert files_in(tmp_path / "stopped") == undisturbed


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


def test_a_shard_that_fails_three_times_is_told_and_all_others_are_done(flags, damaged_source, calm_run, tmp_path):
    wanted = flags("gap", "--num_workers", 2, "--streaming", "--dataset_id", damaged_source)
    run = Command(wanted, tmp_path / "log")
    assert run.wait() == 1, run.said
    assert "Traceback" not in run.said and "Unhandled" not in run.said
    assert run.said.count("To be computed again: source rows 63 to 65") == 2
    assert "Given up after 3 failures: source rows 63 to 65" in run.said
    told = run.said.splitlines()[-2:]
    assert told[0].startswith("error: 1 of the shards failed 3 times and were left out; all others are done")
    assert re.match(r"source rows 63 to 65; the last because: .*chats\.parquet", told[1])
    expected = [row for row in stored(calm_run) if row["source_index"] // 3 != 21]
    assert stored(tmp_path / "gap") == expected
    assert len(shards_in(tmp_path / "gap")) == SHARDS - 1


def stored(folder: Path) -> list[dict]:
    dataset = open_dataset(str(folder))
    return [dataset.read_row(i) for i in range(dataset.num_rows)]


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--num_workers", "99"], 2, r"--num_workers 99: this machine has \d+ CPUs and no GPU, room for \d+"),
        (["--num_workers", "2", "--device", "cuda:0"], 2, "each worker gets its own accelerator"),
        (["--ray_address", "127.0.0.1:1"], 1, "127.0.0.1:1: nobody answers there"),
        (["--ray_address", "here"], 2, "expected HOST:PORT or auto"),
        (["--gpus_per_worker", "2"], 2, "it goes with --num_workers and --device_map"),
    ],
)
def test_wrong_use_is_told_in_a_line(flags, tmp_path, more, status, told):
    run = Command(flags("wrong", *more), tmp_path / "log")
    assert run.wait(60) == status, run.said
    last = run.said.splitlines()[-1]
    assert last.startswith("error: ") and re.search(told, last)
    assert not (tmp_path / "wrong").exists()


def test_a_stream_without_a_length_is_refused(flags, chat_file, tmp_path):
    source = chat_file([{"question": "Who?", "answer": "Nobody has counted these."}] * 5)  # nor cached them
    run = Command(flags("stream", "--num_workers", 2, "--streaming", "--dataset_id", source), tmp_path / "log")
    assert run.wait(60) == 2, run.said
    assert "is streamed and nobody knows its length. Leave out --streaming" in run.said


# --- a cluster of separate nodes ---


class Nodes:
    """A Ray cluster: a head without CPUs, and nodes of one CPU each, each a ``ray start`` of its own."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add(), self.add()]

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self):
        return self.cluster.add_node(num_cpus=1)

    def remove(self, node) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


def test_a_worker_takes_as_many_gpus_as_it_is_to_have_and_the_others_do_not_wait_for_one_without_room(
    flags, undisturbed, nodes, tmp_path
):
    """A node that says it has five GPUs: two workers of two each find room, a third does not."""
    node = nodes.cluster.add_node(num_cpus=2, num_gpus=5)
    try:
        wanted = flags("spread", "--ray_address", nodes.address, "--num_workers", 3, "--gpus_per_worker", 2)
        place = wanted.index("--device")
        del wanted[place : place + 2]
        run = Command([*wanted, "--device_map", "auto"], tmp_path / "log")
        assert run.wait() == 0, run.said
    finally:
        nodes.cluster.remove_node(node, allow_graceful=False)
    assert len(re.findall(r"Worker \d of 3 has its model", run.said)) == 2
    assert files_in(tmp_path / "spread") == undisturbed


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("HF_HUB_OFFLINE", raising=False)  # what the nodes are started with is their workers' environment
        nodes = Nodes()
        yield nodes
    nodes.cluster.shutdown()


def on_nodes(nodes: Nodes) -> list[str]:
    return ["--ray_address", nodes.address, "--num_workers", "2"]


def test_two_nodes_give_the_files_of_one_plain_process_though_one_is_removed(flags, undisturbed, nodes, tmp_path):
    for out, removed in (("whole", False), ("part", True)):
        run = Command(flags(out, *on_nodes(nodes)), tmp_path / f"{out}.log")
        run.until(lambda out=out: len(shards_in(tmp_path / out)) > 8)
        if removed:
            nodes.remove(nodes.nodes[0])
            run.until(lambda run=run: "To be computed again" in run.said)
            nodes.nodes.append(nodes.add())
        assert run.wait() == 0, run.said
        assert ("it died, or its machine did" in run.said) == removed
        assert files_in(tmp_path / out) == undisturbed


def test_without_a_shared_folder_the_shards_go_straight_to_the_hub_in_one_committers_commits(
    flags, undisturbed, nodes, hub, tmp_path
):
    env = hub.environment(tmp_path / "home")
    wanted = flags("nowhere", *on_nodes(nodes), "--output_repo", "user/straight", "--push_every", 2)
    place = wanted.index("--output_dir")
    del wanted[place : place + 2]
    shutil.rmtree(REPO / "outputs" / "straight", ignore_errors=True)
    try:
        stopped = Command(wanted, tmp_path / "stopped.log", env)
        stopped.until(lambda: re.search(r" \d\d/180 ", stopped.said))
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.wait(60) == 130, stopped.said
        files = hub.files("dataset", "user/straight")
        kept = {name for name in files if name.startswith("data/")}
        assert 3 < len(kept) < SHARDS and {entry["path"] for entry in listed(files)} == kept
        again = Command(wanted, tmp_path / "again.log", env)
        assert again.wait() == 0, again.said
        assert f"{len(kept)} of them only in user/straight" in again.said
        assert not shards_in(REPO / "outputs" / "straight")
    finally:
        shutil.rmtree(REPO / "outputs" / "straight", ignore_errors=True)
    found = {name: data for name, data in hub.files("dataset", "user/straight").items() if name != ".gitattributes"}
    assert found == undisturbed
    commits = [c for c in hub.commits("dataset", "user/straight") if any(path.startswith("data/") for path in c.paths)]
    assert sum(path.startswith("data/") for commit in commits for path in commit.paths) == SHARDS
    assert TOKEN not in stopped.said + again.said and SIGNATURE not in stopped.said + again.said


def listed(files: dict[str, bytes]) -> list[dict]:
    return json.loads(files["shards.json"])["shards"]
