"""Workers on Ray whose model several processes compute: which machine has room for them, and what ends them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from ray_runs import Command, folders_of_workers, followers_of, held, is_running, set_for_nodes, workers_of
from runs import SHARDS, files_in, flags_for, shards_in, without

import extract_logits


@pytest.fixture(scope="module")
def in_two(quick_model, calm_source, tmp_path_factory) -> dict[str, bytes]:
    """The files of the run with 2 processes and without Ray."""
    out = tmp_path_factory.mktemp("in_two") / "out"
    assert extract_logits.main([*flags_for(quick_model, calm_source, out), "--tensor_parallel", "2"]) == 0
    return files_in(out)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """Where workers have their temporary folders."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(temporary):
    """Of a cluster of one machine, which says that it has four CPUs and five GPUs."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        set_for_nodes(patch, temporary)
        machine = {"num_cpus": 4, "num_gpus": 5, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=machine)
    yield cluster.address
    cluster.shutdown()


def workers() -> list[int]:
    """Those on the cluster that this process has started."""
    return workers_of(os.getpid())


def visible_gpus(pid: int) -> set[bytes]:
    """What a process was started with."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (gpus,) = (
        value for name, _, value in (each.partition(b"=") for each in variables) if name == b"CUDA_VISIBLE_DEVICES"
    )
    return set(gpus.split(b","))


def wait_for_end(pids: set[int]) -> None:
    until = time.monotonic() + 60
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < until, running
        time.sleep(0.05)


def test_a_worker_that_loses_one_of_its_processes_is_replaced_as_a_whole(flags, address, in_two, tmp_path):
    """The other process of one is killed in mid-shard, then the first one of the other: the rows are all there."""
    gate, out = tmp_path / "gate", tmp_path / "out"
    wanted = without("--device", flags("out", "--ray_address", address, "--num_workers", 2, "--tensor_parallel", 2))
    run = Command(wanted, first=held(gate, batches=4, seconds=2))
    run.until(lambda: run.said.count("has its model") >= 2 and len(shards_in(out)) > 4)
    assert "Starting 2 workers on Ray, each with 2 processes on 2 GPUs …" in run.said
    one, other = workers()
    pids = {one, other, *followers_of(one), *followers_of(other)}
    assert len(pids) == 4
    gpus = [visible_gpus(pid) for worker in (one, other) for pid in followers_of(worker)]
    assert [len(each) for each in gpus] == [2, 2] and not gpus[0] & gpus[1]

    os.kill(followers_of(one)[0], signal.SIGKILL)
    run.until(lambda: run.said.count("has its model") >= 3)
    lost = (
        "process 2 of 2 was ended by SIGKILL, as the system does where memory is short.\nTo be computed again: source"
    )
    assert lost in run.said and not is_running(one)
    (new,) = set(workers()) - {other}
    pids |= {new, *followers_of(new)}
    assert len(pids) == 6

    left = set(followers_of(other))
    os.kill(other, signal.SIGKILL)
    wait_for_end(left)
    run.until(lambda: run.said.count("has its model") >= 4)
    (last,) = set(workers()) - {new}
    pids |= {last, *followers_of(last)}
    assert len(pids) == 8 and len(shards_in(out)) < SHARDS
    gate.touch()
    assert run.wait() == 0, run.said
    assert "it died, or its machine did\nTo be computed again: source rows" in run.said
    assert "Traceback" not in run.said and "Given up" not in run.said
    wait_for_end(pids)
    assert files_in(out) == in_two


def test_ctrl_c_and_the_death_of_the_first_process_end_all_and_the_run_goes_on(
    flags, address, temporary, in_two, tmp_path
):
    """That its workers have 2 processes is known from the record, but for the first start."""
    out, left = tmp_path / "out", folders_of_workers(temporary)  # by those that were killed before
    on_cluster = flags("out", "--ray_address", address)

    def start(*more) -> tuple[Command, set[int]]:
        before = len(shards_in(out))
        run = Command([*on_cluster, *more], first=held(tmp_path / "never", batches=8))
        run.until(lambda: len(shards_in(out)) > before + 2)
        (worker,) = workers()
        pids = {worker, *followers_of(worker)}
        assert len(pids) == 2
        return run, pids

    stopped, pids = start("--tensor_parallel", "2")
    assert "Starting 1 worker on Ray, each with 2 processes on CPUs …" in stopped.said
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130, stopped.said
    assert "Stopped. " in stopped.said and "Traceback" not in stopped.said
    wait_for_end(pids)
    assert folders_of_workers(temporary) <= left, "the worker has cleared up"

    killed, pids = start()
    assert "--tensor_parallel 2" in killed.said
    killed.process.send_signal(signal.SIGKILL)
    wait_for_end(pids)
    assert len(shards_in(out)) < SHARDS
    assert extract_logits.main(flags("out", "--tensor_parallel", "2")) == 0
    assert files_in(out) == in_two


def test_a_cluster_without_a_machine_for_one_worker_is_refused(flags, address, tmp_path):
    on_cluster = flags("none", "--ray_address", address)
    wide = ("--tensor_parallel", "8")
    for wanted, has in (
        ([*on_cluster, *wide], "8 CPUs; .* is 4"),
        ([*without("--device", on_cluster), *wide], "8 GPUs; .* is 5"),
    ):
        run = Command(wanted)
        assert run.wait() == 2, run.said
        told = (
            rf"error: --tensor_parallel 8: a worker is on one machine, and none of --ray_address {address} has {has}\."
        )
        assert re.match(told, run.said.splitlines()[-1]), run.said
    assert not (tmp_path / "none" / "extraction.json").exists()


SEES = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_gpus=2)
def seen():
    import os
    from chat_logits.extraction.worker import gpus_of_machine
    return gpus_of_machine(), os.environ["CUDA_VISIBLE_DEVICES"].count(",") + 1
print(*ray.get(seen.remote()))
"""


def test_a_worker_knows_how_many_others_share_its_machines_cores(address):
    """It sees two of five GPUs."""
    command, env = [sys.executable, "-c", SEES, address], {**os.environ, "PYTHONPATH": str(REPO)}
    seen = subprocess.run(command, env=env, capture_output=True, text=True)
    assert seen.stdout.split() == ["5", "2"], seen.stderr
