"""Rows at random from Parquet and streams, against ``datasets``' own; and hashes that need no second reading."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO
from hub_faults import Fault
from loopback_hub import LoopbackHub

from chat_logits.data import hashing
from chat_logits.data.hashing import hash_files, known_hashes, remember_hashes
from chat_logits.data.source import FIRST_ROWS, SourceDataset, open_source
from chat_logits.data.table_rows import StreamRows
from chat_logits.errors import UsageError

GROUP_ROWS = 50
FEATURES = datasets.Features(
    {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "label": datasets.ClassLabel(names=["good", "bad"]),
        "score": datasets.Value("float32"),
        "extra": datasets.Json(),
        "tools": datasets.List({"name": datasets.Value("string"), "sizes": datasets.List(datasets.Value("int64"))}),
    }
)


def chat_rows(first: int, count: int) -> list[dict]:
    """Rows of every awkward kind, each unlike the others."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": None if i % 7 else "é"},
            ],
            "label": [0, 1, None][i % 3],
            "score": None if i % 5 == 0 else i / 3,
            "extra": [None, {"n": i, "deep": [{"a": None}]}, [1, "x"], i][i % 4],
            "tools": [{"name": None, "sizes": [i, None]}] * (i % 3) if i % 4 else None,
        }
        for i in range(first, first + count)
    ]


def write_folder(folder, files: int = 3, rows: int = 220):
    """Parquet files of row groups of 50, the last of each smaller."""
    folder.mkdir()
    for i in range(files):
        table = datasets.Dataset.from_list(chat_rows(i * rows, rows), features=FEATURES)
        table.to_parquet(folder / f"train-{i:05d}-of-{files:05d}.parquet", batch_size=GROUP_ROWS)
    return folder


def plain_parquet(columns: dict) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=GROUP_ROWS)
    return buffer.getvalue()


def destroy(path, groups: range) -> None:
    """Overwrite the pages of these row groups; the footer stays."""
    footer, data = pq.read_metadata(path), bytearray(path.read_bytes())
    for column in (footer.row_group(g).column(c) for g in groups for c in range(footer.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)


# --- saved and compressed ---


def test_splits_of_a_saved_dataset_are_told_apart(tmp_path):
    tables = {name: datasets.Dataset.from_list([{"prompt": name}] * 2) for name in ("first", "second")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), split="second")
    assert source.num_rows == 2 and source.first_rows == [{"prompt": "second"}] * 2
    with pytest.raises(UsageError, match=r"`split` train: the saved dataset .* but: first, second"):
        open_source(str(tmp_path / "saved"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_table_is_the_split_train(tmp_path, streaming):
    datasets.Dataset.from_list(chat_rows(0, 70), features=FEATURES).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), streaming=streaming)
    assert source.num_rows == 70 and source.number_columns == set()
    assert [row["messages"] for row in source.read(40, 50)] == [row["messages"] for row in chat_rows(40, 10)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("named", "other"), [("run[2024]/a.jsonl", "run2/a.jsonl"), ("a[1].jsonl", "a1.jsonl")])
def test_the_file_that_is_named_is_the_one_that_is_read(tmp_path, monkeypatch, named, other, streaming):
    """Though `datasets` takes names for patterns, by which another file is meant."""
    for name in (named, other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    assert open_source(str(tmp_path / named), streaming=streaming).read(0, 1)[0]["prompt"] == named
    monkeypatch.chdir((tmp_path / named).parent)
    assert open_source((tmp_path / named).name, streaming=streaming).read(0, 1)[0]["prompt"] == named


def test_a_folder_whose_name_is_a_pattern_is_refused_and_this_one_is_read(tmp_path, monkeypatch):
    for name in ("run[2024]", "run2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    with pytest.raises(UsageError, match=r"a folder with one of \* \? \[ :: in its path"):
        open_source(str(tmp_path / "run[2024]"))
    monkeypatch.chdir(tmp_path / "run2")
    assert open_source(".").read(0, 1)[0]["prompt"] == "run2"


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_lines_are_read(tmp_path, streaming):
    lines = "".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(100))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    source = open_source(str(tmp_path / "rows.jsonl.gz"), streaming=streaming)
    assert [row["prompt"] for row in source.read(30, 90)] == [f"{i}?" for i in range(30, 90)]


def test_columns_of_whole_numbers_are_known(tmp_path):
    rows = [{"n": 1, "x": 0.5, "b": True, "s": "1", "mixed": 1 if i else "one"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_source(str(tmp_path / "rows.jsonl")).number_columns == {"n", "b"}


# --- Parquet ---


def test_rows_are_those_of_load_dataset(tmp_path):
    folder = write_folder(tmp_path / "chats")
    whole = list(datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")))
    assert whole[1]["extra"] == {"n": 1, "deep": [{"a": None}]} and whole[2]["label"] is None  # as they were made
    source = open_source(str(folder), streaming=True)
    assert source.num_rows == len(whole) == 660 and source.column_names == list(FEATURES)
    ranges = [(0, 660), (0, 32), (0, 32), (49, 51), (30, 31), (219, 221), (180, 500), (655, 700), (660, 670), (9, 9)]
    for first, end in ranges:
        assert source.read(first, end) == whole[first:end], (first, end)


def test_batches_within_a_row_group(tmp_path):
    """A row group of many batches: over their edges, forward, and back."""
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"question": range(5000), "answer": range(5000)}), path)
    source = open_source(str(path), streaming=True)
    for first, end in ((1000, 1100), (1024, 1025), (4000, 4999), (4100, 4101), (0, 3), (2047, 5000)):
        assert [row["question"] for row in source.read(first, end)] == list(range(first, end))


def test_nothing_else_is_read(tmp_path):
    """All row groups but one of the last file are destroyed, and so is what is before it."""
    folder = write_folder(tmp_path / "chats")
    expected = chat_rows(0, 660)
    second, third = sorted(folder.iterdir())[1:]
    destroy(second, range(5))
    destroy(third, range(3))
    source = open_source(str(folder), streaming=True)
    assert [row["messages"] for row in source.read(595, 640)] == [row["messages"] for row in expected[595:640]]
    assert [row["messages"] for row in source.read(0, 220)] == [row["messages"] for row in expected[:220]]
    with pytest.raises(UsageError, match=second.name):
        source.read(219, 221)
    assert len(source.read(200, 220)) == 20  # an error is not the end


def test_the_cards_length_spares_the_footers(tmp_path):
    folder = write_folder(tmp_path / "chats")
    splits = {"train": datasets.SplitInfo("train", num_examples=660)}
    info = datasets.DatasetInfo(features=FEATURES, splits=datasets.splits.SplitDict(splits))
    datasets.info.DatasetInfosDict({"default": info}).write_to_directory(folder)
    last = sorted(folder.glob("*.parquet"))[-1]
    last.write_bytes(b"PAR1 no footer PAR1")
    source = open_source(str(folder), streaming=True)
    assert source.num_rows == 660 and len(source.read(0, 32)) == 32
    with pytest.raises(UsageError, match=last.name):
        source.read(650, 660)
    last.write_bytes(sorted(folder.glob("*.parquet"))[0].read_bytes()[:-4] + b"PAR1")
    write_folder(tmp_path / "short", files=1, rows=10)
    last.write_bytes(next((tmp_path / "short").iterdir()).read_bytes())
    for _ in range(2):
        with pytest.raises(UsageError, match="card says 660 rows, but its files hold 450"):
            source.read(650, 660)


def test_a_card_that_tells_of_fewer_rows_than_there_are_is_refused_before_the_rest_is_lost(tmp_path):
    folder = write_folder(tmp_path / "chats")
    splits = {"train": datasets.SplitInfo("train", num_examples=300)}
    info = datasets.DatasetInfo(features=FEATURES, splits=datasets.splits.SplitDict(splits))
    datasets.info.DatasetInfosDict({"default": info}).write_to_directory(folder)
    source = open_source(str(folder), streaming=True)
    assert source.num_rows == 300 and len(source.read(0, 200)) == 200  # no file behind was looked at yet
    for read in (lambda: source.read(256, 512), lambda: source.read(0, 10), source.footers):
        with pytest.raises(UsageError, match=r"card says 300 rows, but its files hold 660\. A local copy of the files"):
            read()


def test_footers_go_from_one_process_to_another(tmp_path):
    """With another's, the files that no row was asked of are not even opened."""
    folder = write_folder(tmp_path / "chats")
    footers = json.loads(json.dumps(open_source(str(folder), streaming=True).footers()))
    assert list(footers.values()) == [[50, 50, 50, 50, 20]] * 3
    second = sorted(folder.iterdir())[1]
    second.write_bytes(b"PAR1")
    source = open_source(str(folder), streaming=True, footers=footers)
    assert source.num_rows == 660 and source.footers() == footers
    assert source.read(500, 502)[1]["messages"][0]["content"] == "501?"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PAR1 this is nothing of the kind", "Parquet magic bytes"),
        (b"", "Parquet file size is 0 bytes"),
        (plain_parquet({"question": ["a"], "other": ["b"]}), "1 new columns"),
        (plain_parquet({"question": [[1, 2]], "answer": ["b"]}), "cast"),
    ],
)
def test_a_file_unlike_the_others_is_named(tmp_path, data, words):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.parquet").write_bytes(plain_parquet({"question": ["a"], "answer": ["b"]}))
    (tmp_path / "chats" / "b.parquet").write_bytes(data)
    with pytest.raises(UsageError, match=words) as raised:
        open_source(str(tmp_path / "chats"), streaming=True).read(0, 2)
    assert "b.parquet: " in str(raised.value) and len(str(raised.value).splitlines()) <= 2


def test_a_file_that_vanishes_is_named(tmp_path):
    folder = write_folder(tmp_path / "chats")
    source = open_source(str(folder), streaming=True)
    last = sorted(folder.iterdir())[-1]
    last.unlink()
    with pytest.raises(UsageError, match=last.name) as raised:
        source.read(600, 610)
    assert len(str(raised.value).splitlines()) == 1


def test_no_rows(tmp_path):
    path = tmp_path / "none.parquet"
    path.write_bytes(plain_parquet({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}))
    (tmp_path / "none.jsonl").touch()
    for name, streaming in (("none.parquet", True), ("none.jsonl", True), ("none.jsonl", False)):
        with pytest.raises(UsageError, match="no rows"):
            open_source(str(tmp_path / name), streaming=streaming)


READ_FROM_HUB = """
import json, sys
from chat_logits.errors import ToolkitError
from chat_logits.data.source import open_source
source = open_source("user/chats", split="test", config="big", revision="v1", streaming=True)
print(json.dumps([source.revision, source.num_rows]), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(source.read(*json.loads(line))), flush=True)
    except ToolkitError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""
CARD = """---
configs:
- config_name: small
  data_files: s.parquet
- config_name: big
  data_files: [{split: train, path: s.parquet}, {split: test, path: big/*.parquet}]
---
"""


def test_ranges_from_the_hub(tmp_path):
    """The pinned commit's files of one split; per range, no more bytes than its row groups have."""
    text = [hashlib.sha512(str(i).encode()).hexdigest() for i in range(8000)]
    parts = {i: {"question": text[i : i + 2000], "answer": text[i : i + 2000]} for i in range(0, 8000, 2000)}
    files = {f"big/{i}.parquet": plain_parquet(part) for i, part in parts.items()}
    files |= {"README.md": CARD.encode(), "s.parquet": plain_parquet({"question": ["x"], "answer": ["y"]})}
    with LoopbackHub() as hub:
        commit = hub.add_repo("dataset", "user/chats", files=files)
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(REPO)}
        command = [sys.executable, "-c", READ_FROM_HUB.replace("v1", commit)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, **pipes) as process:

            def ask(*wanted):
                seen = len(hub.requests)
                process.stdin.write(json.dumps(wanted) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                return answer, sum(request.sent for request in hub.requests[seen:])

            assert json.loads(process.stdout.readline()) == [commit, 8000]
            group_bytes = len(files["big/2000.parquet"]) // 40
            for first, end, groups in ((7000, 7040, 1), (7040, 7060, 1), (2310, 2330, 1), (3990, 4010, 2), (0, 10, 1)):
                rows, sent = ask(first, end)
                assert [row["answer"] for row in rows] == text[first:end]
                footers = 2 * 64 * 1024  # a file is opened by its last 64 KiB
                assert sent <= (groups + 1) * group_bytes + footers
            hub.inject(Fault("refuse", "resolve", status=403))
            refused, _ = ask(5000, 5001)
            assert refused.startswith("ToolkitError: `dataset_id` user/chats, `split` test: ") and "(403" in refused
            assert ask(5000, 5001)[0][0]["question"] == text[5000]
            process.stdin.close()


# --- other streams ---


def test_a_stream_is_read_once_while_ranges_ascend():
    """A real stream that counts what is drawn from it, and how often it began."""
    drawn = []

    def rows():
        for i in range(100):
            drawn.append(i)
            yield {"question": str(i)}

    source = StreamRows(datasets.IterableDataset.from_generator(rows), None)
    for first, end in ((0, 5), (5, 8), (20, 22), (50, 53)):
        assert [row["question"] for row in source.read(first, end)] == [str(i) for i in range(first, end)]
    assert drawn.count(0) == 1 and drawn == list(range(len(drawn))) and len(drawn) <= 54
    assert source.read(98, 105) == [{"question": "98"}, {"question": "99"}] and source.read(120, 130) == []
    assert source.read(3, 4) == [{"question": "3"}] and drawn.count(0) == 2


def test_a_stream_that_failed_is_not_at_its_end():
    """The next reading begins it anew."""
    faults = [ConnectionError("the line broke")]

    def rows():
        for i in range(40):
            if i == 20 and faults:
                raise faults.pop()
            yield {"i": i}

    source = StreamRows(datasets.IterableDataset.from_generator(rows), None)
    assert source.read(0, 10) == [{"i": i} for i in range(10)]
    with pytest.raises(ConnectionError):
        source.read(10, 30)
    assert source.read(10, 50) == [{"i": i} for i in range(10, 40)]


def test_threads_take_turns():
    """After a failure the thread that reads ahead may still be at it when the next one begins."""

    def rows():
        for i in range(40):
            time.sleep(0.005)
            yield {"i": i}

    stream = StreamRows(datasets.IterableDataset.from_generator(rows), 40)
    source = SourceDataset(stream, "", 40, [], "a stream")
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(source.read, first, first + 10) for first in (0, 10, 5, 20)]
        numbers = [[row["i"] for row in read.result()] for read in reads]
    assert numbers == [list(range(first, first + 10)) for first in (0, 10, 5, 20)]


def test_json_lines_in_any_order(chat_file):
    source = open_source(str(chat_file([{"question": str(i), "answer": "x"} for i in range(300)])), streaming=True)
    assert source.num_rows is None
    for first, end in ((0, 32), (0, 32), (40, 42), (290, 310), (7, 9), (400, 410)):
        assert [row["question"] for row in source.read(first, end)] == [str(i) for i in range(first, min(end, 300))]


@pytest.mark.parametrize("good", [FIRST_ROWS - 3, FIRST_ROWS + 3])
def test_a_stream_that_breaks_off_is_explained(tmp_path, good):
    """Among the first rows, which are read when it is opened, and behind them."""
    (tmp_path / "chats").mkdir()
    for name, rows in (("a", good), ("b", 9)):
        table = pa.table({"question": ["a"] * rows, "answer": ["b"] * rows})
        with pa.ipc.new_stream(tmp_path / "chats" / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    whole = (tmp_path / "chats" / "b.arrow").read_bytes()
    (tmp_path / "chats" / "b.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="/chats, `split` train: ") as raised:
        source = open_source(str(tmp_path / "chats"), streaming=True)
        assert good > FIRST_ROWS and len(source.read(0, good)) == good
        source.read(good - 1, good + 6)
    assert len(str(raised.value).splitlines()) <= 2


# --- hashes ---


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A cache folder of the test's own, an empty process memory, and files that count as settled at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(hashing, "GRAIN", -1)
    return tmp_path / "home" / "content_hashes.json"


def forget(monkeypatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(hashing, "_known", {})


def planted(memory) -> None:
    """Other hashes in the memory, by which it shows that contents were not read."""
    memory.write_text(json.dumps({path: [*e[:3], "f" * 64] for path, e in json.loads(memory.read_text()).items()}))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folders_hash_is_what_it_was(memory, tmp_path, monkeypatch):
    """Over names and contents, in order, hidden files left out; the same when it comes from the memory."""
    for name in ("b.txt", "a/c.txt", "a/.hidden", ".git/x"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text(name)
    lines = [f"{name}\0{sha256(name.encode())}\n" for name in ("a/c.txt", "b.txt")]
    for _ in range(2):
        assert hash_files(tmp_path / "files") == sha256("".join(lines).encode())
        assert memory.exists()
        forget(monkeypatch)


def test_contents_are_read_once(memory, tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    assert hash_files(path) == sha256(b"one")
    planted(memory)
    assert hash_files(path) == sha256(b"one")  # of this process
    forget(monkeypatch)
    assert hash_files(tmp_path / "home" / ".." / "model.bin") == "f" * 64


def test_a_change_is_seen_even_with_size_and_time_set_back(memory, tmp_path):
    import os

    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    before = path.stat()
    assert hash_files(path) == sha256(b"one")
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(b"two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert hash_files(path) == sha256(b"two") and memory.exists()


def test_what_changed_just_now_is_not_remembered(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "GRAIN", 3600)
    (tmp_path / "new.bin").write_bytes(b"new")
    assert hash_files(tmp_path / "new.bin") == sha256(b"new")
    assert not memory.exists() and known_hashes() == {}


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"x": 5}', b'{"x": [1, 2, 3, null]}', b"\xff\xfe\x00"])
def test_a_damaged_memory_is_an_empty_one(memory, tmp_path, damage):
    memory.parent.mkdir()
    memory.write_bytes(damage)
    (tmp_path / "model.bin").write_bytes(b"one")
    assert hash_files(tmp_path / "model.bin") == sha256(b"one")
    assert list(json.loads(memory.read_text())) == [str((tmp_path / "model.bin").resolve())]


def test_a_cache_that_cannot_be_written_is_no_error(memory, tmp_path):
    memory.parent.write_text("a file where the folder would be")
    (tmp_path / "model.bin").write_bytes(b"one")
    assert hash_files(tmp_path / "model.bin") == sha256(b"one")


HASH_ONE = """
import sys
from chat_logits.data import hashing
hashing.GRAIN = -1
print(hashing.hash_files(sys.argv[1]))
assert "torch" not in sys.modules
"""


def test_processes_add_to_one_memory(memory, tmp_path):
    paths = [tmp_path / f"{i}.bin" for i in range(6)]
    for path in paths:
        path.write_text(path.name)
    env = {"HF_HOME": str(memory.parent), "PYTHONPATH": str(REPO)}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen([sys.executable, "-c", HASH_ONE, str(path)], **pipes) for path in paths]
    assert [process.communicate()[0].strip() for process in running] == [sha256(p.name.encode()) for p in paths]
    assert sorted(json.loads(memory.read_text())) == sorted(str(path.resolve()) for path in paths)
    planted(memory)
    assert {hash_files(path) for path in paths} == {"f" * 64}


def test_a_driver_tells_its_workers(memory, tmp_path, monkeypatch):
    """What one process knows serves another without a common cache folder, as long as the file is the same."""
    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    hash_files(path)
    hashes = json.loads(json.dumps(known_hashes()))
    memory.unlink()
    forget(monkeypatch)
    remember_hashes({name: [*entry[:3], "e" * 64] for name, entry in hashes.items()})
    assert hash_files(path) == "e" * 64
    path.write_bytes(b"another")
    assert hash_files(path) == sha256(b"another")


# --- columns that are not needed ---


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_beside_the_text_is_not_decoded(tmp_path, streaming, monkeypatch):
    """It needs Pillow, and bytes that are a picture; here are neither."""
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = [
        {"image": {"bytes": b"no picture", "path": None}, "question": f"{i}?", "answer": f"{i}."} for i in range(40)
    ]
    (tmp_path / "chats").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "chats" / "a.parquet")
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    with pytest.raises(UsageError, match="Pillow"):
        open_source(str(tmp_path / "chats"), streaming=streaming)
    source = open_source(str(tmp_path / "chats"), streaming=streaming, needed=lambda _names: ("question", "answer"))
    assert source.column_names == ["image", "question", "answer"]
    assert source.read(0, 99) == [{"question": f"{i}?", "answer": f"{i}."} for i in range(40)]
    assert source.place(33) == "a.parquet, row 34"


@pytest.mark.parametrize("length", [300, 5000])
def test_a_text_too_long_for_a_name_is_no_dataset(length):
    with pytest.raises(UsageError, match="no such file or folder, and not a Hub id"):
        open_source("a" * length)


def test_a_row_of_several_parquet_files_has_its_place_in_one(tmp_path):
    folder = write_folder(tmp_path / "chats")
    names = sorted(file.name for file in folder.glob("*.parquet"))
    for streaming in (False, True):
        source = open_source(str(folder), streaming=streaming)
        assert [source.place(row) for row in (0, 219, 220, 659)] == [
            f"{names[0]}, row 1",
            f"{names[0]}, row 220",
            f"{names[1]}, row 1",
            f"{names[2]}, row 220",
        ]
        assert source.place(660) == "row 661"  # of none of them


def test_saved_datasets_side_by_side_are_not_read_together(tmp_path):
    for name in ("first", "second"):
        datasets.Dataset.from_list([{"question": name, "answer": "Hello"}]).save_to_disk(tmp_path / "saved" / name)
    with pytest.raises(UsageError, match=r"not read together: first, second\. Give one of these folders"):
        open_source(str(tmp_path / "saved"))
    assert open_source(str(tmp_path / "saved" / "second")).first_rows[0]["question"] == "second"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "chats.jsonl")
    with pytest.raises(UsageError, match="expected a file or a folder, found a pipe or a device"):
        open_source(str(tmp_path / "chats.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_is_the_split_train(tmp_path, kind):
    """As ``load_dataset`` has it; a split that is not is an error that lists it, for a file too."""
    table, file = datasets.Dataset.from_dict({"question": ["Hi"], "answer": ["Hello"]}), str(tmp_path / f"chats.{kind}")
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](file)
    assert open_source(file).num_rows == 1
    for streaming in (False, True):
        with pytest.raises(UsageError, match=r"`split` test: .*\btrain\b"):
            open_source(file, split="test", streaming=streaming)
