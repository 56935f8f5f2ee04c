"""Rows of JSON files as Python's own parser gives them, in any order, and lines that are no rows in their places."""

import gzip
import json

import pyarrow as pa
import pytest

from chat_logits.data import text_rows
from chat_logits.data.json_rows import JsonRows
from chat_logits.data.source import open_source
from chat_logits.data.text_rows import BadRow
from chat_logits.errors import UsageError

ROWS = [
    {"date": "2024-01-01", "number": 7, "text": "é\u2028\x85", "null": None, "deep": [{"a": None}, {"b": 1.5}]},
    {"date": "not a date", "number": "seven", "text": ["mixed"], "more": True},
    {"date": "2024-01-01T00:00:00Z", "number": 10**30},
] * 20


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.fixture(
    params=["lines", "windows lines", "no last newline", "empty lines", "list", "gzip", "zstd", "BOM", "two files"]
)
def files(request, tmp_path) -> list[str]:
    """The rows in files of every kind."""
    whole, pretty = lines(ROWS), json.dumps(ROWS, indent=2)
    contents = {
        "lines": [whole.encode()],
        "windows lines": [whole.replace("\n", "\r\n").encode()],
        "no last newline": [whole.rstrip("\n").encode()],
        "empty lines": [whole.replace("\n", "\n\n \n").encode()],
        "list": [pretty.encode()],
        "gzip": [gzip.compress(whole.encode())],
        "zstd": [zstd(whole[:900].encode()) + zstd(whole[900:].encode())],  # two frames, as parallel writers leave
        "BOM": [b"\xef\xbb\xbf" + whole.encode()],
        "two files": [json.dumps(ROWS[:25]).encode(), lines(ROWS[25:]).encode()],
    }[request.param]
    ending = {"gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}.get(request.param, ".jsonl")
    paths = [tmp_path / f"{number}{ending}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return list(map(str, paths))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_are_as_they_stand_in_any_order(files, is_streamed, monkeypatch):
    monkeypatch.setattr(text_rows, "MARK_EVERY", 4)  # so that places are found again
    rows = JsonRows(files, is_streamed)
    assert rows.num_rows == (None if is_streamed else 60)
    for first, end in ((0, 3), (50, 55), (7, 31), (24, 27), (0, 100), (59, 70), (60, 61), (5, 5)):
        assert rows.read(first, end) == ROWS[first:end]


def test_a_row_has_a_place(files, monkeypatch, request):
    """Row 37: where it stands, counted in the file itself."""
    monkeypatch.setattr(text_rows, "MARK_EVERY", 4)
    kind, rows = request.node.callspec.params["files"], JsonRows(files)
    name = files[-1].rpartition("/")[2]
    place = {"list": "entry 38", "empty lines": "line 112", "two files": "line 13"}.get(kind, "line 38")
    for _ in range(2):
        assert rows.place(37) == f"{name}, {place}"
        rows.read(0, 60)


def test_lines_that_are_no_rows_are_told_in_their_places(tmp_path):
    good = b'{"prompt": "a"}'
    bad = [b'{"prompt": ', b'{"prompt": "\xff"}', b"[1]", b"7", b"null", b"[" * 100_000, b"{} {}"]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, *(line for each in bad for line in (each, good))]))
    rows = JsonRows([str(tmp_path / "rows.jsonl")]).read(0, 100)
    assert rows[::2] == [{"prompt": "a"}] * 8
    assert [row.reason for row in rows[1::2]] == [
        "a line that is not JSON: Expecting value",
        "a line that is not UTF-8 text",
        "a line of JSON that is not an object but list",
        "a line of JSON that is not an object but int",
        "a line of JSON that is not an object but NoneType",
        "a line that is not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
        "a line that is not JSON: Extra data",
    ]


def test_a_source_of_bad_lines_is_refused_and_one_of_some_is_not(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n" * 5)
    with pytest.raises(UsageError, match="none of the first 5 rows can be read; the first is a line that is not JSON"):
        open_source(str(tmp_path / "bad.jsonl"))
    (tmp_path / "some.jsonl").write_text('{\n{"prompt": "a"}\n{"completion": "b"}\n')
    source = open_source(str(tmp_path / "some.jsonl"))
    assert isinstance(source.first_rows[0], BadRow) and source.num_rows == 3
    assert source.column_names == ["prompt", "completion"] and not source.has_arrow_nulls


def test_a_line_that_is_a_list_is_told_from_a_file_that_is_one(tmp_path):
    """One conversation a line, but without an object around it; and a list that is cut short."""
    line = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    for content, problem in (
        (f"{line}\n{line}\n", f"Extra data: line 2 column 1 (char {len(line) + 1})"),
        ("[" + lines(ROWS[:1]), "Expecting ',' delimiter"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UsageError) as error:
            open_source(str(tmp_path / "rows.jsonl"))
        said = f"rows.jsonl begins with '[', so it is read as one JSON list of rows, but: {problem}"
        assert said in str(error.value)
        assert str(error.value).endswith('or one object a line: {"messages": […]}')


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("begins", ["", "\ufeff", "\n "])
def test_an_object_may_be_spread_over_lines(tmp_path, begins, ends):
    """As editors and ``json.dump(..., indent=2)`` write one. Several of them in a file are not rows."""
    spread = json.dumps(ROWS[0], indent=2, ensure_ascii=False).replace("\n", ends)
    (tmp_path / "one.json").write_bytes((begins + spread).encode())
    rows = JsonRows([str(tmp_path / "one.json")])
    assert rows.read(0, 9) == ROWS[:1] and rows.num_rows == 1 and rows.place(0) == "one.json, entry 1"
    (tmp_path / "two.json").write_bytes((spread + ends + spread).encode())
    with pytest.raises(UsageError, match=r"not JSON: .*; expected one object a line, as `jq -c \.` writes them"):
        open_source(str(tmp_path / "two.json"))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines(ROWS[:2]))
    assert open_source(str(tmp_path), split="test").num_rows == 2
    with pytest.raises(UsageError, match=r"`split` dev: there is none of that name, but: (train, test|test, train)"):
        open_source(str(tmp_path), split="dev")
