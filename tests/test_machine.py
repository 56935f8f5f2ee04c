"""What a process may use of its machine, as its control groups say."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO

from chat_logits.machine import core_limits, memory_limits, stopping_signals


def written(folder, groups: str, files: dict[str, str]):
    """A machine's files: the groups that a process is in, and what these say."""
    (folder / "cgroup").write_text(groups)
    for name, text in files.items():
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / name).write_text(text)
    return folder / "cgroup", folder / "root"


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {}, []),
        (
            "0::/jobs/7\n",
            {"jobs/7/memory.max": "max\n", "jobs/memory.max": "1000\n", "memory.max": "2000"},
            [1000, 2000],
        ),
        ("9:cpu:/a\n4:cpuset,memory:/jobs/7\n0::/\n", {"memory/memory.limit_in_bytes": "3000\n"}, [3000]),
    ],
)
def test_limits_of_memory_are_read(tmp_path, groups, files, limits):
    """Of version 2, and of version 1 in a container, where the path is the host's."""
    assert list(memory_limits(*written(tmp_path, groups, files))) == limits
    assert not list(memory_limits(tmp_path / "none", tmp_path / "root"))


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/pod/7\n", {"pod/7/cpu.max": "400000 100000\n", "pod/cpu.max": "max 100000\n"}, [4]),
        ("0::/host/path\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        (
            "4:cpu,cpuacct:/jobs/7\n",
            {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "50000", "cpu/jobs/7/cpu.cfs_quota_us": "-1"},
            [5],
        ),
    ],
)
def test_quotas_of_computing_time_are_read_as_cores(tmp_path, groups, files, limits):
    assert list(core_limits(*written(tmp_path, groups, files))) == limits


def test_cores_are_those_that_the_process_may_run_on():
    """Of a process that is bound to one core, as a batch system does it."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from chat_logits.machine import usable_cores; print(usable_cores())"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "1\n"


def test_a_closed_terminal_stops_a_process_unless_it_was_told_to_ignore_that():
    """As nohup tells it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in stopping_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stopping_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)
