"""Finished shards reach the Hub through whatever it does, once each, and the run does not wait for it."""

import hashlib
import json
import math
import re
import shutil
import signal
import time
from email.utils import formatdate
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REPO
from hub_faults import Fault
from lives import Forked, Server, late
from loopback_hub import SIGNATURE, TOKEN, LoopbackHub
from runs import SHARDS, comparable, files_in, flags_for, shards_in

from chat_logits.storage.dataset import open_dataset

# The command, with fewer shards a commit so that 60 make several, and less patience with a dead line.
COMMAND = """
import sys
from chat_logits import hub as hub_access
from chat_logits.extraction import upload as hub_sync
hub_sync.SHARDS_A_COMMIT, hub_access.PATIENCE = 8, (10, 10, 10, 10)
import extract_logits
from chat_logits.cli.command_line import leave
leave(extract_logits.main(sys.argv[1:]))
"""
# The same for a Hub that does not answer: what it waits for in vain, the test waits for.
IMPATIENT = COMMAND.replace("(10, 10, 10, 10)", "(3, 3, 3, 3)")
# The same, but the pushing thread dies of what is no Exception.
DYING = COMMAND.replace(
    "import extract_logits",
    """
class Panic(BaseException):
    pass
commits = []
def commit(*_):
    commits.append(1)
    if len(commits) > 1:
        raise Panic("in a library")
    return original(*_)
original = hub_sync.Repository.commit
hub_sync.Repository.commit = commit
import extract_logits""",
)
# The same, with at most three commits in four seconds; when each was begun is said.
LIMITED = COMMAND.replace(
    "import extract_logits",
    """
hub_sync.COMMITS_AN_HOUR, hub_sync.HOUR = 3, 4
def keep(self, keep_to_the_limit=hub_sync.HubSync._keep_to_the_limit):
    keep_to_the_limit(self)
    print("BEGUN", self._commits[-1], file=sys.stderr)
hub_sync.HubSync._keep_to_the_limit = keep
import extract_logits""",
)
# The same, in mid-run until a signal comes.
LASTING = late(shards=6, seconds=1) + COMMAND
LOAD = """
import datasets, json, sys
from chat_logits.cli.command_line import leave
datasets.disable_progress_bars()
for repo in sys.argv[1:]:
    repo, _, revision = repo.partition("@")
    rows = datasets.load_dataset(repo, split="train", revision=revision or None)
    rows = [{key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()} for row in rows]
    print(repo, json.dumps(rows))
leave(0)
"""
EACH_FAULT = {
    "none": [],
    "rate limit": [Fault("refuse", "commit", status=429, headers={"Retry-After": "1"}, times=2)],
    "server error": [Fault("refuse", "commit", status=500), Fault("refuse", "lfs_put", status=503, skip=5)],
    "cut upload": [Fault("cut", "lfs_put", skip=3), Fault("cut", "commit", skip=1)],
    "conflict": [Fault("conflict", "commit", times=3)],
    "conflict code": [Fault("refuse", "commit", status=409), Fault("refuse", "preupload", status=412, skip=2)],
    "slow": [Fault("slow", "commit", seconds=0.5), Fault("slow", "lfs_put", seconds=0.3)],
    "lost answer": [Fault("lost", "commit"), Fault("lost", "commit", skip=3)],
    "lost last answer": [Fault("lost", "commit", skip=7)],
    "no answer": [Fault("stall", "commit", skip=2)],
}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    return {**hub.environment(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(REPO)}


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    with Server(environment, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def start(quick_model, calm_source, server, tmp_path):
    """Start the command of ``runs.py`` with a repository to push to, in a process of its own."""

    def run(repo: str, *more, out: str = "out", code: str = COMMAND) -> Forked:
        flags = flags_for(quick_model, calm_source, tmp_path / out)
        return server.start(code, *flags, "--output_repo", f"user/{repo}", *more)

    return run


@pytest.fixture
def extract(start):
    def run(*arguments, **options) -> tuple[int, str]:
        process = start(*arguments, **options)
        out, errors = process.communicate()
        assert TOKEN not in out + errors and SIGNATURE not in out + errors
        return process.returncode, out + errors

    return run


def on_hub(hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    """The run's files in the repository."""
    files = hub.files("dataset", f"user/{repo}", revision)
    return comparable({name: data for name, data in files.items() if name not in (".gitattributes", "notes.txt")})


def wait_for(process: Forked, condition, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < until, process.stderr
        time.sleep(0.01)


def our_commits(hub, repo: str) -> list:
    if not hub.has_repo("dataset", f"user/{repo}"):
        return []
    commits = hub.commits("dataset", f"user/{repo}")
    return [commit for commit in commits if any(path.startswith(("data/", "README")) for path in commit.paths)]


def is_marked(commit) -> bool:
    """Whether the commit says that shards are missing that the run is to have."""
    return json.loads(commit.files["shards.json"].data).get("unfinished", False)


def is_listed_as_unfinished(folder: Path) -> bool:
    return json.loads((folder / "shards.json").read_text()).get("unfinished", False)


def loaded(server, *repos: str) -> dict[str, list]:
    """What ``datasets.load_dataset`` gives for each repository."""
    done = server.run(LOAD, *repos)
    assert done.returncode == 0, done.stderr
    return {repo: json.loads(rows) for repo, _, rows in (line.partition(" ") for line in done.stdout.splitlines())}


def local_rows(folder: Path) -> list:
    rows = [row for path in shards_in(folder) for row in pq.read_table(path).to_pylist()]
    plain = [{key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()} for row in rows]
    return json.loads(json.dumps(plain))


# --- each fault ---


@pytest.fixture(scope="module")
def through_each_fault(hub, server, quick_model, calm_source, quick_run, tmp_path_factory):
    """The finished run, pushed eight shards a commit while one thing goes wrong; then loaded from the Hub."""
    runs, uploads = {}, {}
    for name, faults in EACH_FAULT.items():
        out = tmp_path_factory.mktemp("pushed") / "out"
        shutil.copytree(quick_run, out)
        hub.clear_faults()
        flags = [*flags_for(quick_model, calm_source, out), "--output_repo", f"user/{name.replace(' ', '-')}"]
        hub.forget_uploads()
        hub.inject(*faults)
        runs[name] = server.run(IMPATIENT if name == "no answer" else COMMAND, *flags)
        uploads[name] = dict(hub.uploaded)
    hub.clear_faults()
    repos = [f"user/{name.replace(' ', '-')}" for name in EACH_FAULT]
    return runs, uploads, loaded(server, *repos)


@pytest.mark.parametrize("name", EACH_FAULT)
def test_through_each_fault_everything_arrives_once(hub, quick_run, through_each_fault, name):
    runs, uploads, rows = through_each_fault
    repo = name.replace(" ", "-")
    assert runs[name].returncode == 0, runs[name].stderr
    assert "Loading" not in runs[name].stderr and "Traceback" not in runs[name].stderr
    assert TOKEN not in runs[name].stderr and SIGNATURE not in runs[name].stderr
    assert on_hub(hub, repo) == files_in(quick_run)
    assert rows[f"user/{repo}"] == local_rows(quick_run)
    commits = our_commits(hub, repo)
    assert len(commits) == math.ceil(SHARDS / 8)
    assert all(len(commit.paths) <= 100 for commit in commits)
    sent = {hashlib.sha256(path.read_bytes()).hexdigest() for path in shards_in(quick_run)}
    assert uploads[name].keys() == sent and set(uploads[name].values()) == {1}


@pytest.mark.usefixtures("through_each_fault")
def test_the_card_goes_up_with_the_first_commit_and_the_last(hub, server, quick_run):
    commits = our_commits(hub, "none")
    assert ["README.md" in commit.paths for commit in commits] == [True, *[False] * (len(commits) - 2), True]
    assert ["extraction.json" in commit.paths for commit in commits] == [True] + [False] * (len(commits) - 1)
    assert [is_marked(commit) for commit in commits] == [True] * (len(commits) - 1) + [False]
    cards = [commit.files["README.md"].data.decode() for commit in (commits[0], commits[-1])]
    assert "160 conversations" in cards[1] and "160 conversations" not in cards[0]
    half = loaded(server, f"user/none@{commits[2].sha}")["user/none"]
    assert half == local_rows(quick_run)[: len(half)] and len(half) > 40


# --- a run that pushes as it goes ---


@pytest.mark.parametrize("seed", [1])
def test_through_faults_at_random_the_run_and_the_dataset_are_the_same(hub, server, extract, quick_run, tmp_path, seed):
    hub.forget_uploads()
    begun = len(hub.requests)
    hub.inject_randomly(seed, 0.15)
    started = time.monotonic()
    status, said = extract(f"random{seed}", "--push_every", "0.5")
    took = time.monotonic() - started
    hub.clear_faults()
    assert status == 0, said
    assert files_in(tmp_path / "out") == files_in(quick_run)
    assert on_hub(hub, f"random{seed}") == files_in(quick_run)
    assert loaded(server, f"user/random{seed}")[f"user/random{seed}"] == local_rows(quick_run)
    hit = [request for request in hub.requests[begun:] if request.fault]
    assert len(hit) > 5 and len({request.fault for request in hit}) > 3
    commits = our_commits(hub, f"random{seed}")
    assert len(commits) <= min(128, took / 0.5 + 2)
    lost = sum(request.fault == "lost" and request.path.startswith("/lfs/") for request in hit)
    assert sum(count - 1 for count in hub.uploaded.values()) <= lost
    print(f"{len(hit)} faults in {took:.0f} s, {len(commits)} commits, {lost} uploads destroyed")


def test_a_hub_that_is_away_for_a_while_is_found_again(hub, start, quick_run, tmp_path):
    process = start("away", "--push_every", "0.3")
    wait_for(process, lambda: len(our_commits(hub, "away")) > 0)
    hub.stop()
    wait_for(process, lambda: len(shards_in(tmp_path / "out")) == SHARDS)
    assert process.poll() is None
    hub.start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert on_hub(hub, "away") == files_in(quick_run) == files_in(tmp_path / "out")


def test_a_dead_hub_ends_in_a_message_and_the_same_command_pushes_without_the_model(hub, extract, quick_run, tmp_path):
    hub.stop()
    try:
        status, said = extract("dead")
    finally:
        hub.start()
    assert status == 1
    assert files_in(tmp_path / "out") == files_in(quick_run)
    assert said.splitlines()[-2:] == [
        f"error: --output_repo user/dead: the Hub cannot be reached at HF_ENDPOINT {hub.url}",
        f"{SHARDS} of {SHARDS} shards are not on the Hub yet; all are in {tmp_path / 'out'}. "
        "The same command pushes what is missing, and computes nothing again.",
    ]
    status, said = extract("dead")
    assert status == 0 and "Loading" not in said
    assert on_hub(hub, "dead") == files_in(quick_run)


@pytest.mark.parametrize("asked", ["3600", "1000000000", "a date in an hour", "²"])
def test_a_long_wait_that_was_asked_for_in_the_middle_does_not_hold_the_end(hub, extract, quick_run, asked):
    """By the third commit. What is no time at all is as if nothing had been asked."""
    repo, header = f"asked-{asked[0]}" if asked.isascii() else "asked", asked
    if asked.startswith("a date"):
        header = formatdate(time.time() + 3600, usegmt=True)
    hub.inject(Fault("refuse", "commit", status=429, headers={"Retry-After": header}, skip=2))
    status, said = extract(repo)
    if asked == "²":
        assert status == 0, said
    else:
        assert status == 1, said
        assert f"error: --output_repo user/{repo}: the Hub limits the request rate (429)\n" in said
        assert "shards are not on the Hub yet; all are in" in said and "Traceback" not in said
        assert extract(repo)[0] == 0
    assert on_hub(hub, repo) == files_in(quick_run)


# The same, but another run's folder takes the place of this one's as its thirtieth shard gets its name.
REPLACED = COMMAND.replace(
    "import extract_logits",
    """
from pathlib import Path
from chat_logits.storage import disk
*sys.argv, another = sys.argv
written, original = [], disk.flush_and_rename
def write(temporary, path, *rest):
    original(temporary, path, *rest)
    written.extend([path] if path.suffix == ".parquet" else [])
    if len(written) == 30:
        written.append("moved")
        out = path.parents[2]
        out.rename(out.with_name("away"))
        Path(another).rename(out)
disk.flush_and_rename = write
import extract_logits""",
)


# The same, but it takes its place as the second commit begins, which has found the right folder there.
REPLACED_MEANWHILE = COMMAND.replace(
    "import extract_logits",
    """
from pathlib import Path
from chat_logits.storage.repository import Repository
*sys.argv, another = sys.argv
commits, original = [], Repository.commit
def commit(self, message, additions, *rest):
    commits.append(message)
    if len(commits) == 2:
        out = next(path.parents[2] for path in additions.values() if isinstance(path, Path))
        out.rename(out.with_name("away"))
        Path(another).rename(out)
    return original(self, message, additions, *rest)
Repository.commit = commit
import extract_logits""",
)


@pytest.mark.parametrize("code", [REPLACED, REPLACED_MEANWHILE], ids=["while written", "while committed"])
def test_nothing_of_another_run_in_the_folders_place_is_pushed(hub, extract, quick_run, tmp_path, code):
    repo = "replaced" if code == REPLACED else "replaced-meanwhile"
    another = shutil.copytree(quick_run, tmp_path / "another")
    for path in shards_in(another):
        path.write_bytes(path.read_bytes()[::-1])
    before = {path: path.read_bytes() for path in shards_in(another)}
    status, said = extract(repo, another, code=code)
    assert status == 1 and "was removed, renamed or unmounted (another folder is in its place)" in said, said
    expected, there = files_in(quick_run), hub.files("dataset", f"user/{repo}")
    pushed = {name: data for name, data in there.items() if name.endswith(".parquet")}
    assert pushed and len(pushed) < SHARDS and pushed == {name: expected[name] for name in pushed}
    (tmp_path / "out").rename(another)
    assert {path: path.read_bytes() for path in shards_in(another)} == before
    (tmp_path / "away").rename(tmp_path / "out")
    assert extract(repo)[0] == 0
    assert on_hub(hub, repo) == expected


def test_an_answer_that_comes_a_byte_at_a_time_does_not_hold_the_end(hub, extract, quick_run):
    hub.inject(Fault("drip", "commit", seconds=0.4, skip=2))
    status, said = extract("drip", code=COMMAND.replace("import extract", "hub_sync.SILENCE = 3\nimport extract", 1))
    hub.clear_faults()
    assert status == 1, said
    assert re.search(r"error: --output_repo user/drip: no answer for \d+ s\n\d+ of 60 shards are not on the Hub", said)
    assert extract("drip")[0] == 0
    assert on_hub(hub, "drip") == files_in(quick_run)


def test_a_fresh_machine_goes_on_with_what_the_repository_has(hub, start, extract, quick_run, tmp_path):
    """Only the repository is left: its shards are neither computed nor sent again."""
    hub.forget_uploads()
    process = start("moved", "--push_every", "0.5", out="first", code=LASTING)
    wait_for(process, lambda: len(our_commits(hub, "moved")) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = {name for name in on_hub(hub, "moved") if name.startswith("data/")}
    assert 0 < len(there) < SHARDS
    status, said = extract("moved", out="second")
    assert status == 0, said
    assert f"in {len(there)} shards, {len(there)} of them only in user/moved" in said
    assert "160 written, 20 skipped" in said
    assert on_hub(hub, "moved") == files_in(quick_run)
    assert set(hub.uploaded.values()) == {1} and len(hub.uploaded) <= SHARDS + 8  # what was on its way at the kill
    here = {name for name in files_in(tmp_path / "second") if name.startswith("data/")}
    assert here == {name for name in files_in(quick_run) if name.startswith("data/")} - there
    local = open_dataset(str(tmp_path / "second"))
    assert len(local.shards) == len(here) and local.read_row(0)["source_index"] >= len(there)
    assert is_listed_as_unfinished(tmp_path / "second")  # of which a part is on the Hub alone
    assert extract("moved", out="third")[0] == 0 and is_listed_as_unfinished(tmp_path / "third")
    assert on_hub(hub, "moved") == files_in(quick_run)


def test_a_whole_folder_is_whole_on_the_hub_with_its_last_commit(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("late")[0] == 0
    marks = [is_marked(commit) for commit in our_commits(hub, "late")]
    assert len(marks) == 8 and marks == [True] * 7 + [False]
    assert on_hub(hub, "late") == files_in(tmp_path / "out") == files_in(quick_run)


# The same, but the model fails.
FAILING = COMMAND.replace(
    "import extract_logits",
    """
from chat_logits.extraction import shard_computer
def fail(*_):
    raise RuntimeError("the card is gone")
shard_computer.run_shards = fail
import extract_logits""",
)


def test_a_whole_repository_stays_so_where_a_damaged_shard_is_not_computed_again(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("stays-whole")[0] == 0
    shard = shards_in(tmp_path / "out")[7]
    shard.write_bytes(shard.read_bytes()[:-100])
    status, said = extract("stays-whole", code=FAILING)
    assert status == 1 and "the card is gone" in said
    assert is_listed_as_unfinished(tmp_path / "out")
    assert on_hub(hub, "stays-whole") == files_in(quick_run)
    assert extract("stays-whole")[0] == 0
    assert files_in(tmp_path / "out") == on_hub(hub, "stays-whole") == files_in(quick_run)


def test_a_shard_that_was_computed_again_is_sent_once(hub, extract, quick_run, tmp_path):
    """Found damaged, computed and committed; later starts ask for no upload, and keep what was damaged."""
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("again")[0] == 0
    shard = shards_in(tmp_path / "out")[7]
    damaged = shard.read_bytes()[:-100]
    shard.write_bytes(damaged)
    assert extract("again")[0] == 0
    assert [path.name for path in (tmp_path / "out/data/00000").glob(".damaged-*")] == [f".damaged-{shard.name}.old"]
    commits, begun = len(our_commits(hub, "again")), len(hub.requests)
    for _ in range(2):
        status, said = extract("again")
        assert status == 0, said
    asked = [request.path for request in hub.requests[begun:]]
    assert asked and not [path for path in asked if "/preupload/" in path or "/objects/batch" in path]
    assert len(our_commits(hub, "again")) == commits
    assert (tmp_path / f"out/data/00000/.damaged-{shard.name}.old").read_bytes() == damaged
    shard.write_bytes(damaged)  # a second time: it is offered again, and the Hub has such a file
    begun = len(hub.requests)
    assert extract("again")[0] == 0
    assert [request.path for request in hub.requests[begun:] if "/preupload/" in request.path]
    assert on_hub(hub, "again") == files_in(quick_run)


def test_a_repository_with_another_run_is_kept_unless_it_is_to_be_replaced(hub, extract, quick_run, tmp_path):
    assert extract("other", "--max_samples", "60", "--seed", "1")[0] == 0
    before = on_hub(hub, "other")
    status, said = extract("other", "--max_samples", "61", "--seed", "0", out="second")
    assert status == 2
    assert "--output_repo user/other: holds another run (seed: 1 there, 0 here; max_samples: 60 there, 61 here)" in said
    assert "Loading" not in said and on_hub(hub, "other") == before
    assert extract("other", "--overwrite", out="third")[0] == 0
    assert on_hub(hub, "other") == files_in(quick_run) == files_in(tmp_path / "third")


def test_a_repository_with_other_files_is_kept(hub, extract):
    hub.add_repo("dataset", "user/thesis", files={"data/train.parquet": b"years of work"})
    status, said = extract("thesis", "--overwrite")
    assert status == 2 and "the repository holds other files, such as data/train.parquet" in said
    assert hub.files("dataset", "user/thesis") == {"data/train.parquet": b"years of work"}


def test_a_branch_is_made_and_pushed_to(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("branched", "--output_revision", "k64/first", "--private")[0] == 0
    assert on_hub(hub, "branched", "k64/first") == files_in(quick_run)
    assert on_hub(hub, "branched") == {} and hub.is_private("dataset", "user/branched")


def test_a_branch_of_a_repository_with_a_run_begins_without_it(hub, extract, quick_run, tmp_path):
    assert extract("two", "--max_samples", "9", "--seed", "3", out="first")[0] == 0
    before = on_hub(hub, "two")
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("two", "--output_revision", "calm")[0] == 0
    assert on_hub(hub, "two", "calm") == files_in(quick_run) and on_hub(hub, "two") == before


def test_no_repository_is_made_for_a_command_that_is_refused(hub, extract):
    assert extract("typo", "--messages_column", "nothing")[0] == 2
    assert not hub.has_repo("dataset", "user/typo")


def test_what_its_owner_writes_into_the_card_stays(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract("worded")[0] == 0
    commits = len(hub.commits("dataset", "user/worded"))
    files = hub.commits("dataset", "user/worded")[-1].files
    files["README.md"].data += b"My own words."
    assert extract("worded")[0] == 0
    assert len(hub.commits("dataset", "user/worded")) == commits


def test_a_pushing_thread_that_dies_is_told(extract, quick_run, tmp_path):
    status, said = extract("panic", "--push_every", "0.5", code=DYING)
    assert status == 1 and "in a library" in said and "Pushed" not in said
    assert re.search(r"\d+ of 60 shards are not on the Hub yet", said)
    assert files_in(tmp_path / "out") == files_in(quick_run)


def test_commits_keep_to_the_limit_of_the_hour(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    status, said = extract("limited", code=LIMITED)
    assert status == 0 and "3 commits in an hour; the next in" in said
    begun = [float(time) for time in re.findall(r"BEGUN (\S+)", said)]
    assert len(begun) == 8 and all(later - time >= 3.9 for time, later in zip(begun, begun[3:], strict=False))
    times = [commit.time for commit in our_commits(hub, "limited")]  # a commit may be on its way for a while
    assert len(times) == 8 and all(later - time >= 2 for time, later in zip(times, times[3:], strict=False))


def test_overwrite_without_a_repository_replaces_none_later(hub, extract, server, calm_source, quick_model, tmp_path):
    """A folder begun with --overwrite, then named together with a repository that holds another run."""
    assert extract("precious", "--seed", "7", "--max_samples", "9", out="first")[0] == 0
    before = on_hub(hub, "precious")
    local = [*flags_for(quick_model, calm_source, tmp_path / "out"), "--overwrite"]
    process = server.start(LASTING, *local)
    wait_for(process, lambda: len(shards_in(tmp_path / "out")) >= 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143, process.stderr
    status, said = extract("precious")
    assert status == 2 and "user/precious: holds another run (seed: 7 there, 0 here" in said
    assert on_hub(hub, "precious") == before


def test_an_unfinished_overwrite_goes_on_replacing_its_repository(hub, extract, start, quick_run, tmp_path):
    assert extract("renewed", "--seed", "7", "--max_samples", "9", out="first")[0] == 0
    process = start("renewed", "--overwrite", "--push_every", "1000", code=LASTING)
    wait_for(process, lambda: len(shards_in(tmp_path / "out")) >= 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "--overwrite" not in said.splitlines()[-1]
    status, said = extract("renewed")
    assert status == 0, said
    assert on_hub(hub, "renewed") == files_in(quick_run)


def test_an_overwrite_that_fails_before_its_first_shard_leaves_the_repository_as_it_is(hub, extract, start):
    assert extract("kept", "--max_samples", "9", out="first")[0] == 0
    before = on_hub(hub, "kept")
    failing = """
from chat_logits.extraction import shard_computer
from chat_logits.errors import ToolkitError
def compute(*_):
    raise ToolkitError("the model is gone")
shard_computer.ShardComputer.compute = compute
import extract_logits"""
    code = COMMAND.replace("import extract_logits", failing)
    for flags in (["--seed", "7"], ["--max_samples", "9"]):  # another run, and the same
        process = start("kept", *flags, "--overwrite", code=code)
        _, said = process.communicate()
        assert process.returncode == 1 and "the model is gone" in said
        assert on_hub(hub, "kept") == before


def test_an_overwrite_that_goes_on_into_another_repository_replaces_that_once(hub, extract, start, quick_run, tmp_path):
    for repo in ("one", "other-one"):
        assert extract(repo, "--seed", "7", "--max_samples", "9", out=repo)[0] == 0
    stopped = start("one", "--overwrite", "--push_every", "1000", code=LASTING)
    wait_for(stopped, lambda: len(shards_in(tmp_path / "out")) >= 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate()
    assert stopped.returncode == 143, stopped.stderr
    before = len(our_commits(hub, "other-one"))
    stopped = start("other-one", "--overwrite", "--push_every", "0", code=LASTING)
    wait_for(stopped, lambda: len(our_commits(hub, "other-one")) >= before + 2)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate()
    assert stopped.returncode == 143, stopped.stderr
    kept = {path for path in on_hub(hub, "other-one") if path.startswith("data/")}
    assert extract("other-one", "--overwrite")[0] == 0
    assert on_hub(hub, "other-one") == files_in(quick_run)
    sent = [path for commit in our_commits(hub, "other-one") for path in commit.paths if path in kept]
    assert 0 < len(kept) < SHARDS and sorted(set(sent)) == sorted(kept)
    assert sum(sent.count(path) for path in kept) <= len(kept) + 3, "those of the old run were deleted or replaced"


def test_an_overwrite_cut_short_is_not_taken_for_one_of_another_repository(hub, extract, start):
    """Killed between setting the old run aside and beginning the new one."""
    for repo in ("mine", "yours"):
        assert extract(repo, "--seed", "7", "--max_samples", "9", out="out" if repo == "mine" else "yours")[0] == 0
    before = on_hub(hub, "yours")
    cut = """
import os
from chat_logits.extraction import folder as run_folder
set_aside = run_folder.RunFolder._set_aside
def then_cut(self):
    set_aside(self)
    os._exit(9)
run_folder.RunFolder._set_aside = then_cut
import extract_logits"""
    process = start("mine", "--overwrite", code=COMMAND.replace("import extract_logits", cut))
    process.communicate()
    assert process.returncode == 9
    for _ in range(2):
        status, said = extract("yours")
        assert status == 2 and "user/yours: holds another run" in said
        assert on_hub(hub, "yours") == before


def test_a_damaged_record_on_the_hub_is_named_and_can_be_replaced(hub, extract, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    files = {"extraction.json": b"{}", "shards.json": b"{", "data/00000/train-00099.parquet": b"PAR1"}
    hub.add_repo("dataset", "user/broken", files=files)
    status, said = extract("broken")
    assert status == 2, said
    assert "user/broken: holds another run (" in said and "format_version None" in said
    shutil.rmtree(tmp_path / "out")
    assert extract("broken", "--overwrite")[0] == 0
    assert on_hub(hub, "broken") == files_in(quick_run)


def test_a_full_disk_pushes_what_is_finished(hub, start, tmp_path):
    late = """
from chat_logits.storage import disk
free = disk.free_bytes
calls = []
def later(folder):
    calls.append(1)
    return free(folder) if len(calls) < 30 else 0
disk.free_bytes = later
import extract_logits"""
    process = start("filled", "--push_every", "1000", code=COMMAND.replace("import extract_logits", late))
    _, errors = process.communicate()
    assert process.returncode == 1 and "is full" in errors, errors
    here = {name for name in files_in(tmp_path / "out") if name.startswith("data/")}
    assert 0 < len(here) < SHARDS and here == {name for name in on_hub(hub, "filled") if name.startswith("data/")}


def test_a_push_that_is_refused_on_the_way_ends_the_run_with_all_rows_here(hub, extract, quick_run, tmp_path):
    hub.inject(Fault("refuse", "commit", status=403, skip=1, times=math.inf))
    status, said = extract("forbidden", "--push_every", "0.5")
    hub.clear_faults()
    assert status == 1 and re.search(r"\d+ of 60 shards are not on the Hub yet", said) and "403" in said
    assert files_in(tmp_path / "out") == files_in(quick_run)


def test_no_token_is_in_any_file_of_the_run(quick_run, through_each_fault):
    assert through_each_fault and not any(TOKEN.encode() in data for data in files_in(quick_run).values())


# --- one row ---


@pytest.mark.usefixtures("through_each_fault")
def test_one_row_is_fetched_and_not_the_dataset(hub, server, quick_run):
    """Of a dataset of 60 shards: the files around, a footer and a row group."""
    code = "from chat_logits.storage.dataset import open_dataset; "
    code += "row = open_dataset('user/none').read_row(77); print(row['source_index'])"
    begun = len(hub.requests)
    done = server.run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == open_dataset(str(quick_run)).read_row(77)["source_index"]
    fetched = [request for request in hub.requests[begun:] if request.sent]
    total = sum(map(len, on_hub(hub, "none").values()))
    sent = sum(request.sent for request in fetched)
    print(f"{sent:,} of {total:,} bytes ({100 * sent / total:.2f}%), {len(fetched)} requests")
    assert sent <= 0.03 * total, [(request.path, request.sent) for request in fetched]
