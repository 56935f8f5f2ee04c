"""Random access to rows of Parquet files: only the row groups that hold them are read.

``datasets`` can only stream from the start: ``skip`` and a saved state read and drop all earlier rows. Memory holds one
row group, compressed, and one decoded batch. Files are not memory-mapped: if one were truncated during a run, that
would kill the process.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 1024  # rows decoded at a time, and kept while requested rows are among them
FOOTER_THREADS = 16
HUB_FOLDER = re.compile(r"hf://datasets/[^@]+@[0-9a-f]{40}/")


class ParquetRows:
    """The rows of ``files`` (paths or fsspec URLs) one after the other, as ``datasets`` decodes them to ``features``.

    ``num_rows`` is the length recorded in the dataset's card. With it, footers are read only up to the requested rows;
    without it, all of them at once. ``footers`` are those that another process has read at the same revision. Raises
    OSError, which names the file, if one cannot be read.
    """

    def __init__(self, files: list[str], features, num_rows: int | None = None, footers: dict | None = None):
        self._files, self.features = files, features
        self._filesystem = filesystem_of(files[0])
        self._groups: list[tuple[str, int]] = []  # file and number of each row group
        self._ends: list[int] = []  # the row that follows each group
        self._footers: dict[str, list[int]] = dict(footers or {})  # rows of each row group of a file
        self._indexed = 0  # files that _groups and _ends cover
        self._columns: list[str] | None = None  # columns that are decoded, None for all
        self._reader: _GroupReader | None = None
        self._recorded = num_rows
        if num_rows is None:
            self._index(files)
        self.num_rows = self._counted() if num_rows is None else num_rows

    def keep(self, columns: list[str]) -> None:
        """Decode only these columns from now on."""
        self.features = type(self.features)({name: self.features[name] for name in columns})
        self._columns, self._reader = columns, None

    def place(self, row: int) -> str:
        """A row's file and its number in it, as text; only its overall number if that is not known. Numbers from 1."""
        found = self._find(row)
        if found is None:
            return f"row {row + 1}"
        file, group = self._groups[found]
        before = found - group  # row groups, in other files
        return f"{name_in_dataset(file)}, row {row - (self._ends[before - 1] if before else 0) + 1}"

    def read(self, first: int, end: int) -> list[dict]:
        """Rows ``first`` up to ``end``, fewer at the end of the files."""
        if end >= self.num_rows:
            self._index(self._files[self._indexed :])  # the card may record fewer rows than there are
        self._refuse_wrong_card()
        rows = []
        while first < end and (place := self._find(first)) is not None:
            start = self._ends[place - 1] if place else 0
            stop = min(end, self._ends[place])
            rows += self._read_group(*self._groups[place], first - start, stop - start)
            first = stop
        return rows

    def footers(self) -> dict[str, list[int]]:
        """Rows of each row group of every file. This takes a request per file; other processes can reuse the result."""
        self._index(self._files[self._indexed :])
        self._refuse_wrong_card()
        return self._footers

    def _find(self, row: int) -> int | None:
        """Which group of ``_groups`` holds a row."""
        while self._counted() <= row and self._indexed < len(self._files):
            self._index(self._files[self._indexed : 2 * self._indexed + 1])
            self._refuse_wrong_card()
        place = bisect_right(self._ends, row)
        return place if place < len(self._ends) else None

    def _refuse_wrong_card(self) -> None:
        if self._indexed == len(self._files) and self._recorded not in (None, self._counted()):
            raise OSError(
                f"the dataset's card says {self._recorded} rows, but its files hold {self._counted()}. A local copy of "
                "the files, without the card, is read whole."
            )

    def _counted(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _index(self, files: list[str]) -> None:
        """Index the next files. A progress bar is shown if reading their footers takes more than a second."""
        from tqdm.contrib.concurrent import thread_map

        unread = [file for file in files if file not in self._footers]
        bar = {"desc": "Footers of Parquet files", "unit": " files", "leave": False, "delay": 1}
        group_sizes = thread_map(self._group_sizes, unread, max_workers=FOOTER_THREADS, **bar) if unread else []
        self._footers.update(zip(unread, group_sizes, strict=True))
        for file in files:
            for group, size in enumerate(self._footers[file]):
                self._groups.append((file, group))
                self._ends.append(self._counted() + size)
        self._indexed += len(files)

    def _group_sizes(self, file: str) -> list[int]:
        """Rows of each row group."""
        with named(file), self._open(file) as opened:
            return [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]

    def _open(self, file: str) -> pq.ParquetFile:
        """Open a file; a remote one without read-ahead, as ``pre_buffer`` requests whole column chunks."""
        if "://" not in file:
            return pq.ParquetFile(file)
        return pq.ParquetFile(self._filesystem.open(file, "rb", cache_type="none"), pre_buffer=True)

    def _read_group(self, file: str, group: int, first: int, end: int) -> list[dict]:
        reader, self._reader = self._reader, None  # one that failed is not used again
        with named(file):
            if reader is None or not reader.reaches(file, group, first):
                reader = self._reopened(reader, file, group)
            rows = self._decode(reader.read(first, end))
        self._reader = reader
        return rows

    def _reopened(self, reader: "_GroupReader | None", file: str, group: int) -> "_GroupReader":
        """A reader of another row group, with the file that is already open if it is the same one."""
        if reader is not None and reader.file == file:
            return _GroupReader(file, reader.opened, group, self._columns)
        if reader is not None:
            reader.opened.close(force=True)
        return _GroupReader(file, self._open(file), group, self._columns)

    def _decode(self, table: pa.Table) -> list[dict]:
        import datasets

        cast = datasets.table.table_cast(table, self.features.arrow_schema)
        info = datasets.DatasetInfo(features=self.features)
        return list(datasets.Dataset(cast, info=info, fingerprint="rows"))


class _GroupReader:
    """One row group of an open file, decoded batch by batch. Rows before the current batch need a new reader."""

    def __init__(self, file: str, opened: pq.ParquetFile, group: int, columns: list[str] | None):
        self.file, self.opened, self._group = file, opened, group
        self._batches = opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
        self._batch = self._next_batch()
        self._start = 0  # the row within the group that the batch begins with

    def reaches(self, file: str, group: int, row: int) -> bool:
        return (file, group) == (self.file, self._group) and row >= self._start

    def read(self, first: int, end: int) -> pa.Table:
        parts = []
        while first < end:
            while first >= self._start + len(self._batch):
                self._start += len(self._batch)
                self._batch = self._next_batch()
            parts.append(self._batch.slice(first - self._start, end - first))
            first += len(parts[-1])
        return pa.Table.from_batches(parts)

    def _next_batch(self) -> pa.RecordBatch:
        batch = next(self._batches, None)
        if batch is None:
            raise OSError("it has fewer rows than its footer said")
        return batch


def name_in_dataset(file: str) -> str:
    """A file's name for messages, without its place on this machine."""
    return HUB_FOLDER.sub("", file) if "://" in file else PurePath(file).name


def filesystem_of(file: str):
    """The file system that ``datasets`` uses, with its cached listing; the same object for all threads, as fsspec would
    make one for each."""
    import fsspec
    from huggingface_hub import constants

    options = {"endpoint": constants.ENDPOINT, "token": None} if file.startswith("hf://") else {}
    return fsspec.core.url_to_fs(file, **options)[0]


@contextmanager
def named(file: str) -> Iterator[None]:
    """Raise errors about a file as OSError with its name and one line; the Hub's response stays among its causes."""
    try:
        yield
    except Exception as error:  # clients of file systems have their own exceptions
        # A CastError's message contains whole schemas.
        reason = error.details() if hasattr(error, "details") else str(error)
        raise OSError(f"{HUB_FOLDER.sub('', file)}: {reason.strip().partition(chr(10))[0][:300]}") from error
