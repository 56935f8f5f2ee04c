"""Nothing is lost: a run that is stopped at any moment, by anything, goes on to the same files."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, TEMPLATE, run_command
from lives import Life, late, stopping
from runs import ROWS, SHARDS, files_in, flags_for, shards_in

import extract_logits
from chat_logits.errors import UsageError
from chat_logits.extraction.folder import RunFolder
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest

SHORT = ("--max_samples", "36")


@pytest.fixture
def undisturbed(quick_run, tmp_path) -> dict[str, bytes]:
    """Its files, and a copy of it to work on, in ``tmp_path / "undisturbed"``."""
    shutil.copytree(quick_run, tmp_path / "undisturbed")
    return files_in(quick_run)


def wait_for(condition, life: Life, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert life.is_alive(), life.said
        assert time.monotonic() < until, life.said
        time.sleep(0.005)


def test_killed_at_ten_random_moments_the_run_ends_in_the_same_files(flags, undisturbed, tmp_path):
    dice, out, moments = random.Random(4), tmp_path / "killed", []
    for life_number in range(10):
        before = len(shards_in(out))
        life = Life(flags("killed"), tmp_path / f"life{life_number}.log", stopping(5))
        wanted = before + dice.randint(0, 3)
        wait_for(lambda wanted=wanted: len(shards_in(out)) >= wanted, life)
        time.sleep(dice.uniform(0, 0.3 if dice.random() < 0.3 else 0.05))
        life.kill()
        assert life.wait() == -signal.SIGKILL, life.said
        moments.append(len(shards_in(out)))
    assert len(set(moments)) > 5 and moments[-1] < SHARDS, moments
    assert Life(flags("killed"), tmp_path / "last.log").wait() == 0
    found = files_in(out)
    assert found.keys() == undisturbed.keys()
    assert found == undisturbed
    dataset = open_dataset(str(out))
    rows = [dataset.read_row(i)["source_index"] for i in range(dataset.num_rows)]
    assert rows == [i for i in range(len(ROWS)) if i % 9]


# --- the windows of a shard's writing ---


def die_at(when: str, name: str, skip: int) -> None:
    """In the process that is to die: kill it at the ``skip``-th file of that name, at this point of its writing."""
    from chat_logits.extraction import folder as run_folder
    from chat_logits.storage import disk

    original = disk.flush_and_rename
    seen = []

    def deadly(temporary: Path, path: Path, *rest) -> None:
        seen.extend([path] if re.fullmatch(name, path.name) else [])
        strikes = len(seen) > skip
        if strikes and when == "half written":
            os.truncate(temporary, temporary.stat().st_size // 2)
        if strikes and when != "renamed":
            os.kill(os.getpid(), signal.SIGKILL)
        original(temporary, path, *rest)
        if strikes:
            os.kill(os.getpid(), signal.SIGKILL)

    disk.flush_and_rename = deadly
    run_folder.DESCRIBING = 0  # the lists are written after each shard, however long that takes here


@pytest.fixture(scope="module")
def short_run(quick_model, calm_source, tmp_path_factory) -> dict[str, bytes]:
    """The files of the run's first twelve shards."""
    out = tmp_path_factory.mktemp("short") / "out"
    assert extract_logits.main([*flags_for(quick_model, calm_source, out), *SHORT]) == 0
    return files_in(out)


@pytest.mark.parametrize(
    ("when", "name", "skip"),
    [
        ("half written", r".*\.parquet", 2),
        ("written", r".*\.parquet", 0),
        ("renamed", r".*\.parquet", 3),
        ("half written", r"shards\.json", 2),
        ("renamed", r"shards\.json", 1),
        ("half written", r"README\.md", 2),
        ("renamed", r"README\.md", 3),
        ("written", r"extraction\.json", 0),
        ("renamed", r"extraction\.json", 0),
    ],
)
def test_stopped_in_any_window_of_writing_the_run_goes_on(flags, short_run, tmp_path, when, name, skip):
    out = tmp_path / "window"
    life = Life(flags("window", *SHORT), tmp_path / "first.log", functools.partial(die_at, when, name, skip))
    assert life.wait() == -signal.SIGKILL, life.said
    assert len(shards_in(out)) < 10
    assert extract_logits.main(flags("window", *SHORT)) == 0
    assert files_in(out) == short_run
    assert not list(out.rglob("*.tmp"))


def test_two_processes_are_kept_apart_and_the_second_goes_on_when_the_first_is_dead(flags, undisturbed, tmp_path):
    out = tmp_path / "both"
    first = Life(flags("both"), tmp_path / "first.log", stopping(8))
    wait_for(lambda: len(shards_in(out)) > 3, first)
    first.kill(signal.SIGSTOP)
    before = files_in(out)
    second = Life(flags("both"), tmp_path / "second.log")
    assert second.wait() == 2
    assert "another process is extracting into this folder" in second.said
    assert len(second.said.strip().splitlines()) <= 2
    assert Life(flags("both", "--overwrite"), tmp_path / "third.log").wait() == 2
    assert files_in(out) == before
    first.kill()
    first.wait()
    assert extract_logits.main(flags("both")) == 0
    assert files_in(out) == undisturbed


def interrupt_in_first_batch() -> None:
    """In the process: Ctrl-C as soon as a batch has been computed."""
    import logit_codec

    encode_rows = logit_codec.encode_rows

    def interrupting(*batch) -> list[dict]:
        logit_codec.encode_rows = encode_rows
        os.kill(os.getpid(), signal.SIGINT)
        return encode_rows(*batch)

    logit_codec.encode_rows = interrupting


def test_a_run_that_is_being_replaced_is_kept_until_the_new_one_is_whole(flags, undisturbed, tmp_path):
    """Ctrl-C while replacing, twice; then a run that finishes."""
    out, wanted = tmp_path / "undisturbed", flags("undisturbed", "--top_k", 8, "--overwrite")
    for number in range(2):
        life = Life(wanted, tmp_path / f"{number}.log", interrupt_in_first_batch)
        assert life.wait() == 130, life.said
        assert f"is kept in {out}/.replaced." in life.said
        assert files_in(out / ".replaced") == undisturbed
    assert extract_logits.main(wanted) == 0
    assert open_dataset(str(out)).manifest.top_k == 8 and not (out / ".replaced").exists()


# --- damage ---


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(content)


def swap_with_another(path: Path) -> None:
    shutil.copy(path.with_name("train-00007.parquet"), path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [cut, empty, swap_with_another, functools.partial(flip, place=0.2), functools.partial(flip, place=0.9)],
    ids=["cut", "empty", "another shard's", "a bit of a page", "a bit of the footer"],
)
def test_a_damaged_shard_is_set_aside_and_computed_again(flags, undisturbed, tmp_path, capsys, damage):
    out = shutil.copytree(tmp_path / "undisturbed", tmp_path / "damaged")
    damage(out / "data/00000/train-00011.parquet")
    damaged = (out / "data/00000/train-00011.parquet").read_bytes()
    capsys.readouterr()
    assert extract_logits.main(flags("damaged")) == 0
    said = capsys.readouterr().err
    assert "data/00000/train-00011.parquet: " in said and "Set aside as" in said
    assert (out / "data/00000/.damaged-train-00011.parquet").read_bytes() == damaged
    assert files_in(out) == undisturbed


def test_files_around_that_are_missing_are_made_again(flags, undisturbed, tmp_path):
    out = shutil.copytree(tmp_path / "undisturbed", tmp_path / "bare")
    (out / "shards.json").unlink()
    (out / "README.md").write_text("?")
    assert extract_logits.main(flags("bare")) == 0
    assert files_in(out) == undisturbed


# --- the same run or another ---


def test_another_configuration_is_refused_with_what_differs(flags, tmp_path, capsys, undisturbed):
    out = tmp_path / "undisturbed"
    assert extract_logits.main(flags("undisturbed", "--top_k", "8", "--seed", "3", "--dtype", "bfloat16")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for text in (
        "top_k: 64 there, 8 here",
        "seed: 0 there, 3 here",
        "dtype: float32 there, bfloat16 here",
        "--overwrite",
    ):
        assert text in message
    assert "top_p" not in message and files_in(out) == undisturbed


@pytest.mark.usefixtures("undisturbed")
def test_another_template_is_told_by_where_it_differs(flags, tmp_path, capsys):
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.read_text(encoding="utf-8").replace("<|im_start|>", "<|im_begin|>"), encoding="utf-8")
    flags = flags("undisturbed")
    flags[flags.index(str(TEMPLATE))] = str(other)
    assert extract_logits.main(flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "chat_template: from character" in message and "im_start" in message and "im_begin" in message
    assert len(message) < 500


def small_memory() -> None:
    from chat_logits.model import memory as memory_budget

    memory_budget.total_memory = lambda _device: 2**26


def test_a_run_that_goes_on_keeps_the_budgets_it_began_with(flags, undisturbed, tmp_path):
    """The machine has less memory the second time: other batches would give other last bits."""
    out = tmp_path / "tight"
    life = Life(flags("tight"), tmp_path / "first.log", stopping(8))
    wait_for(lambda: len(shards_in(out)) > 5, life)
    life.kill()
    assert life.wait() == -signal.SIGKILL and len(shards_in(out)) < SHARDS
    assert Life(flags("tight"), tmp_path / "second.log", small_memory).wait() == 0
    assert files_in(out) == undisturbed


def test_a_template_that_asks_for_the_date_gets_the_first_days(flags, tmp_path):
    dated = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE.read_text(encoding="utf-8")
    flags = flags("dated", "--max_samples", "12")
    flags[flags.index(str(TEMPLATE))] = dated
    assert extract_logits.main(flags) == 0
    out = tmp_path / "dated"
    first = files_in(out)
    (out / "data/00000/train-00001.parquet").unlink()
    life = Life(flags, tmp_path / "later.log", another_day)
    assert life.wait() == 0, life.said
    assert files_in(out) == first


def another_day() -> None:
    import datetime

    from chat_logits.data import template_choice

    class Later(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 5, 4)

    template_choice.datetime = type("module", (), {"date": Later})


# --- not finished yet ---


def test_a_run_that_is_not_finished_says_so_to_its_readers(flags, undisturbed, tmp_path, caplog):
    out, life = tmp_path / "begun", Life(flags("begun"), tmp_path / "begun.log", stopping(8))
    wait_for(lambda: len(shards_in(out)) >= 4, life)
    life.kill()
    assert life.wait() == -signal.SIGKILL
    begun = open_dataset(str(out))
    told = (
        f"{out}: its extraction is not finished ({begun.num_rows} conversations so far); run the same extract command"
    )
    assert told in caplog.text
    open_dataset(str(out))
    assert caplog.text.count("not finished") == 1  # once in a process
    assert "The extraction is not finished" in (out / "README.md").read_text()
    caplog.clear()
    assert extract_logits.main(flags("begun")) == 0
    assert open_dataset(str(out)).num_rows > begun.num_rows and "not finished" not in caplog.text
    assert files_in(out) == undisturbed


def test_a_finished_run_stays_finished_where_the_command_is_given_again_and_stopped(undisturbed, tmp_path):
    with RunFolder(tmp_path / "undisturbed") as folder:
        folder.resume(folder.recorded)
    assert files_in(tmp_path / "undisturbed") == undisturbed
    shards_in(tmp_path / "undisturbed")[3].unlink()
    with RunFolder(tmp_path / "undisturbed") as folder:
        folder.resume(folder.recorded)
    assert json.loads((tmp_path / "undisturbed" / "shards.json").read_text())["unfinished"] is True


# --- signals ---


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("terminal_closes")
def test_a_signal_ends_the_run_in_order_and_prints_the_command_that_goes_on(
    flags, undisturbed, tmp_path, number, status
):
    out, log = tmp_path / "signalled", tmp_path / "signalled.log"
    command = [sys.executable, "extract_logits.py", *flags("signalled", "--overwrite")]
    (tmp_path / "sitecustomize.py").write_text(late(shards=6, seconds=1))  # which leaves the command as it is
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPO, env=env, stdout=file, stderr=file)
    while len(shards_in(out)) < 4:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=300) == status
    said = log.read_text()
    finished = int(re.search(r"Stopped\. (\d+) finished shards are in", said)[1])
    assert finished == len(shards_in(out)) < SHARDS and not list(out.rglob("*.tmp"))
    assert "Traceback" not in said
    printed = shlex.split(said.splitlines()[-1])
    assert printed == [part for part in command if part != "--overwrite"]
    done = subprocess.run(printed, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(ROWS)}/{len(ROWS)}" in done.stderr
    assert files_in(out) == undisturbed


def write_forever() -> None:
    """A disk on which a shard is never written; it is said when that begins, and when a signal has come."""
    from chat_logits.cli.signals import Stopped
    from chat_logits.extraction import shard_computer

    def slow(*_):
        print("WRITING", file=sys.stderr, flush=True)
        time.sleep(10_000)

    def init(self, number):
        print("SIGNAL", file=sys.stderr, flush=True)
        original(self, number)

    original, Stopped.__init__, shard_computer.write_shard = Stopped.__init__, init, slow


def test_a_second_signal_leaves_at_once(flags, tmp_path):
    life = Life(flags("stuck"), tmp_path / "stuck.log", write_forever)
    wait_for(lambda: "WRITING" in life.said, life)
    life.kill(signal.SIGINT)
    wait_for(lambda: "SIGNAL" in life.said, life)
    assert life.is_alive()
    life.kill(signal.SIGINT)
    assert life.wait() == 130


def wait_in_c(when: str) -> None:
    """The main thread waits in C code that no signal ends, as for a device that does not answer: from the first signal
    on, or before. Other signals that are handled meanwhile count for nothing."""
    import ctypes

    from chat_logits.cli.signals import Stopped
    from chat_logits.extraction import shard_computer

    def wait(*_) -> None:
        signal.signal(signal.SIGWINCH, lambda *_: None)
        print("WAITING", file=sys.stderr, flush=True)
        lock, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
        library.pthread_mutex_lock(lock)
        library.pthread_mutex_lock(lock)

    write_forever()
    if when == "before":
        shard_computer.run_shards = wait
    else:
        Stopped.__init__ = wait


@pytest.mark.parametrize(("when", "begins"), [("after", "WRITING"), ("before", "WAITING")])
def test_signals_end_a_process_whose_main_thread_waits_in_c(flags, tmp_path, when, begins):
    life = Life(flags("hangs"), tmp_path / "hangs.log", functools.partial(wait_in_c, when))
    wait_for(lambda: begins in life.said, life)
    if when == "after":
        life.kill(signal.SIGTERM)
        wait_for(lambda: "WAITING" in life.said, life)
    for _ in range(5):
        life.kill(signal.SIGWINCH)
        assert life.is_alive()
    while life.is_alive():
        life.kill(signal.SIGINT)
        time.sleep(0.05)  # signals of one number that have not been seen yet are one signal
    assert life.wait() == 130
    assert life.said.endswith("Stopped.\n")


def test_a_forks_signals_are_its_own():
    """A child's second signal ends the child alone."""
    code = """
import os, signal
from chat_logits.cli.signals import Stopped, stop_on_signals
with stop_on_signals():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, b"1")
            signal.pause()
        except Stopped:
            os.write(writing, b"2")
            signal.pause()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.read(reading, 1)
        os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "130\n"), done.stderr


# --- the disk ---

FULL_DISK = """
set -eu
mount -t tmpfs -o size={size} none {place}
set +e
{command}; first=$?
find {place}/out -name '*.tmp' > {place}/../leftovers
find {place}/out -name 'train*.parquet' | wc -l > {place}/../finished
set -e
mount -o remount,size=64m {place}
{command}
cp -r {place}/out {place}/../copied
exit $first
"""


@pytest.mark.parametrize("spare", [None, 0], ids=["seen before", "met on the way"])
def test_a_full_disk_stops_the_run_cleanly_and_it_goes_on_when_there_is_room(flags, undisturbed, tmp_path, spare):
    """A file system of its own, once too small for the spare room, once full in the middle of a shard."""
    place = tmp_path / "disk"
    place.mkdir()
    code = "import sys, extract_logits\nfrom chat_logits.storage import disk\n"
    # Where the end is met on the way, the disk says nothing of it before.
    code += "" if spare is None else f"disk.SPARE, disk.free_bytes = {spare}, lambda folder: 2**40\n"
    code += "sys.exit(extract_logits.main(sys.argv[1:]))"
    flags = flags("disk/out")
    command = shlex.join([sys.executable, "-c", code, *flags])
    size = "6m" if spare is None else "2m"
    script = FULL_DISK.format(size=size, place=place, command=command)
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"error: the disk of {place}/out is full (" in done.stderr and "the same command to resume" in done.stderr
    assert "not expected" not in done.stderr
    assert 0 < int((tmp_path / "finished").read_text()) < SHARDS
    assert (tmp_path / "leftovers").read_text() == ""
    assert files_in(tmp_path / "copied") == undisturbed


def test_a_run_that_cannot_fit_is_refused_before_the_model_loads(flags, tmp_path, monkeypatch, capsys):
    from chat_logits.storage import disk as disk_space

    monkeypatch.setattr(disk_space, "free_bytes", lambda _folder: 100_000)
    assert extract_logits.main(flags("small")) == 1
    said = capsys.readouterr().err
    assert re.search(r"error: the rest of the run needs about \d\.\d MB, and 100\.0 kB are free in", said)
    assert "Loading" not in said and not (tmp_path / "small").exists()


# --- what the command says ---


def test_a_finished_run_is_told_again_without_a_model(flags, undisturbed, tmp_path):
    done = run_command("extract_logits.py", *flags("undisturbed"))
    assert done.returncode == 0 and "Loading" not in done.stderr
    assert "160 written, 20 skipped" in done.stdout and files_in(tmp_path / "undisturbed") == undisturbed


def test_a_record_that_is_damaged_is_named_and_can_be_replaced(flags, undisturbed, tmp_path, capsys):
    (tmp_path / "undisturbed" / "extraction.json").write_text('{"format_version": 2}')
    assert extract_logits.main(flags("undisturbed")) == 1
    assert "extraction.json has no top_k, top_p" in capsys.readouterr().err
    assert extract_logits.main(flags("undisturbed", "--overwrite")) == 0
    assert files_in(tmp_path / "undisturbed") == undisturbed


def test_the_lock_is_left_by_whoever_leaves(undisturbed, tmp_path):
    kept = []
    for _ in range(2):
        with RunFolder(tmp_path / "undisturbed") as folder:
            folder.resume(folder.recorded)
        kept.append(folder)
    assert len(kept[1].entries) == SHARDS and files_in(tmp_path / "undisturbed") == undisturbed


def test_a_run_that_began_meanwhile_is_not_written_over(undisturbed, tmp_path):
    """Two starts find no folder; the first has begun and left before the second gets so far."""
    late = RunFolder(tmp_path / "shared")
    (tmp_path / "undisturbed").rename(tmp_path / "shared")
    with pytest.raises(UsageError, match="another process has begun a run here"):
        late.begin(Manifest.read(tmp_path / "shared" / "extraction.json", "shared"))
    assert files_in(tmp_path / "shared") == undisturbed


def unreadable() -> None:
    """A disk that answers no reads for now."""
    from chat_logits.storage import shard as shard_files

    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    shard_files.pq.ParquetFile = failing


def test_a_disk_that_cannot_be_read_damages_nothing(flags, undisturbed, tmp_path):
    life = Life(flags("undisturbed", "--check_shards"), tmp_path / "unread.log", unreadable)
    assert life.wait() == 1
    assert "it cannot be read now" in life.said and "Set aside" not in life.said
    assert files_in(tmp_path / "undisturbed") == undisturbed


def test_a_log_that_is_closed_is_no_success(flags):
    command = shlex.join([sys.executable, "extract_logits.py", *flags("piped")])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} 2>&1 | head -c 100"], cwd=REPO, capture_output=True
    )
    assert done.returncode == 1


def stuck_source() -> None:
    """A source that never answers after its first rows, and a disk on which nothing can be written."""
    from chat_logits.data.reader import Reader
    from chat_logits.extraction import shard_computer

    read = Reader.read

    def stuck(self, first, end):
        if first >= 6:
            time.sleep(10_000)
        return read(self, first, end)

    def failing(*_):
        raise OSError(30, "Read-only file system")

    Reader.read, shard_computer.write_shard = stuck, failing


def test_a_failure_does_not_wait_for_a_source_that_never_answers(flags, tmp_path):
    life = Life(flags("stuck"), tmp_path / "stuck.log", stuck_source)
    assert life.wait() == 1
    assert "Read-only file system" in life.said


# --- finished shards that have not changed ---


def test_shards_as_they_were_written_are_not_read_again_unless_asked_for(flags, undisturbed, tmp_path, capsys):
    """A flipped byte with the file's old size and time: seen by --check_shards alone, or once the record is gone."""
    out, flags = tmp_path / "undisturbed", flags("undisturbed")
    shard = shards_in(out)[7]
    before = shard.stat()
    flip(shard, 0.5)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = shard.read_bytes()
    assert extract_logits.main(flags) == 0
    assert shard.read_bytes() == changed and "Set aside" not in capsys.readouterr().err
    assert extract_logits.main([*flags, "--check_shards"]) == 0
    assert "Set aside" in capsys.readouterr().err
    assert files_in(out) == undisturbed


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "another run's"])
def test_a_record_that_does_not_hold_makes_all_shards_be_read(flags, undisturbed, tmp_path, capsys, damage):
    out, flags = tmp_path / "undisturbed", flags("undisturbed")
    shard, record = shards_in(out)[7], out / ".checked.json"
    before, content = shard.stat(), json.loads(record.read_text())
    flip(shard, 0.5)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    if damage == "gone":
        record.unlink()
    elif damage == "cut":
        cut(record)
    else:
        key, value = ("fingerprint", "0" * 64) if damage == "another run's" else ("shards", content["shards"][:-1])
        record.write_text(json.dumps({**content, key: value}))
    assert extract_logits.main(flags) == 0
    assert "Set aside" in capsys.readouterr().err
    assert files_in(out) == undisturbed
