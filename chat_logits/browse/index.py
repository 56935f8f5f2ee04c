"""The numbers and texts of all rows in DuckDB tables, to sort, filter and search them.

The tables are in a file in a temporary folder, so that a million rows take disk space instead of memory. Whatever a
query says, DuckDB reads and writes no other file, loads no extension, and its settings cannot be changed.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from chat_logits.analysis.condition import Condition
from chat_logits.browse.view import OF_TEXTS, PAGE_ROWS, View, condition_of
from chat_logits.errors import UsageError

MEMORY = "96MiB"  # DuckDB's limit; more data goes to the temporary folder
THREADS = 2
NUMBERS = ("source_index", "num_tokens", "mean_nll", "mean_entropy", "top1_rate", "max_surprisal")
BINS = 40
KEPT = 32  # cached answers over all rows, those of the first page, until the tables change
EDGES = 0.002  # share of the rows beyond a histogram's first edge, and beyond its last
QUESTION = 200  # characters of a conversation's question that the list shows
TABLES = """
CREATE TABLE numbers (row INTEGER, source_index BIGINT, num_tokens INTEGER, mean_nll FLOAT, mean_entropy FLOAT,
    top1_rate FLOAT, max_surprisal FLOAT, fault VARCHAR);
CREATE TABLE texts (row INTEGER, question VARCHAR, tools VARCHAR, text VARCHAR, num_messages INTEGER,
    roles MAP(VARCHAR, UBIGINT));
CREATE TABLE marks (source_index BIGINT, note VARCHAR, tags VARCHAR[]);
CREATE VIEW seen AS SELECT *, exp(mean_nll::DOUBLE) AS perplexity FROM numbers;
CREATE VIEW seen_with_texts AS SELECT * FROM seen JOIN texts USING (row);
"""
TEXTS = """
INSERT INTO texts SELECT row,
    coalesce((list_filter(messages, lambda m: m.role = 'user')[1]).content, ''), tools,
    lower(array_to_string(list_transform(messages, lambda m: concat_ws(' ', m.content, m.extra)), chr(10))),
    len(messages), list_aggregate(list_transform(messages, lambda m: m.role), 'histogram')
FROM batch
"""
ALL = "numbers LEFT JOIN texts USING (row) LEFT JOIN marks USING (source_index)"


@dataclass(frozen=True)
class Counted:
    """A histogram: its bins' ``edges`` (the first and last bins are open), and in each bin the number of all rows,
    ``total``, and of those that pass the other filters, ``counts``."""

    name: str
    edges: list[float]
    total: list[int]
    counts: list[int]


@dataclass
class Clock:
    """Milliseconds that DuckDB took for a request."""

    duckdb: float = 0.0


class Index:
    """The tables, in ``folder``. Any thread may query; only one adds rows at a time."""

    def __init__(self, folder: Path):
        import duckdb

        settings: dict[str, Any] = {"memory_limit": MEMORY, "threads": THREADS, "temp_directory": str(folder / "spill")}
        self._connection = duckdb.connect(str(folder / "index.duckdb"), config=settings)
        self._connection.execute(TABLES)
        for setting in ("python_enable_replacements = false", "enable_external_access = false"):
            self._connection.execute(f"SET {setting}")
        self._connection.execute("SET lock_configuration = true")
        self._adding, self._opening = threading.Lock(), threading.Lock()
        self._changes, self._kept = 0, lru_cache(KEPT)(self._kept_rows)
        self.has_texts = False

    def close(self) -> None:
        """Close it, after rows that are being added; adding later fails."""
        with self._adding, self._opening:
            self._connection.close()

    # --- adding ---

    def add_numbers(self, first: int, table: pa.Table) -> None:
        """Add rows from number ``first`` on, with the columns ``NUMBERS``."""
        rows = pa.array(np.arange(first, first + len(table), dtype=np.int32))
        self._insert(table.select(NUMBERS).append_column("row", rows), f"numbers (row, {', '.join(NUMBERS)})")

    def add_faults(self, first: int, count: int, reason: str) -> None:
        """Add rows whose numbers could not be read, with the reason."""
        rows = pa.array(np.arange(first, first + count, dtype=np.int32))
        self._insert(pa.table({"row": rows, "fault": pa.array([reason] * count, pa.string())}), "numbers (row, fault)")

    def add_texts(self, first: int, table: pa.Table) -> None:
        """Add the messages of rows from number ``first`` on, as in FORMAT.md's column ``messages``."""
        rows = pa.array(np.arange(first, first + len(table), dtype=np.int32))
        with self._adding, self._cursor() as cursor:
            cursor.register("batch", table.append_column("row", rows))
            cursor.execute(TEXTS)
            cursor.unregister("batch")
            self._changes += 1

    def set_marks(self, marks: Sequence[tuple[int, str, list[str]]]) -> None:
        """Replace the notes and tags of source rows; a mark without either is removed."""
        with self._adding, self._cursor() as cursor:
            for source_index, note, tags in marks:
                cursor.execute("DELETE FROM marks WHERE source_index = ?", [source_index])
                if note or tags:
                    cursor.execute("INSERT INTO marks VALUES (?, ?, ?)", [source_index, note, tags])
            self._changes += 1

    def _insert(self, table: pa.Table, place: str) -> None:
        columns = place.partition("(")[2].rstrip(")")
        with self._adding, self._cursor() as cursor:
            cursor.register("batch", table)
            cursor.execute(f"INSERT INTO {place} SELECT {columns} FROM batch")
            cursor.unregister("batch")
            self._changes += 1

    # --- queries ---

    def totals(self, view: View, clock: Clock) -> dict:
        """A view's number of rows, their tokens, and means over the tokens."""
        where, values = self._condition(view)
        names = ("rows", "num_tokens", "mean_nll", "mean_entropy", "top1_rate", "faults")
        means = (f"sum({name} * num_tokens) / sum(num_tokens)" for name in names[2:5])
        columns = f"count(*), sum(num_tokens), {', '.join(means)}, count(fault)"
        sql = f"SELECT {columns} FROM {self._tables(view)} WHERE {where}"
        return dict(zip(names, self._rows(sql, values, clock, view.is_whole)[0], strict=True))

    def page(self, view: View, clock: Clock) -> list[dict]:
        """The rows of the view's page."""
        where, values = self._condition(view)
        columns = ("row", *NUMBERS, "fault", "question", "note", "tags")
        shown = ", ".join(columns).replace("question", f"substr(question, 1, {QUESTION})")
        sql = (
            f"SELECT {shown} FROM {ALL} WHERE row IN (SELECT row FROM {self._tables(view)} WHERE {where} "
            f"ORDER BY {self._order(view)} LIMIT {PAGE_ROWS} OFFSET {PAGE_ROWS * (view.page - 1)}) "
            f"ORDER BY {self._order(view)}"
        )
        return [dict(zip(columns, row, strict=True)) for row in self._rows(sql, values, clock, view == View())]

    def chosen(self, view: View, clock: Clock) -> list[tuple[int, int]]:
        """All rows of a view in its order, and their source rows."""
        where, values = self._condition(view)
        sql = f"SELECT row, source_index FROM {self._tables(view)} WHERE {where} ORDER BY {self._order(view)}"
        return self._rows(sql, values, clock)

    def source_index(self, row: int, clock: Clock) -> int | None:
        """The source row of a stored row, None if its numbers could not be read."""
        found = self._rows("SELECT source_index FROM numbers WHERE row = ?", [row], clock)
        return found[0][0] if found else None

    def has_source(self, source_index: int, clock: Clock) -> bool:
        """Whether there is a stored row of this source row, a 64-bit number."""
        return bool(self._rows("SELECT 1 FROM numbers WHERE source_index = ? LIMIT 1", [source_index], clock))

    def neighbours(self, view: View, row: int, clock: Clock) -> dict:
        """A row's place in the view: the ``previous`` and ``next`` row or None, its ``place`` from 1 or None if it is
        not in the view, and the view's number of rows, ``of``."""
        where, values = self._condition(view)
        chosen = f"(SELECT row, {self._key(view)} AS key FROM {self._tables(view)} WHERE {where})"
        before, after = ("<", ">") if not view.down else (">", "<")
        before = f"(chosen.key {before} own.key OR (chosen.key = own.key AND chosen.row < own.row))"
        after = f"(chosen.key {after} own.key OR (chosen.key = own.key AND chosen.row > own.row))"
        ups = ("DESC", "ASC") if not view.down else ("ASC", "DESC")
        sql = f"""WITH chosen AS MATERIALIZED {chosen}, own AS (SELECT * FROM chosen WHERE row = ?)
            SELECT (SELECT count(*) FROM chosen), (SELECT count(*) FROM own),
            (SELECT count(*) FROM chosen, own WHERE {before}),
            (SELECT chosen.row FROM chosen, own WHERE {before} ORDER BY chosen.key {ups[0]}, chosen.row DESC LIMIT 1),
            (SELECT chosen.row FROM chosen, own WHERE {after} ORDER BY chosen.key {ups[1]}, chosen.row LIMIT 1)"""
        count, is_chosen, place, previous, following = self._rows(sql, [*values, row], clock)[0]
        return {"of": count, "place": place + 1 if is_chosen else None, "previous": previous, "next": following}

    def histogram(self, name: str, view: View, clock: Clock) -> Counted:
        """A column's distribution over all rows, and over those that pass the view's other filters."""
        edges = self._edges_of(name, clock)
        bins = f"least({BINS - 1}, greatest(0, floor(({_scaled(name)} - ?) / ? * {BINS})::INTEGER))"
        low, width = edges[0], (edges[-1] - edges[0]) or 1.0

        def counts(view: View) -> list[int]:
            where, values = self._condition(view)
            sql = f"SELECT {bins}, count(*) FROM {self._tables(view)} WHERE isfinite({name}) AND {where} GROUP BY 1"
            found = dict(self._rows(sql, [low, width, *values], clock, view.is_whole))
            return [found.get(i, 0) for i in range(BINS)]

        others = view.without(name)
        total = counts(View())
        left = total if others.is_whole else counts(others)
        return Counted(name, [_unscaled(name, edge) for edge in edges], total, left)

    def roles(self, clock: Clock) -> list[str]:
        """The roles of the messages in the texts read so far."""
        sql = "SELECT DISTINCT unnest(map_keys(roles)) AS role FROM texts ORDER BY role LIMIT 20"
        return [role for (role,) in self._rows(sql, [], clock, True)]

    def tags(self, clock: Clock) -> list[str]:
        """All tags of the dataset's rows."""
        sql = "SELECT DISTINCT unnest(tags) AS tag FROM marks SEMI JOIN numbers USING (source_index) ORDER BY tag"
        return [tag for (tag,) in self._rows(sql, [], clock, True)]

    def _edges_of(self, name: str, clock: Clock) -> list[float]:
        scaled = _scaled(name)
        sql = f"SELECT quantile_cont({scaled}, [{EDGES}, {1 - EDGES}]) FROM numbers WHERE isfinite({name})"
        low, high = self._rows(sql, [], clock, True)[0][0] or (0.0, 1.0)
        return np.linspace(low, max(high, low + 1e-6), BINS + 1).tolist()

    # --- SQL ---

    def _condition(self, view: View) -> tuple[str, list]:
        """The view's filters as a condition with ``?`` for values."""
        parts, values = ["true"], list[Any]()
        for column, span in view.ranges.items():
            _add_range(parts, values, column, span)
        for role, span in view.roles.items():
            parts.append("roles IS NOT NULL")
            at = len(values)
            _add_range(parts, values, "coalesce(roles[?], 0)", span)
            for i in range((span.low is not None) + (span.high is not None)):
                values.insert(at + 2 * i, role)
        if view.where:
            parts.append(_chosen_by(condition_of(view.where)))
        if view.text:
            parts.append("contains(text, lower(?))")
            values.append(view.text)
        if view.tag:
            parts.append("list_contains(tags, ?)")
            values.append(view.tag)
        if view.marked:
            parts.append("note IS NOT NULL")
        return " AND ".join(parts), values

    def _tables(self, view: View) -> str:
        """Join only the tables that a view needs: joining an empty table to a million rows is still slow."""
        texts = " LEFT JOIN texts USING (row)" * view.needs_texts
        marks = " LEFT JOIN marks USING (source_index)" * (view.marked or bool(view.tag) or view.sort == "note")
        return f"numbers{texts}{marks}"

    def _key(self, view: View) -> str:
        if view.sort in ("question", "note"):
            return f"lower(coalesce({view.sort}, ''))"
        missing = "'-Infinity'" if view.down else "'Infinity'"
        return f"coalesce(CASE WHEN isnan({view.sort}::DOUBLE) THEN NULL ELSE {view.sort} END, {missing}::DOUBLE)"

    def _order(self, view: View) -> str:
        return f"{self._key(view)} {'DESC' if view.down else 'ASC'}, row"

    @contextmanager
    def _cursor(self):
        with self._opening:  # a connection refuses while another thread's call is busy
            cursor = self._connection.cursor()
        try:
            yield cursor
        finally:
            cursor.close()

    def _rows(self, sql: str, values: Sequence, clock: Clock, is_kept: bool = False) -> list[tuple]:
        """The answer to a query; with ``is_kept`` it is cached until something is added."""
        start = time.perf_counter()
        try:
            return self._kept(self._changes, sql, tuple(values)) if is_kept else self._found(sql, values)
        finally:
            clock.duckdb += 1000 * (time.perf_counter() - start)

    def _kept_rows(self, _changes: int, sql: str, values: tuple) -> list[tuple]:
        """As ``_found``, cached with the ``_changes`` before the query, so that no outdated answer is used."""
        return self._found(sql, values)

    def _found(self, sql: str, values: Sequence) -> list[tuple]:
        import duckdb

        try:
            with self._cursor() as cursor:
                return cursor.execute(sql, values).fetchall()
        except duckdb.Error as error:
            raise UsageError(f"the filter cannot be used: {str(error).splitlines()[0]}") from error


def _chosen_by(condition: Condition) -> str:
    """A condition as one on ``row``, so that it can only use its own columns."""
    place = "seen_with_texts" if condition.columns & OF_TEXTS else "seen"
    return f"row IN (SELECT row FROM {place} WHERE (\n{condition.text}\n))"


def _add_range(parts: list[str], values: list, column: str, span) -> None:
    for end, sign in ((span.low, ">="), (span.high, "<=")):
        if end is not None:
            parts.append(f"{column} {sign} ?")
            values.append(end)


def _scaled(name: str) -> str:
    """Lengths are shown on a logarithmic axis; so is perplexity, as its logarithm is stored."""
    return f"ln(greatest(1, {name}))" if name == "num_tokens" else name


def _unscaled(name: str, edge: float) -> float:
    return float(np.exp(edge)) if name == "num_tokens" else edge
