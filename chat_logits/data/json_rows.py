"""Rows of JSON files, each as it stands there: what looks like a date is a text, a null that was written is a null.

``datasets`` reads JSON through Arrow, which guesses one type for a whole column, gives objects each other's keys, and
ends at the first line that does not parse. Here a line is a row, and one that is none is a ``BadRow`` in its place.
"""

import io
import itertools
import json
from collections.abc import Iterator
from typing import BinaryIO

from chat_logits.data.text_rows import BadRow, Entry, TextRows


def _list_in(name: str, content: bytes) -> list:
    """The list that is all of a file. Raises ValueError for one that goes on behind it, or is none."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} begins with '[', so it is read as one JSON list of rows, but: {error}. Expected such a list, or "
            'one object a line: {"messages": […]}'
        ) from error


class JsonRows(TextRows):
    """The rows of JSON files: objects, one a line.

    A file that begins with ``[`` is one list of objects, and is held in memory. Empty lines are none.
    """

    def __init__(self, files: list[str], is_streamed: bool = False, names: list[str] | None = None):
        self._lists: dict[int, list] = {}
        super().__init__(files, is_streamed, names)

    def _entries(self, file: int, place: int, line: int) -> Iterator[Entry]:
        if file not in self._lists:
            with self._open(file, place) as opened:
                head = b"" if place else opened.read(16)
                if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    yield from self._lines(head, opened, place, line)
                    return
                self._lists[file] = _list_in(self._names[file], head + opened.read())
        yield from (Entry(i, i + 1, self._lists[file][i]) for i in range(place, len(self._lists[file])))

    def _lines(self, head: bytes, opened: BinaryIO, place: int, line: int) -> Iterator[Entry]:
        """The lines of a file from a place on, whose ``head`` was read."""
        for text in itertools.chain(io.BytesIO(head + opened.readline()), opened):
            if text.strip():
                yield Entry(place, line, text)
            place, line = place + len(text), line + 1

    def _unit(self, file: int) -> str:
        return "entry" if file in self._lists else "line"

    def _parse(self, _file: int, raw: bytes | object) -> dict | BadRow:
        try:
            row = json.loads(raw.decode("utf-8-sig")) if isinstance(raw, bytes) else raw
        except UnicodeDecodeError:
            return BadRow("a line that is no UTF-8 text")
        except (ValueError, RecursionError) as error:
            return BadRow(f"a line that is no JSON: {str(error).partition(':')[0]}")
        return row if isinstance(row, dict) else BadRow(f"a line of JSON that is no object but {type(row).__name__}")
