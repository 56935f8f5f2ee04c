"""How much of text files is read, in bytes and in files opened, and the right rows, whatever was read before."""

import csv
import gc
import gzip
import io
import json
import random
import subprocess
import sys
import weakref
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from conftest import REPO
from fsspec.implementations.local import LocalFileSystem
from loopback_hub import LoopbackHub

from chat_logits.data import text_rows
from chat_logits.data.csv_rows import CsvRows
from chat_logits.data.json_rows import JsonRows
from chat_logits.data.text_rows import BadRow, TextRows

NUM_ROWS, SHARD = 3000, 32
ROWS = [{"question": f"{i}, é? {random.Random(i).random()}", "answer": f"{i}\n" * (i % 3)} for i in range(NUM_ROWS)]


class Tally:
    """What was read of the files ``counted://…``, as they lie there; ``fails`` lets the next read fail."""

    def __init__(self) -> None:
        self.num_bytes, self.opened, self.fails = 0, 0, False
        self.files: weakref.WeakSet = weakref.WeakSet()

    def num_open(self) -> int:
        return sum(not file.closed for file in self.files)


@pytest.fixture
def tally():
    """Of files that are opened by the URLs ``counted://…``."""
    tally = Tally()

    class File(io.FileIO):
        def readinto(self, buffer):
            if tally.fails:
                tally.fails = False
                raise ConnectionError("the line broke")
            count = super().readinto(buffer)
            tally.num_bytes += count
            return count

    class Files(LocalFileSystem):
        protocol, cachable = "counted", False

        def _open(self, path, mode="rb", **_options):
            file = File(path, mode)
            tally.opened += 1
            tally.files.add(file)
            return io.BufferedReader(file)

    fsspec.register_implementation("counted", Files, clobber=True)
    return tally


def json_lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_lines(rows) -> bytes:
    text = io.StringIO(newline="")
    written = csv.DictWriter(text, ["question", "answer"], lineterminator="\n")
    written.writeheader()
    written.writerows(rows)
    return text.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


CONTENTS = {
    ".jsonl": lambda: [json_lines(ROWS)],
    ".jsonl.gz": lambda: [gzip.compress(json_lines(ROWS))],
    ".jsonl.zst": lambda: [zstd(json_lines(ROWS))],
    ".json": lambda: [json.dumps(ROWS).encode()],
    ".csv": lambda: [csv_lines(ROWS)],
    ".csv.gz": lambda: [gzip.compress(csv_lines(ROWS))],
    ".part.jsonl.gz": lambda: [gzip.compress(json_lines(ROWS[i : i + 700])) for i in range(0, NUM_ROWS, 700)],
    ".part.jsonl": lambda: [json_lines(ROWS[i : i + 20]) for i in range(0, NUM_ROWS, 20)],
}


@pytest.fixture(params=CONTENTS)
def files(request, tmp_path) -> list[str]:
    """The rows in one file or several of a kind."""
    return written(tmp_path, request.param, CONTENTS[request.param]())


def written(folder, ending: str, contents: list[bytes]) -> list[str]:
    paths = [folder / f"{number:03}{ending}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return list(map(str, paths))


def rows_of(files: list[str], is_streamed: bool = True, is_counted: bool = True) -> TextRows:
    kind = CsvRows if ".csv" in files[0] else JsonRows
    return kind([f"counted://{file}" if is_counted else file for file in files], is_streamed)


def size_of(files: list[str]) -> int:
    return sum(Path(file).stat().st_size for file in files)


# --- what is read ---


@pytest.mark.parametrize("every", [1, 3])
def test_shards_in_order_read_each_file_once(files, tally, every):
    """All shards, or those that one worker of three gets."""
    rows = rows_of(files)
    for first in range(0, NUM_ROWS + 3 * SHARD, every * SHARD):  # and what is asked for behind the end
        assert rows.read(first, first + SHARD) == ROWS[first : first + SHARD]
    header = min(2**18, size_of(files)) if ".csv" in files[0] else 0  # of a buffer's size
    assert tally.num_bytes <= size_of(files) + header
    assert tally.opened == len(files) + (".csv" in files[0])


def test_rows_are_counted_in_one_more_pass(files, tally):
    rows = rows_of(files, is_streamed=False)
    assert rows.num_rows == NUM_ROWS
    for first in range(0, NUM_ROWS, SHARD):
        assert rows.read(first, first + SHARD) == ROWS[first : first + SHARD]
    assert tally.opened <= 2 * len(files) + (".csv" in files[0])
    assert tally.num_open() == 0  # at the last row


def test_a_resumed_run_reads_what_is_before_at_most_once(files, tally):
    rows = rows_of(files)
    rows.read(0, SHARD)
    for first in range(2048, NUM_ROWS, SHARD):
        assert rows.read(first, first + SHARD) == ROWS[first : first + SHARD]
    assert tally.opened <= len(files) + (".csv" in files[0])


def test_rows_far_on_in_a_plain_file_need_nothing_before_them(tmp_path, tally, monkeypatch):
    monkeypatch.setattr(text_rows, "MARK_EVERY", 64)
    lines = json_lines([{**row, "more": "x" * 2000} for row in ROWS])
    rows = rows_of(written(tmp_path, ".jsonl", [lines]), is_streamed=False)
    tally.num_bytes = 0
    for first in (0, 2900, 1500):
        assert [row["question"] for row in rows.read(first, first + 5)] == [
            row["question"] for row in ROWS[first : first + 5]
        ]
    assert tally.num_bytes < len(lines) / 10


def test_no_file_of_several_is_read_for_rows_behind_it(tmp_path, tally, monkeypatch):
    """From an open compressed file to rows of a later one, of which it is known where they begin."""
    monkeypatch.setattr(text_rows, "MARK_EVERY", 64)
    files = written(tmp_path, ".part.jsonl.gz", CONTENTS[".part.jsonl.gz"]())
    rows = rows_of(files, is_streamed=False)
    tally.opened = 0
    assert rows.read(10, 20) == ROWS[10:20] and rows.read(2890, 2900) == ROWS[2890:2900]
    assert tally.opened == 2


def test_records_that_are_not_closed_do_not_begin_a_compressed_file_anew(tmp_path, tally):
    """Each swallows what follows up to the next one's quote, and all of it is read again, but not from the file."""
    lines = [f'{i},"open' if i % 100 == 50 else f"{i},closed" for i in range(NUM_ROWS)]
    content = ("question,answer\n" + "\n".join(lines) + "\n").encode()
    files = written(tmp_path, ".csv.gz", [gzip.compress(content)])
    rows = rows_of(files)
    for first in range(0, NUM_ROWS, SHARD):
        for number, row in enumerate(rows.read(first, first + SHARD), first):
            if number % 100 == 50:
                assert isinstance(row, BadRow)
            else:
                assert row == {"question": str(number), "answer": "closed"}
            assert rows.place(number).endswith(f"000.csv.gz, line {number + 2}")
    assert tally.opened == 2 and tally.num_bytes <= 2 * size_of(files)


READ_ALL = f"""
from chat_logits.data.source import open_source
source, rows, first = open_source("user/chats", streaming=True), [], 0
while some := source.read(first, first + {SHARD}):
    rows, first = rows + some, first + {SHARD}
print(len(rows), rows[-1]["question"], source.place(len(rows) - 1))
"""


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv.gz"])
def test_a_file_on_the_hub_is_downloaded_once(tmp_path, ending):
    (content,) = CONTENTS[ending]()
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/chats", files={f"train{ending}": content})
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(REPO)}
        done = subprocess.run([sys.executable, "-c", READ_ALL], env=env, capture_output=True, text=True)
        sent = [
            request.sent for request in hub.requests if f"train{ending}" in request.path and request.method == "GET"
        ]
    line = CONTENTS[".csv"]()[0].count(b"\n") - ROWS[-1]["answer"].count("\n") if "csv" in ending else NUM_ROWS
    assert done.stdout.split("\n")[0] == f"{NUM_ROWS} {ROWS[-1]['question']} train{ending}, line {line}", done.stderr
    openings = 2 if "csv" in ending else 1  # a header is read by itself
    assert len(content) <= sum(sent) <= openings * len(content) + 2**16


# --- in any order ---


@pytest.mark.usefixtures("tally")
@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_and_places_in_any_order(files, monkeypatch, is_streamed, is_counted):
    """Forwards, back, over the end and over again, by two readers of the same files."""
    monkeypatch.setattr(text_rows, "MARK_EVERY", 64)
    drawn = random.Random(len(files) + is_streamed)
    readers = [rows_of(files, is_streamed, is_counted) for _ in range(2)]
    asked = [0, 0]
    for _ in range(60):
        which = drawn.randrange(2)
        first = drawn.choice([asked[which], asked[which] + 40, asked[which] + 900, drawn.randrange(NUM_ROWS + 100)])
        first %= NUM_ROWS + 100
        end = asked[which] = first + drawn.choice([1, 7, SHARD, 300])
        assert readers[which].read(first, end) == ROWS[first:end]
        if drawn.random() < 0.3:
            row = drawn.randrange(NUM_ROWS)
            assert readers[which].place(row) == readers[1 - which].place(row)


def test_one_file_is_open_at_a_time_and_none_after_it(files, tally):
    rows = rows_of(files, is_streamed=False)
    assert tally.num_open() == 0
    for first, end in ((0, 32), (1000, 1032), (5, 9), (1032, 1040), (2000, 2001), (0, 1)):
        rows.read(first, end)
        rows.place(first + 700)
        assert tally.num_open() <= 1
    del rows
    gc.collect()  # a reading under way and its reader know each other
    assert tally.num_open() == 0


# --- files that fail or change ---


def test_a_failure_is_not_taken_for_the_end(tmp_path, tally):
    rows = rows_of(written(tmp_path, ".jsonl.gz", [gzip.compress(json_lines(ROWS), compresslevel=0)]))
    assert rows.read(0, SHARD) == ROWS[:SHARD]
    tally.fails = True
    with pytest.raises(ConnectionError):
        rows.read(SHARD, NUM_ROWS)
    assert tally.num_open() == 0
    assert rows.read(SHARD, NUM_ROWS) == ROWS[SHARD:]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv"])
@pytest.mark.parametrize("change", ["cut short", "replaced", "longer", "gone"])
def test_a_file_that_has_changed_is_read_as_it_is(tmp_path, ending, change, monkeypatch):
    """As a new reader has it, although the old one was in the middle of it, or at its end."""
    monkeypatch.setattr(text_rows, "MARK_EVERY", NUM_ROWS)
    pack = {".jsonl": json_lines, ".jsonl.gz": lambda rows: gzip.compress(json_lines(rows)), ".csv": csv_lines}[ending]
    for before in (10, 100):
        (file,) = written(tmp_path, ending, [pack(ROWS[:100])])
        rows = rows_of([file], is_counted=False)
        assert rows.read(0, before) == ROWS[:before]
        if change == "gone":
            Path(file).unlink()
            with pytest.raises(FileNotFoundError):
                rows.read(before, before + 40)
            continue
        new = {"cut short": ROWS[:12], "replaced": ROWS[500:600], "longer": ROWS[:120]}[change]
        if change == "replaced":
            (tmp_path / "new").write_bytes(pack(new))
            (tmp_path / "new").replace(file)
        else:
            written(tmp_path, ending, [pack(new)])
        assert rows.read(before, before + 40) == new[before : before + 40]


# --- places ---


def test_places_of_rows_just_read_open_no_file(files, tally):
    """As a run asks for them: of some rows of shards that were read ahead, once they are aligned."""
    rows, places = rows_of(files), {}
    for first in range(0, 20 * SHARD, SHARD):
        rows.read(first, first + SHARD)
        before = tally.opened
        for row in range(max(0, first - 5 * SHARD), first + SHARD, 7):
            places[row] = rows.place(row)
        assert tally.opened == before
    fresh = rows_of(files)
    assert all(place == fresh.place(row) for row, place in list(places.items())[::10])


def test_lines_are_counted_in_the_file(tmp_path):
    """Against lines counted by hand: of records of several lines, behind empty ones, in the second file."""
    (tmp_path / "0.csv").write_text('question,answer\n\na,"b\nc"\n\nd,e\n')
    (tmp_path / "1.csv").write_text("question,answer\nf,g\n")
    expected = ["0.csv, line 3", "0.csv, line 6", "1.csv, line 2", "row 4"]  # of which there are three
    rows = CsvRows([str(tmp_path / "0.csv"), str(tmp_path / "1.csv")])
    assert [rows.place(row) for row in range(4)] == expected
    assert len(rows.read(1, 9)) == 2 and [rows.place(row) for row in range(4)] == expected


def test_few_places_are_kept_and_the_others_searched(files, tally, monkeypatch):
    monkeypatch.setattr(text_rows, "MARK_EVERY", 64)
    monkeypatch.setattr(text_rows, "KEPT_RANGES", 4)
    rows, fresh = rows_of(files), rows_of(files)
    for first in range(0, NUM_ROWS, SHARD):
        rows.read(first, first + SHARD)
    before = tally.opened
    kept, opened_for_kept = rows.place(NUM_ROWS - 60), tally.opened - before
    dropped, opened_for_both = rows.place(3), tally.opened - before
    assert (opened_for_kept, opened_for_both) == (0, 0 if files[0].endswith(".json") else 1)  # a list is in memory
    assert (kept, dropped) == (fresh.place(NUM_ROWS - 60), fresh.place(3))
