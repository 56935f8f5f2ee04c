"""Runs with workers on Ray: the command in processes of its own, theirs below it, and clusters of nodes."""

import os
import tempfile
import time
from pathlib import Path

from lives import Server

HUB = ("HF_ENDPOINT", "HF_HOME")
COMMAND = """
import sys, extract_logits
from chat_logits.cli.command_line import leave
leave(extract_logits.main(sys.argv[1:]))
"""

# The code that workers get: each waits in front of the batch after its first ones, until a file is there.
HELD = """
from chat_logits.extraction import cluster
def copy(target, copy_code=cluster.copy_code):
    copy_code(target)
    with (target / "logit_codec.py").open("a") as file:
        file.write({code!r})
cluster.copy_code = copy
"""
HOLD = """
import itertools, pathlib, time
_encode_rows, _numbers = encode_rows, itertools.count()
def encode_rows(*batch):
    number, until = next(_numbers), time.monotonic() + {seconds}
    while number >= {batches} and time.monotonic() < until and not pathlib.Path({gate!r}).exists():
        time.sleep(0.05)
    return _encode_rows(*batch)
"""


def set_for_nodes(patch, temporary: Path) -> None:
    """What a cluster of nodes is started with; workers have their temporary folders in ``temporary``."""
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("TMPDIR", str(temporary))
    patch.setenv("RAY_TMPDIR", "/tmp")  # a socket's path must be short


def folders_of_workers(temporary: Path) -> set[Path]:
    """Those that workers have in ``temporary`` now, or that killed ones have left there for the next one to remove."""
    return set(temporary.glob("extract-logits-*"))


def held(gate: Path, batches: int = 12, seconds: float = 600) -> str:
    """What a command does ``first`` so that its workers are in mid-run, on any machine, until ``gate`` is there.

    Each encodes this many batches at once, and those after them that many seconds late at most.
    """
    return HELD.format(code=HOLD.format(gate=str(gate), batches=batches, seconds=seconds))


class Command:
    """The command in a process of its own, after ``first`` in Python; ``env`` is this process's where none is given."""

    def __init__(self, flags: list[str], first: str = "", env: dict[str, str] | None = None):
        code = f"{first}\n{COMMAND}"
        wanted = dict(os.environ) if env is None else env
        server = _server_for(wanted)
        self.process = server.start(code, *flags, env={**dict.fromkeys(server.env), **wanted})

    @property
    def said(self) -> str:
        return self.process.stdout + self.process.stderr

    @property
    def lines(self) -> list[str]:
        """What it said but for the stages of its start and the dots of those that last."""
        return [line for line in self.said.splitlines() if not line.endswith(" …") and line.strip(" .")]

    def wait(self, seconds: float = 900) -> int:
        self.process.communicate(seconds)
        return self.process.returncode

    def until(self, condition, seconds: float = 600) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.01)


_servers: dict[tuple, tuple[Server, tempfile.TemporaryDirectory]] = {}


def _server_for(env: dict[str, str]) -> Server:
    """One for all runs with this Hub, or with none: libraries read where it is as they are imported."""
    hub = tuple(map(env.get, HUB))
    if hub not in _servers:
        folder = tempfile.TemporaryDirectory()
        server = Server(env if any(hub) else {**env, "HF_HUB_OFFLINE": "1"}, Path(folder.name))
        _servers[hub] = server.__enter__(), folder  # both end with this process
    return _servers[hub][0]


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


def followers_of(pid: int) -> list[int]:
    """The processes that compute a model together with one that has started them."""
    return [child for child in children(pid) if b"extraction.processes" in command_line(child)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and was not waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Nodes:
    """A Ray cluster: a head without CPUs, and nodes of one CPU each, each a ``ray start`` of its own."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add(), self.add()]

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, **options):
        return self.cluster.add_node(**{"num_cpus": 1, **options})

    def remove(self, node) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def settle(self, seconds: float = 120) -> None:
        """Wait until the cluster knows which nodes are left, and none of their CPUs is taken by a run before.

        Otherwise Ray may give a worker's place to another one that was waiting for room.
        """
        until = time.monotonic() + seconds
        while not self._is_at_rest():
            assert time.monotonic() < until, self.cluster.global_state.node_table()
            time.sleep(0.1)

    def _is_at_rest(self) -> bool:
        state, known = self.cluster.global_state, self.cluster.worker_nodes
        alive = [node for node in state.node_table() if node["Alive"]]
        whole = sum(node["Resources"].get("CPU", 0) for node in alive)
        return len(alive) == len(known) + 1 and state.available_resources().get("CPU", 0) == whole
