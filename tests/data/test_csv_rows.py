"""CSV as it stands in the file: texts alone, and records that are none in their places."""

import csv
import gzip

import pytest

from chat_logits.data import text_rows
from chat_logits.data.csv_rows import CsvRows
from chat_logits.data.source import open_source
from chat_logits.data.text_rows import BadRow
from chat_logits.errors import UsageError

HEADER = ["question", "answer"]
FIELDS = [
    ["2 + 3?", "005"],
    ["NA", "null"],
    ["1.50", "2024-01-01"],
    ["", " x "],
    ['say "hi"', "two\nlines, é"],
    ["True", "1e3"],
]
FIELDS = [["2 + 3?", "005"], ["NA", "null"], ["1.50", "2024-01-01"], ["", " x "], ["True", "1e3"]]
FIELDS.append(['say "hi"', "two\nlines, é"])
FIELDS = [[f"{question}", f"{answer}"] for _ in range(10) for question, answer in FIELDS]


@pytest.fixture(params=["plain", "windows lines", "no last newline", "empty lines", "gzip", "BOM", "two files"])
def files(request, tmp_path) -> list[str]:
    """The records in files of every kind, written by Python's csv."""

    def written(rows, end="\n") -> bytes:
        path = tmp_path / "written.csv"
        with path.open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened, lineterminator=end).writerows([HEADER, *rows])
        return path.read_bytes()

    whole = written(FIELDS)
    contents = {
        "plain": [whole],
        "windows lines": [written(FIELDS, "\r\n")],
        "no last newline": [whole.rstrip(b"\n")],
        "empty lines": [b"\n" + written(FIELDS, "\n\n")],
        "gzip": [gzip.compress(whole)],
        "BOM": [b"\xef\xbb\xbf" + whole],
        "two files": [written(FIELDS[:25]), written(FIELDS[25:])],
    }[request.param]
    paths = [tmp_path / f"{number}.csv{'.gz' * (request.param == 'gzip')}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return list(map(str, paths))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_fields_are_texts_as_they_stand_in_any_order(files, is_streamed, monkeypatch):
    monkeypatch.setattr(text_rows, "MARK_EVERY", 4)
    rows, expected = CsvRows(files, is_streamed), [dict(zip(HEADER, fields, strict=True)) for fields in FIELDS]
    assert rows.num_rows == (None if is_streamed else 60)
    for first, end in ((0, 3), (50, 55), (7, 31), (24, 27), (0, 100), (59, 70), (60, 61), (5, 5)):
        assert rows.read(first, end) == expected[first:end]


def test_records_that_are_none_are_told_in_their_places(tmp_path):
    """A quote that is not closed costs its own line, not the rest of the file."""
    good, bad = b"a,b\n", [b"a\n", b"a,b,c\n", b'"a"x,b\n', b"a,\xff\n", b'a,"open\n']
    path = tmp_path / "rows.csv"
    path.write_bytes(b"question,answer\n" + b"".join(line + good for line in bad))
    rows = CsvRows([str(path)])
    found = rows.read(0, 100)
    assert rows.num_rows == 10 and found[1::2] == [{"question": "a", "answer": "b"}] * 5
    assert [row.reason for row in found[::2]] == [
        "a record of 1 fields, expected 2",
        "a record of 3 fields, expected 2",
        "a record that is not CSV: ',' expected after '\"'",
        "a record that is not UTF-8 text",
        "a record that is not CSV: unexpected end of data",
    ]
    assert [rows.place(row) for row in range(4)] == [f"rows.csv, line {line}" for line in (2, 3, 4, 5)]


def test_a_long_field_is_read(tmp_path):
    (tmp_path / "long.csv").write_text("question,answer\na," + "b" * 10**6 + "\n")
    assert len(CsvRows([str(tmp_path / "long.csv")]).read(0, 1)[0]["answer"]) == 10**6


def test_a_source_of_csv_has_texts_alone(tmp_path):
    (tmp_path / "sums.csv").write_text("question,answer,tools\n1 + 1?,02,\n2 + 2?,4,[]\nodd\n")
    for streaming in (False, True):
        source = open_source(str(tmp_path / "sums.csv"), streaming=streaming)
        assert source.first_rows[:2] == [
            {"question": "1 + 1?", "answer": "02", "tools": ""},
            {"question": "2 + 2?", "answer": "4", "tools": "[]"},
        ]
        assert isinstance(source.first_rows[2], BadRow) and source.place(2) == "sums.csv, line 4"
        assert source.column_names == ["question", "answer", "tools"] and not source.number_columns
        assert not source.has_arrow_nulls


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,answer\na,b,c\n")
    with pytest.raises(UsageError, match=r"a\.csv: its header names a column twice: question, answer, answer"):
        open_source(str(tmp_path / "a.csv"))
