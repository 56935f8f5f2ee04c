"""Workers on a cluster of nodes: shared folders, shards straight to the Hub, and machines that fail."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import REPO
from hub_faults import Fault
from loopback_hub import SIGNATURE, TOKEN, LoopbackHub
from ray_runs import Command, Nodes, children, command_line, folders_of_workers, held, set_for_nodes
from runs import SHARDS, comparable, files_in, shards_in, without

import extract_logits
from chat_logits.extraction.folder import WORKERS


@pytest.fixture
def undisturbed(quick_run) -> dict[str, bytes]:
    return files_in(quick_run)


@pytest.fixture
def gate(tmp_path) -> Path:
    """Where workers that are ``held`` go on as soon as something is there."""
    return tmp_path / "gate"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Of runs with a Hub."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """Where the nodes' workers have their temporary folders."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def nodes(temporary):
    with pytest.MonkeyPatch.context() as patch:
        set_for_nodes(patch, temporary)
        patch.delenv("HF_HUB_OFFLINE", raising=False)  # what the nodes are started with is their workers' environment
        nodes = Nodes()
        yield nodes
    nodes.cluster.shutdown()


ONE = ("--num_workers", 1)  # where nothing is shared out: each worker takes ten seconds to begin


def on_nodes(nodes: Nodes) -> list[str]:
    return ["--ray_address", nodes.address, "--num_workers", "2"]


@pytest.fixture
def straight(flags, nodes, hub, home):
    """Starts runs without a folder that the nodes share, into a repository on the loopback Hub."""
    made = set()

    def start(repo: str, *more, first: str = "") -> Command:
        made.add(REPO / "outputs" / repo)
        wanted = without("--output_dir", flags("nowhere", *on_nodes(nodes), "--output_repo", f"user/{repo}", *more))
        return Command(wanted, first, hub.environment(home))

    yield start
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def on_hub(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    files = hub.files("dataset", f"user/{repo}")
    return comparable({name: data for name, data in files.items() if name != ".gitattributes"})


def shards_on_hub(hub: LoopbackHub, repo: str) -> set[str]:
    return {name for name in on_hub(hub, repo) if name.startswith("data/")}


def sent(hub: LoopbackHub, repo: str) -> list[str]:
    """The shards in all commits, deletions among them."""
    return [path for c in hub.commits("dataset", f"user/{repo}") for path in c.paths if path.startswith("data/")]


# --- a folder that all share ---


def test_two_nodes_give_the_files_of_one_plain_process_though_one_is_removed_and_another_added(
    flags, undisturbed, nodes, gate, tmp_path
):
    run = Command(flags("part", *on_nodes(nodes)), first=held(gate))
    run.until(lambda: run.said.count("has its model") >= 2 and len(shards_in(tmp_path / "part")) > 8)
    nodes.remove(nodes.nodes[0])
    run.until(lambda: "To be computed again" in run.said)
    nodes.nodes.append(nodes.add())
    gate.touch()
    assert run.wait() == 0, run.said
    assert "it died, or its machine did" in run.said and "Traceback" not in run.said
    assert files_in(tmp_path / "part") == undisturbed


def test_a_worker_takes_as_many_gpus_as_it_is_to_have_and_the_others_do_not_wait_for_one_without_room(
    flags, undisturbed, nodes, gate, tmp_path
):
    """A node that says it has five GPUs: two workers of two each find room, a third does not."""
    node = nodes.cluster.add_node(num_cpus=2, num_gpus=5)
    try:
        wanted = without(
            "--device", flags("spread", "--ray_address", nodes.address, "--num_workers", 3, "--gpus_per_worker", 2)
        )
        run = Command([*wanted, "--device_map", "auto"], first=held(gate))
        run.until(lambda: run.said.count("has its model") >= 2)
        gate.touch()
        assert run.wait() == 0, run.said
    finally:
        nodes.cluster.remove_node(node, allow_graceful=False)
    assert "Starting 3 workers on Ray, each on 2 GPUs (there is room for 2 now" in run.said
    told = (
        r"Worker \d has its model: .*, cpu \(Ray gave it 2 GPUs, torch finds none: an old driver, or a build for CPUs\)"
    )
    assert len(re.findall(told, run.said)) == 2
    assert files_in(tmp_path / "spread") == undisturbed


# --- without one ---

# What is free where the command was started is nobody's business: no estimate may be held against it.
HUGE = "from chat_logits.storage import disk; disk.MEASURED = {1: 1e9}"


def test_without_a_shared_folder_the_shards_go_straight_to_the_hub_in_one_committers_commits(
    undisturbed, straight, hub, temporary, gate
):
    left = folders_of_workers(temporary)
    # The first shard is committed at once, the others by Ctrl-C.
    stopped = straight("straight", "--push_every", 3600, first=HUGE + held(gate))
    stopped.until(lambda: re.search(r" \d\d/180 ", stopped.said))
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130, stopped.said
    kept, files = shards_on_hub(hub, "straight"), on_hub(hub, "straight")
    assert 3 < len(kept) < SHARDS and {entry["path"] for entry in listed(files)} == kept
    assert f"{len(kept)} finished shards are in user/straight.\nStopped. What is pushed is kept." in stopped.said
    assert folders_of_workers(temporary) <= left, "the workers have cleared up"
    again = straight("straight", "--push_every", 2)
    assert again.wait() == 0, again.said
    assert f"{len(kept)} of them only in user/straight" in again.said
    assert not shards_in(REPO / "outputs" / "straight")
    assert on_hub(hub, "straight") == undisturbed
    assert len(sent(hub, "straight")) == SHARDS
    assert TOKEN not in stopped.said + again.said and SIGNATURE not in stopped.said + again.said


def listed(files: dict[str, bytes]) -> list[dict]:
    return json.loads(files["shards.json"])["shards"]


def test_an_overwrite_that_was_stopped_goes_on_with_what_it_has_committed(
    flags, undisturbed, straight, hub, home, gate
):
    """Of the same run, so that its old shards are told from its new ones by nothing but the record of the overwrite."""
    plain = flags("other", "--output_repo", "user/renewed", "--max_samples", 9, "--seed", 7)
    other = Command(plain, env=hub.environment(home))
    assert other.wait() == 0, other.said
    stopped = straight("renewed", "--overwrite", "--push_every", 3600, first=held(gate))
    stopped.until(lambda: re.search(r" \d\d/180 ", stopped.said))
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130, stopped.said
    kept = shards_on_hub(hub, "renewed")
    assert 3 < len(kept) < SHARDS
    again = straight("renewed", "--overwrite")
    assert again.wait() == 0, again.said
    assert f"{len(kept)} of them only in user/renewed" in again.said
    assert on_hub(hub, "renewed") == undisturbed
    whole = straight("renewed", "--overwrite", *ONE)  # nothing is left unfinished: it begins anew
    assert whole.wait() == 0, whole.said
    assert on_hub(hub, "renewed") == undisturbed and "Going on" not in whole.said


def test_uploads_that_are_refused_end_the_run_within_a_few_shards(undisturbed, straight, hub, gate):
    """The token has lost its right in mid-run: nothing is computed for which there is no place."""
    stopped = straight("revoked", "--push_every", 1, first=held(gate))
    stopped.until(lambda: re.search(r" \d\d/180 ", stopped.said))
    hub.inject(*(Fault("refuse", step, status=403, times=math.inf) for step in ("preupload", "lfs_batch", "commit")))
    gate.touch()
    try:
        assert stopped.wait() == 1, stopped.said
    finally:
        hub.clear_faults()
    assert "Given up" not in stopped.said and "all others are done" not in stopped.said
    told = stopped.said.splitlines()[-2:]
    assert re.match(r"error: --output_repo user/revoked: the Hub refuses \(403: .+\)\. Fix this there", told[0])
    assert told[1] == (
        "Finished shards cannot be stored anywhere. Fix access to the Hub and run the same command to resume."
    )
    again = straight("revoked", *ONE)
    assert again.wait() == 0, again.said
    assert on_hub(hub, "revoked") == undisturbed


HASTY = "from chat_logits import hub_errors; hub_errors.FIRST_PAUSE = 0.01"


def test_a_hub_that_refuses_ends_the_run_at_once_and_one_that_is_away_lets_none_begin(straight, hub):
    hub.inject(Fault("refuse", "commit", status=403, times=math.inf))
    try:
        refused = straight("refused", "--push_every", 0, *ONE, first=HASTY)
        assert refused.wait() == 1, refused.said
    finally:
        hub.clear_faults()
    assert re.search(r"the Hub refuses \(403: .+\)\. Fix this there", refused.said)
    assert re.search(r"\d+ of them are nowhere else", refused.said) and "all are in" not in refused.said
    last = "error: Stopping: the Hub refused the commit, and these shards are stored nowhere else."
    assert refused.said.splitlines()[-1] == last
    hub.inject(Fault("refuse", "info", status=503, times=math.inf))
    try:
        away = straight("away", first=HASTY)
        assert away.wait() == 1, away.said
    finally:
        hub.clear_faults()
    assert "--output_repo user/away, where the shards go without --output_dir: the Hub fails (503)" in away.said
    assert not hub.has_repo("dataset", "user/away") and "Rows go to" not in away.said


# The code that workers get: one on a bad machine fails at its disk, the others' disks wait until it has.
DISK = """
from chat_logits.extraction import cluster
copy_code = cluster.copy_code
def copy(target):
    copy_code(target)
    with (target / "chat_logits" / "storage" / "disk.py").open("a") as file:
        file.write('''
import os, pathlib, time
free = free_bytes
def free_bytes(folder):
    has_failed = pathlib.Path("HAS_FAILED")
    if "DAMAGE" in os.environ:
        has_failed.touch()
        return DAMAGE
    while not has_failed.exists():
        time.sleep(0.1)
    return free(folder)
''')
cluster.copy_code = copy
"""


@pytest.mark.parametrize(
    ("damage", "reason"), [("0", "the disk of .*extract-logits-.* is full"), ("os._exit(1)", "it died")]
)
def test_a_bad_machines_trouble_is_its_own(undisturbed, straight, hub, nodes, monkeypatch, tmp_path, damage, reason):
    """A third node, with whose worker every shard fails: it takes few, and no shard is given up."""
    monkeypatch.setenv("DAMAGE", "1")
    bad = nodes.cluster.add_node(num_cpus=1)
    monkeypatch.delenv("DAMAGE")
    nodes.settle()
    first = DISK.replace("HAS_FAILED", str(tmp_path / "failed")).replace("return DAMAGE", f"return {damage}")
    repo = f"bad-{len(damage)}"
    try:
        run = straight(repo, "--num_workers", 3, first=first)
        assert run.wait() == 0, run.said
    finally:
        nodes.cluster.remove_node(bad, allow_graceful=False)
    told = re.findall(rf"Worker (\d) \(.*\): {reason}", run.said)
    worst = max(told, key=told.count)
    # Workers are not machines: Ray may start one again elsewhere, and so another in its place on the bad machine.
    assert 1 <= told.count(worst) <= 8 and len(told) - told.count(worst) <= 1, told
    assert "Given up" not in run.said and "To be computed again: source rows" in run.said
    assert on_hub(hub, repo) == undisturbed


# --- addresses and what is there ---


@pytest.fixture
def head(tmp_path):
    """Starts a cluster of one machine with `ray start`, in an environment; gives its address."""
    started, folders = [], []

    def start(env: dict[str, str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        options = ["--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
        folders.append(tempfile.mkdtemp(dir="/tmp", prefix="ray-"))
        options += ["--disable-usage-stats", f"--temp-dir={folders[-1]}"]
        with (tmp_path / "ray.log").open("w") as log:
            started.append(subprocess.Popen([*ray, "start", *options], env=env, stdout=log, stderr=log))
        until = time.monotonic() + 300
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert time.monotonic() < until
            time.sleep(0.1)
        return f"127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_asks_for_a_token_gets_it_or_the_token_is_named(flags, undisturbed, head, tmp_path):
    """As it is after `ray start` on a machine where Ray has made a token for a run of its own before."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    env = {**os.environ, "HOME": str(home)}
    address = head(env)
    wanted = ["--ray_address", address, "--num_workers", "2"]
    run = Command(flags("out", *wanted), env=env)
    assert run.wait() == 0, run.said
    assert files_in(tmp_path / "out") == undisturbed
    (home / ".ray" / "auth_token").write_text("1" * 64)
    other = Command(flags("other", *wanted), env=env)
    assert other.wait() == 1
    last = other.said.splitlines()[-1]
    assert last.startswith(f"error: --ray_address {address}: that cluster asks for a token, and this machine's is")
    assert "Copy ~/.ray/auth_token from the cluster's first machine" in last and len(other.lines) < 4


def test_when_the_head_of_the_cluster_dies_it_is_said_and_a_plain_process_goes_on(
    flags, undisturbed, head, gate, tmp_path
):
    wanted = flags("headless", "--ray_address", head(dict(os.environ)), "--num_workers", "2")
    run = Command(wanted, first=held(gate))
    run.until(lambda: len(shards_in(tmp_path / "headless")) > 8)
    gcs = [pid for pid in children(os.getpid()) if b"gcs_server" in command_line(pid).partition(b"\0")[0]]
    folders = re.findall(r"/tmp/ray-\w+", b"".join(map(command_line, gcs)).decode())
    assert gcs and folders
    for pid in gcs:
        if folders[-1].encode() in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    assert run.wait() == 1, run.said
    assert re.match(r"error: --ray_address .*: the cluster's head does not answer any more", run.said.splitlines()[-1])
    assert "The program will terminate" not in run.said and not (tmp_path / "headless" / WORKERS).exists()
    assert len(shards_in(tmp_path / "headless")) < SHARDS
    assert extract_logits.main(flags("headless")) == 0
    assert files_in(tmp_path / "headless") == undisturbed


@pytest.mark.parametrize(
    ("address", "status", "told"),
    [
        ("here", 2, "expected HOST:PORT or auto"),
        ("", 2, "expected HOST:PORT or auto"),
        ("ray://127.0.0.1:10001", 2, "expected HOST:PORT as `ray start` prints it, without ray://"),
        ("127.0.0.1:99999", 2, "expected HOST:PORT or auto"),
        ("127.0.0.1:1", 1, "no Ray cluster answers there. `ray start --head` starts a cluster"),
        ("LISTENS", 1, "no Ray cluster answers there"),
    ],
)
def test_an_address_without_a_cluster_is_told_in_a_line_and_leaves_no_repository(
    flags, hub, home, tmp_path, address, status, told
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}" if address == "LISTENS" else address
        wanted = flags("wrong", "--ray_address", address, "--output_repo", "user/wrong")
        quick = "from chat_logits.extraction import cluster; cluster.PATIENCE = 4.0"
        run = Command(wanted, quick, hub.environment(home))
        assert run.wait() == status, run.said
    (line,) = run.lines
    assert line.startswith("error: --ray_address ") and told in line
    assert not (tmp_path / "wrong").exists() and not hub.has_repo("dataset", "user/wrong")


def test_a_cluster_without_gpus_and_a_machine_without_room_are_refused_before_a_repository_is_made(
    flags, hub, home, nodes, tmp_path
):
    env = hub.environment(home)
    wanted = without("--device", flags("none", *on_nodes(nodes), "--output_repo", "user/none"))
    for more, advice in (
        ([], ". Wait for machines with some, or give --device cpu"),
        (["--gpus_per_worker", "2", "--device_map", "auto"], ""),
    ):
        run = Command([*wanted, *more], env=env)
        assert run.wait() == 2 and f"has 2 CPUs and no GPU yet{advice}" in run.said.splitlines()[-1], run.said
    crowd = flags("none", "--num_workers", 9999, "--output_repo", "user/none")
    run = Command(crowd, env=env)
    assert run.wait() == 2 and "room for" in run.said.splitlines()[-1], run.said
    assert not hub.has_repo("dataset", "user/none") and not (tmp_path / "none" / "extraction.json").exists()


@pytest.mark.parametrize("templates", ["templates", "chat_logits/templates"])
def test_the_cluster_gets_the_toolkits_code_and_nothing_else_that_lies_there(tmp_path, templates):
    """In a checkout that is outputs and secrets, in site-packages all that is installed."""
    home, copy = tmp_path / "home", tmp_path / "copy"
    shutil.copytree(REPO / "chat_logits", home / "chat_logits", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "templates", home / templates)
    shutil.copy(REPO / "logit_codec.py", home)
    pages = ("chat_logits/display/pages/", "chat_logits/browse/pages/")
    code = {name: data for name, data in files_in(home).items() if not name.startswith(pages)}
    for name in (".env", "outputs/run/data.py", "notes.txt", "tests/test_one.py", "numpy_like/__init__.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("SECRET=1")
    copy.mkdir()
    call = "import sys; from pathlib import Path; from chat_logits.extraction.cluster import copy_code; "
    call += "copy_code(Path(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": str(home)}
    subprocess.run([sys.executable, "-c", call, copy], cwd=tmp_path, env=env, check=True)
    assert {name: data for name, data in files_in(copy).items() if "__pycache__" not in name} == code
