"""Rows of JSON files, each as it stands there: what looks like a date is a text, a null that was written is a null.

``datasets`` reads JSON through Arrow, which guesses one type for a whole column, gives objects each other's keys, and
ends at the first line that does not parse. Here a line is a row, and one that is none is a ``BadRow`` in its place.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from chat_logits.data.parquet_rows import filesystem_of

MARK_EVERY = 1024  # rows between two places that are kept


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    reason: str


class JsonRows:
    """The rows of ``files`` (paths or fsspec URLs, compressed or not) one after the other: objects, one a line.

    A file that begins with ``[`` is one list of objects, and is held in memory. Empty lines are none. ``num_rows`` is
    None where ``is_streamed``: the files are then read only as far as rows are asked for.
    """

    features = None

    def __init__(self, files: list[str], is_streamed: bool = False):
        self._files, self._filesystem = files, filesystem_of(files[0])
        self._marks = [(0, 0, 0)]  # a row, its file's number, and its place in it: bytes, or the list's index
        self._lists: dict[int, list] = {}
        self.num_rows = None if is_streamed else sum(1 for _ in self._rows(0))

    def read(self, first: int, end: int) -> list[dict | BadRow]:
        """Rows ``first`` up to ``end``, fewer at the end of the files."""
        rows: list[dict | BadRow] = []
        if first < end:
            for number, raw in self._rows(first):
                if number >= end:
                    break
                if number >= first:
                    rows.append(_parsed(raw))
        return rows

    def _rows(self, first: int) -> Iterator[tuple[int, bytes | object]]:
        """Rows with their numbers, from the last mark before ``first`` on; lines are not parsed yet."""
        number, file, place = self._marks[bisect_right(self._marks, (first, len(self._files), 0)) - 1]
        for current in range(file, len(self._files)):
            for start, raw in self._entries(current, place if current == file else 0):
                if number % MARK_EVERY == 0 and number > self._marks[-1][0]:
                    self._marks.append((number, current, start))
                yield number, raw
                number += 1

    def _entries(self, file: int, place: int) -> Iterator[tuple[int, bytes | object]]:
        """Where each row of a file begins, from ``place`` on, and its line, or the object itself."""
        if file in self._lists or self._is_list(file):
            yield from ((i, self._lists[file][i]) for i in range(place, len(self._lists[file])))
            return
        with self._open(file) as opened:
            opened.seek(place)
            for line in opened:
                if line.strip():
                    yield place, line
                place += len(line)

    def _open(self, file: int) -> BinaryIO:
        return self._filesystem.open(self._files[file], "rb", compression="infer")

    def _is_list(self, file: int) -> bool:
        """Whether a file is one list, which is then kept."""
        with self._open(file) as opened:
            if not opened.read(16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return False
            opened.seek(0)
            self._lists[file] = json.loads(opened.read().decode("utf-8-sig"))
        return True


def _parsed(raw: bytes | object) -> dict | BadRow:
    try:
        row = json.loads(raw.decode("utf-8-sig")) if isinstance(raw, bytes) else raw
    except UnicodeDecodeError:
        return BadRow("a line that is no UTF-8 text")
    except (ValueError, RecursionError) as error:
        return BadRow(f"a line that is no JSON: {str(error).partition(':')[0]}")
    return row if isinstance(row, dict) else BadRow(f"a line of JSON that is no object but {type(row).__name__}")
