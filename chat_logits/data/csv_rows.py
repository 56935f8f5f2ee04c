"""Rows of CSV files as texts: fields are not converted, so 007 stays 007, NA stays NA, and an empty field stays empty.

``datasets`` reads CSV through pandas, which guesses types and nulls, and stops at the first record that does not fit.
"""

import csv
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from chat_logits.data.text_rows import BadRow, Entry, TextRows
from chat_logits.errors import UsageError

csv.field_size_limit(2**31 - 1)  # characters; a conversation may be longer than Python's default limit of 131,072


class CsvRows(TextRows):
    """The rows of CSV files, whose first records name the columns. Empty lines are ignored.

    A record with too many or too few fields, or with an unclosed quote, is a bad row. Raises UsageError for a header
    that names a column twice.
    """

    def __init__(
        self,
        files: list[str],
        is_streamed: bool = False,
        names: list[str] | None = None,
        delimiter: str = ",",
        quotechar: str = '"',
    ):
        self._dialect: dict[str, Any] = {"delimiter": delimiter, "quotechar": quotechar, "strict": True}
        self._headers: dict[int, tuple[list[str], int, int]] = {}  # names, and where the first record begins
        super().__init__(files, is_streamed, names)

    def _entries(self, file: int, place: int, line: int) -> Iterator[Entry]:
        """The records from a place on, as lists of texts. After one with an unclosed quote, reading continues at that
        record's second line."""
        _, *begin = self._header(file)
        start = max([place, line], begin)
        with self._open(file, start[0]) as opened:
            lines = _Lines(opened, *start)
            reader = csv.reader(lines, **self._dialect)
            while True:
                lines.begin_record()
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Entry(lines.first, lines.first_line, BadRow(f"a record that is not CSV: {error}"))
                    lines.go_back()
                    reader = csv.reader(lines, **self._dialect)
                    continue
                if fields:
                    yield Entry(lines.first, lines.first_line, fields)

    def _header(self, file: int) -> tuple[list[str], int, int]:
        if file not in self._headers:
            with self._open(file) as opened:
                lines = _Lines(opened, 0, 1)
                try:
                    names = next((fields for fields in csv.reader(lines, **self._dialect) if fields), [])
                except csv.Error as error:
                    raise UsageError(f"{self._names[file]}: its header is not CSV: {error}") from error
            if len(set(names)) < len(names):
                raise UsageError(f"{self._names[file]}: its header names a column twice: {', '.join(names)}")
            self._headers[file] = names, lines.place, lines.line
        return self._headers[file]

    def _parse(self, _file: int, raw: list[str]) -> dict | BadRow:
        names = self._header(_file)[0]
        if len(raw) != len(names):
            return BadRow(f"a record of {len(raw)} fields, expected {len(names)}")
        try:
            "".join(raw).encode("utf-8")
        except UnicodeEncodeError:
            return BadRow("a record that is not UTF-8 text")
        return dict(zip(names, raw, strict=True))


class _Lines:
    """The lines of a file as texts. ``place`` and ``line`` are those of the next line, ``first`` and ``first_line``
    those of the line where the record begins."""

    def __init__(self, opened: BinaryIO, place: int, line: int):
        self._opened, self.place, self.line = opened, place, line
        self._record: list[bytes] = []  # its lines
        self._again: deque[bytes] = deque()  # lines to give again before the file's next one
        self.begin_record()

    def begin_record(self) -> None:
        self.first, self.first_line = self.place, self.line
        self._record.clear()

    def go_back(self) -> None:
        """Go back to the record's second line."""
        self._again.extendleft(reversed(self._record[1:]))
        self.place, self.line = self.first + len(self._record[0]), self.first_line + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        text = self._again.popleft() if self._again else next(self._opened)
        self._record.append(text)
        text_start = text.removeprefix(b"\xef\xbb\xbf") if self.place == 0 else text
        self.place, self.line = self.place + len(text), self.line + 1
        return text_start.decode("utf-8", "surrogateescape")
