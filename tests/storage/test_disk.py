"""Folders that are there whole or not at all, built by processes that are killed, or that build at the same time; and
places that are none for them."""

import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.folder import RunFolder
from chat_logits.storage.disk import DiskFull, folder_written_whole, refuse_filled, room_or_stop, write_lines

BUILDER = """
import sys
from pathlib import Path
from chat_logits.storage.disk import folder_written_whole
with folder_written_whole(Path(sys.argv[1])) as building:
    (building / "its").write_text("own")
    print("BUILDING", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def build():
    """Start a process that builds a folder until its stdin ends, or it does."""
    builders = []

    def start(folder) -> subprocess.Popen:
        command = [sys.executable, "-c", BUILDER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        builders.append(subprocess.Popen(command, cwd=REPO, text=True, **pipes))
        assert builders[-1].stdout.readline() == "BUILDING\n"
        return builders[-1]

    yield start
    for process in builders:
        process.kill()
        process.communicate()


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder) -> None:
    with folder_written_whole(folder) as building:
        (building / "file").write_text("whole")


def test_what_a_killed_process_has_left_is_removed_by_the_next(build, tmp_path, caplog):
    killed = build(tmp_path / "out")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert names_in(left) == ["its"]
    write(tmp_path / "other")
    assert left.is_dir()  # it was to become another folder
    with caplog.at_level("INFO", "chat_logits"):
        write(tmp_path / "out")
    assert names_in(tmp_path) == ["other", "out"] and names_in(tmp_path / "out") == ["file"]
    assert f"Removed {left}, which a killed process left behind." in caplog.text


def test_what_a_live_process_builds_is_left_to_it(build, tmp_path):
    live = build(tmp_path / "out")
    (its,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "out") as building:
        assert building != its and building.parent == tmp_path
        _ = 1 / 0
    assert names_in(its) == ["its"] and not building.exists()
    live.communicate("")
    assert live.returncode == 0
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["its"]


@pytest.mark.parametrize("is_there", [False, True])
def test_of_two_processes_the_first_that_is_done_gives_the_folder(build, tmp_path, is_there):
    if is_there:
        (tmp_path / "out").mkdir()
    slow = build(tmp_path / "out")
    write(tmp_path / "out")
    _, said = slow.communicate("")
    assert slow.returncode == 1 and "out: it cannot be written: Directory not empty" in said
    assert names_in(tmp_path) == ["out"] and names_in(tmp_path / "out") == ["file"]


def test_an_empty_folder_stays_where_it_is(build, tmp_path, monkeypatch):
    """As a mount point has to, and the user's own place. What a killed process has left there counts for nothing, and
    neither does a new file system's own folder."""
    place = tmp_path / "out"
    (place / "lost+found").mkdir(parents=True)
    RunFolder(place).close()
    (place / ".lock").unlink()
    (tmp_path / "link").symlink_to(place)
    before = place.stat()
    monkeypatch.chdir(place)
    for folder in (Path(), tmp_path / "link", place):
        killed = build(folder.absolute())
        killed.kill()
        killed.wait()
        assert [path.name for path in place.glob(".*.tmp/*")] == ["its"]
        refuse_filled(folder, "save")
        write(folder)
        assert names_in(place) == ["file", "lost+found"] and Path.cwd().samefile(place)
        with pytest.raises(UsageError, match=r"`save` .*: holds files, such as file"):
            refuse_filled(folder, "save")
        (place / "file").unlink()
    assert place.stat().st_ino == before.st_ino and names_in(tmp_path) == ["link", "out"]


def test_a_name_may_be_as_long_as_a_name_may_be(tmp_path):
    folder = tmp_path / ("ß" * 127)
    refuse_filled(folder, "save")
    write(folder)
    assert names_in(folder) == ["file"] and len(names_in(tmp_path)) == 1


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/proc/nope", "/proc/nope: /proc is not a folder that can be written to (No such file or directory)"),
        ("/proc/self/fdinfo/x", "/proc/self/fdinfo is not a folder that can be written to (No such file or directory)"),
        ("/proc/version/x", "/proc/version is not a folder that can be written to (Not a directory)"),
        ("x" * 300, f"{'x' * 80}: File name too long; expected the name of a file or a folder"),
        ("out/\udcff", r"out/\udcff: its name is not UTF-8; expected the name of a file or a folder"),
    ],
)
def test_a_place_that_no_folder_can_be_at_is_told_before_anything_is_done(tmp_path, monkeypatch, place, told):
    monkeypatch.chdir(tmp_path)
    for refuse in (lambda: refuse_filled(Path(place), "output_dir"), lambda: RunFolder(Path(place))):
        with pytest.raises(UsageError, match=f"`output_dir` .*{re.escape(told)}$"):
            refuse()
    assert names_in(tmp_path) == []


def test_names_are_taken_as_they_are(build, tmp_path):
    """And a folder that nobody has locked may be anybody's."""
    killed = build(tmp_path / "a[bc]")
    killed.kill()
    killed.wait()
    (tmp_path / ".ab.01234567.tmp").mkdir()
    write(tmp_path / "ab")
    assert len(names_in(tmp_path)) == 4
    write(tmp_path / "a[bc]")
    assert names_in(tmp_path) == [".ab.01234567.tmp", "a[bc]", "ab"]


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolkitError, match="file/out: it cannot be written: "):
        write(tmp_path / "file" / "out")


def test_a_limit_on_file_sizes_is_no_full_disk(tmp_path):
    """Files may have 1,000 bytes here, and 1,001 are written, also into a folder that is to be there whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(place: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with room_or_stop(place):
                (place / "file").write_bytes(bytes(1001))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    told = r"a file reached the limit on file sizes \(ulimit -f\)\. Raise it, and give the same command again\."
    with pytest.raises(DiskFull, match=told):
        write(tmp_path)
    with pytest.raises(ToolkitError, match=told), folder_written_whole(tmp_path / "out") as building:
        write(building)
    with pytest.raises(DiskFull, match=r"the disk of .* is full \(No space left on device\)"), room_or_stop(tmp_path):
        Path("/dev/full").write_text("more")
    assert names_in(tmp_path) == ["file"]


def test_lines_are_written_as_they_are_made(tmp_path):
    """What was made before is on the disk, but for a buffer; the file has its name once all are."""
    seen = []

    def lines():
        for number in range(1000):
            yield f"{number:099d}\n"
            seen.append([path.stat().st_size for path in tmp_path.glob(".*.tmp")])

    write_lines(tmp_path / "rows.jsonl", lines())
    sizes = [size for (size,) in seen]
    assert all(100 * number - size <= 2**17 for number, size in enumerate(sizes)) and sizes[-1] > 0
    content = (tmp_path / "rows.jsonl").read_text()
    assert content == "".join(f"{number:099d}\n" for number in range(1000)) and len(content) == 100_000
    assert names_in(tmp_path) == ["rows.jsonl"]
