"""A condition that chooses rows, such as ``mean_nll > 4``: DuckDB parses and evaluates it, and can do nothing else.

Before it is evaluated, the parsed expression is checked: only the columns below, constants, comparisons, and the
functions in ``FUNCTIONS`` are allowed. The connection cannot access files or the network.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from chat_logits.data.stored_messages import question_of
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.numbers import NUMBER_COLUMNS, read_columns, with_perplexity
from chat_logits.storage.shard import SCHEMA

# Columns of a condition, and the stored column that each is read from; None if none has to be read.
COLUMNS = {
    "row": None,
    **{name: name for name in NUMBER_COLUMNS},
    "perplexity": "mean_nll",
    "num_messages": "messages",
    "question": "messages",
    "tools": "tools",
}
CLASSES = "COLUMN_REF CONSTANT COMPARISON CONJUNCTION BETWEEN CASE CAST TYPE OPERATOR FUNCTION"
FUNCTIONS = """+ - * / // % ** ^ || ~~ !~~ ~~* !~~* ~~~ like_escape ilike_escape not_like_escape not_ilike_escape
abs ceil ceiling floor round trunc sign exp ln log log2 log10 sqrt pow power greatest least isnan isinf isfinite
length len strlen lower upper trim contains prefix suffix starts_with ends_with regexp_matches regexp_full_match"""
# What the tree of a query with one expression has besides that
BARE: dict[str, object] = {
    "type": "SELECT_NODE",
    "modifiers": [],
    "cte_map": {"map": []},
    "group_sets": [],
    "where_clause": None,
    "having": None,
    "qualify": None,
    "sample": None,
}
LONGEST = 10_000  # characters


@dataclass(frozen=True)
class Condition:
    """A DuckDB expression over ``COLUMNS`` that is true or false of each row. Raises UsageError for anything else."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"`where` {self.text!r:.40}: expected a condition as text, such as mean_nll > 4")
        if not self.text.strip() or len(self.text) > LONGEST:
            raise self._error(f"expected 1 to {LONGEST:,} characters, such as mean_nll > 4")
        for node in _nodes(self._tree):
            self._refuse(node)
        ((_, kind, *_),) = self._answer(_one_row(self.columns), f"DESCRIBE SELECT {self._inside} FROM rows")
        if kind != "BOOLEAN":
            raise self._error(f"it is of type {kind}, expected one that is true or false, such as mean_nll > 4")

    @cached_property
    def columns(self) -> set[str]:
        """The columns of ``COLUMNS`` that it uses."""
        return {node["column_names"][0].lower() for node in _nodes(self._tree) if node["class"] == "COLUMN_REF"}

    def rows_of(self, dataset: StoredDataset) -> np.ndarray:
        """Numbers of the stored rows for which it is true, int64 and ascending. Only ``columns`` are read."""
        table = read_columns(dataset, _stored(self.columns) or ["source_index"])
        found = self._answer(table, f"SELECT row FROM rows WHERE {self._inside} ORDER BY row")
        return np.array(found, np.int64).reshape(-1)

    @property
    def _inside(self) -> str:
        """The text in brackets, which a comment in it cannot swallow."""
        return f"(\n{self.text}\n)"

    @cached_property
    def _tree(self) -> dict:
        """The parsed expression."""
        for text in (self.text, self._inside):  # without brackets first: the text may close them, as in "1) + (2"
            ((found,),) = self._answer(None, "SELECT json_serialize_sql(?)", [f"SELECT {text}\nFROM rows"])
            try:
                tree = json.loads(found)
            except RecursionError as error:
                raise self._error("too many brackets") from error
            if tree["error"]:
                raise self._error(tree["error_message"].replace('at or near "FROM"', "at its end"))
            node, *others = (statement["node"] for statement in tree["statements"])
            is_bare = {key: value for key, value in node.items() if key in BARE} == BARE
            if others or not is_bare or len(node["select_list"]) != 1:
                raise self._error("more than one expression")
        return node["select_list"][0]

    def _refuse(self, node: dict) -> None:
        """Raise UsageError if the node is not allowed in a condition."""
        kind, names, function = node["class"], node.get("column_names", []), node.get("function_name", "")
        if kind not in CLASSES.split():
            raise self._error(f"{kind.lower()} is not for conditions")
        if kind == "COLUMN_REF" and (len(names) > 1 or names[0].lower() not in COLUMNS):
            raise self._error(f"no column {'.'.join(names)}; expected some of {', '.join(COLUMNS)}")
        if kind == "FUNCTION" and (function.lower() not in FUNCTIONS.split() or node["schema"] or node["catalog"]):
            raise self._error(f"the function {function} is not for conditions")

    def _answer(self, table: pa.Table | None, query: str, values: list[str] | None = None) -> list[tuple]:
        """DuckDB's answer to a query of ``rows`` alone: no files, no network, no settings."""
        try:
            import duckdb
        except ImportError as error:
            raise UsageError("`where` needs DuckDB, which is not installed: pip install duckdb") from error
        with closing(duckdb.connect(":memory:")) as connection:
            if table is not None:
                connection.register("rows", _seen(table, self.columns))
            for setting in ("enable_external_access = false", "lock_configuration = true"):
                connection.execute(f"SET {setting}").fetchall()
            try:
                return connection.execute(query, values or []).fetchall()
            except duckdb.Error as error:
                raise self._error(str(error)) from error

    def _error(self, why: str) -> UsageError:
        reason = " ".join(why.partition("\n\n")[0].split())
        return UsageError(f"`where` {self.text!r:.80}: {reason:.300}")


def _nodes(tree: dict) -> Iterator[dict]:
    """All nodes of a parsed expression."""
    parts: list = [tree]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if "class" in part:
                yield part
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _stored(columns: set[str]) -> list[str]:
    """The stored columns that a condition's are read from."""
    return sorted({name for column in columns if (name := COLUMNS[column])})


def _one_row(columns: set[str]) -> pa.Table:
    """A table as from ``read_columns`` for these columns, with one made-up row."""
    names = _stored(columns)
    values: dict = {"messages": [], "tools": None}
    arrays = [pa.array([values.get(name, 0)], SCHEMA.field(name).type) for name in names]
    return pa.Table.from_arrays([pa.array([0]), *arrays], names=["row", *names])


def _seen(table: pa.Table, columns: set[str]) -> pa.Table:
    """The table with the columns that a condition sees."""
    if "perplexity" in columns:
        table = with_perplexity(table)
    if "messages" in table.schema.names:
        messages = table["messages"].to_pylist()
        table = table.drop_columns("messages")
        table = table.append_column("num_messages", pa.array(map(len, messages), pa.int64()))
        table = table.append_column("question", pa.array([question_of(one, None) for one in messages], pa.string()))
    return table
