"""The chat dataset to extract from: a Hub id, a folder, or one file, opened at a revision that can be recorded."""

import dataclasses
import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chat_logits.data.csv_rows import CsvRows
from chat_logits.data.hashing import hash_files
from chat_logits.data.json_rows import JsonRows
from chat_logits.data.parquet_rows import ParquetRows
from chat_logits.data.source_files import (
    file_format,
    local_arguments,
    refuse_another_file,
    saved_table,
    tell_of_files_left_out,
)
from chat_logits.data.table_rows import StreamRows, TableRows
from chat_logits.data.text_rows import BadRow, TextRows
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import resolve_commit
from chat_logits.hub_errors import explain_hub_error
from chat_logits.paths import is_there
from chat_logits.words import count_text, first_line

FIRST_ROWS = 32  # rows read when a source is opened, and kept: needed to find columns and template, and to test both
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass
class SourceDataset:
    """One split of a dataset, whose rows can be read in any order.

    ``revision`` is a Hub commit, or a hash of the local files' contents; ``num_rows`` is None for a stream of unknown
    length; ``first_rows`` are the first ``FIRST_ROWS``; ``name`` is the dataset's name in errors; ``column_names`` are
    all columns, read or not, for JSON those of the first rows.
    """

    rows: TableRows | ParquetRows | TextRows | StreamRows
    revision: str
    num_rows: int | None
    first_rows: list[dict | BadRow]
    name: str
    column_names: list[str] = field(default_factory=list)
    number_columns: frozenset[str] = frozenset()  # columns of only integers or booleans
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)  # a failed shard's thread may linger

    def read(self, first: int, end: int) -> list[dict | BadRow]:
        """Rows ``first`` up to ``end``, fewer at the end of the split. A stream is best read in order.

        Raises UsageError for files that cannot be read, ToolkitError if the Hub fails.
        """
        known, end = self.first_rows[first:end], end if self.num_rows is None else min(end, self.num_rows)
        with self._reading, explained(self.name):
            # Called even for zero rows, so that a wrong row count in the card is always reported.
            return known + self.rows.read(first + len(known), end)

    @property
    def has_arrow_nulls(self) -> bool:
        """Whether objects have keys of other rows as nulls, which are not in the data."""
        return not isinstance(self.rows, TextRows)

    def place(self, row: int) -> str:
        """Where a row is, as text: its file, and the line or row in it, as far as they are known."""
        with self._reading, explained(self.name):
            return self.rows.place(row)

    def footers(self) -> dict[str, list[int]]:
        """For streamed Parquet, the footers, so that ``open_source`` in other processes need not request them again."""
        with explained(self.name):
            return self.rows.footers() if isinstance(self.rows, ParquetRows) else {}


def open_source(
    dataset_id: str,
    config: str | None = None,
    revision: str | None = None,
    split: str = "train",
    streaming: bool = False,
    footers: dict[str, list[int]] | None = None,
    needed: Callable[[list[str]], Collection[str]] | None = None,
) -> SourceDataset:
    """Open one split; ``footers`` are those that another process has read at the same revision.

    ``needed`` chooses the columns to decode from all column names; by default all are. Raises UsageError for wrong
    names, and ToolkitError if the Hub refuses.
    """
    if not SPLIT_NAME.fullmatch(split):
        raise UsageError(f"`split` {split}: expected a split's name alone; `max_samples` N reads its first N rows")
    commit, arguments = _locate(dataset_id, config, revision)
    name = f"`dataset_id` {dataset_id}, `split` {split}"
    with explained(name):
        rows = _open_rows(arguments, split, streaming, footers)
    names = list(rows.features or ())
    if needed and not isinstance(rows, TextRows) and names:
        wanted = set(needed(names))
        rows.keep([column for column in names if column in wanted])
    with explained(name):
        end = FIRST_ROWS if rows.num_rows is None else min(FIRST_ROWS, rows.num_rows)
        first_rows: list[dict | BadRow] = [*rows.read(0, end)]
    if not first_rows:
        raise UsageError(f"{name}: no rows")
    bad = [row for row in first_rows if isinstance(row, BadRow)]
    if len(bad) == len(first_rows):
        first = count_text(len(bad), "row")
        expected = rows.expected if isinstance(rows, TextRows) else ""
        raise UsageError(f"{name}: none of the first {first} can be read; the first is {bad[0].reason}{expected}")
    readable = [row for row in first_rows if isinstance(row, dict)]
    numbers = _number_columns(rows.features) if rows.features else _all_numbers(readable)
    names = names or list(dict.fromkeys(column for row in readable for column in row))
    return SourceDataset(rows, commit, rows.num_rows, first_rows, name, names, numbers)


def _locate(dataset_id: str, config: str | None, revision: str | None) -> tuple[str, dict]:
    """The revision to record, and ``load_dataset``'s arguments."""
    path = Path(dataset_id)
    if is_there(path):
        if revision or (config and path.is_file()):
            raise UsageError(f"`dataset_id` {dataset_id}: local, so it has no `dataset_revision` or `dataset_config`")
        if not path.is_file() and not path.is_dir():
            raise UsageError(f"`dataset_id` {dataset_id}: expected a file or a folder, found a pipe or a device")
        content = hash_files(path)
        return content, local_arguments(path, config, content)
    if file_format(path):
        raise UsageError(f"`dataset_id` {dataset_id}: no such file")
    commit = resolve_commit(dataset_id, "dataset", revision)
    return commit, {"path": dataset_id, "name": config, "revision": commit}


def _open_rows(
    arguments: dict, split: str, streaming: bool, footers: dict | None
) -> TableRows | ParquetRows | TextRows | StreamRows:
    import datasets

    if "saved" in arguments:
        return TableRows(saved_table(arguments["saved"], split))
    builder = datasets.load_dataset_builder(**arguments)
    if "data_files" in arguments:
        refuse_another_file(arguments["data_files"]["train"], builder)
    elif Path(arguments["path"]).is_dir():
        tell_of_files_left_out(Path(arguments["path"]), builder)
    if (rows := _text_rows(builder.config, split, streaming)) is not None:
        return rows
    files = _parquet_files(builder.config, split)
    if not streaming:
        builder.download_and_prepare()
        return TableRows(builder.as_dataset(split), files)
    stream = builder.as_streaming_dataset(split)
    splits = builder.info.splits
    recorded = splits[split].num_examples or None if splits and split in splits else None
    return ParquetRows(files, stream.features, recorded, footers) if files else StreamRows(stream, recorded)


def _text_rows(config, split: str, streaming: bool) -> TextRows | None:
    """The rows of a split of JSON or CSV, None for other formats and for rows within one field of a JSON file.

    Raises UsageError for a missing split (it lists those that exist), and for CSV options that are not supported.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    is_json, is_csv = isinstance(config, JsonConfig) and not config.field, isinstance(config, CsvConfig)
    if not is_json and not is_csv:
        return None
    if split not in config.data_files:
        raise UsageError(f"`split` {split}: there is none of that name, but: {', '.join(map(str, config.data_files))}")
    names = list(config.data_files[split])
    files = names if streaming else datasets.DownloadManager().download(names)
    if is_json:
        return JsonRows(files, streaming, names)
    return CsvRows(files, streaming, names, **_csv_form(config))


def _csv_form(config) -> dict:
    """Delimiter and quotes of CSV files. Raises UsageError if a dataset's card sets other options."""
    plain = type(config)()
    known = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "quotechar")
    others = [
        each.name
        for each in dataclasses.fields(config)
        if each.name not in known and getattr(config, each.name) != getattr(plain, each.name)
    ]
    if others:
        raise UsageError(f"CSV files with {', '.join(others)}: expected a header and no options but the delimiter")
    return {"delimiter": config.sep, "quotechar": config.quotechar}


def _all_numbers(rows: list[dict]) -> frozenset[str]:
    """Keys whose values are integers or booleans in all rows that have them."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    return frozenset(name for name, types in kinds.items() if types <= {int, bool})


def _number_columns(features) -> frozenset[str]:
    """Columns of integers or booleans. ``features`` are of ``datasets``, None if they are not known."""
    import datasets

    kinds = {name: kind.dtype for name, kind in (features or {}).items() if isinstance(kind, datasets.Value)}
    return frozenset(name for name, kind in kinds.items() if kind == "bool" or kind.startswith(("int", "uint")))


def _parquet_files(config, split: str) -> list[str]:
    """The files of a split if all are Parquet (and not archives of Parquet files), else none."""
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    files = config.data_files[split] if isinstance(config, ParquetConfig) and split in config.data_files else []
    return list(files) if all(file.endswith(".parquet") for file in files) else []


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Raise errors of ``datasets`` as the toolkit's own, which name the dataset and say what to do."""
    import datasets

    try:
        yield
    except StopIteration as error:  # of ``datasets``, for an empty file
        raise UsageError(f"{name}: no rows") from error
    except datasets.exceptions.DatasetNotFoundError as error:  # the repository was found, so its files are gated
        raise ToolkitError(
            f"{name}: gated. Ask for access on its page, then set HF_TOKEN to a token that has it."
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UsageError(f"{name}: {first_line(error.__cause__ or error)}") from error
    except datasets.table.CastError as error:
        raise UsageError(f"{name}: {error.details()}") from error
    except Exception as error:  # odd data and the Hub's clients raise exceptions of all kinds
        if "corresponds to no data" in str(error):
            raise UsageError(f"{name}: no rows") from error
        raise explain_hub_error(error, name, UsageError) from error
