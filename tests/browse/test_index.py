"""What the index finds, against NumPy and Python over the same rows; what nothing in it can reach."""

from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qsl

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from many_rows import numbers_alone

from chat_logits.browse.index import BINS, Clock, Index
from chat_logits.browse.view import PAGE_ROWS, Range, View
from chat_logits.errors import UsageError

ROWS = 3000
TALKS = [
    [("user", f"Question {i}: Größe {i % 7}?"), ("assistant", "100% it_is"), *[("user", "And?")] * (i % 3)]
    for i in range(ROWS)
]


@pytest.fixture(scope="module")
def table():
    return numbers_alone(ROWS)


@pytest.fixture(scope="module")
def index(table, tmp_path_factory):
    made = Index(tmp_path_factory.mktemp("index"))
    made.add_numbers(0, table.slice(0, 1000))
    made.add_numbers(1000, table.slice(1000))
    talks = [[{"role": role, "content": content, "extra": None} for role, content in talk] for talk in TALKS]
    made.add_texts(0, pa.table({"messages": talks, "tools": pa.array([None] * ROWS, pa.string())}))
    made.set_marks([(5, "look again", ["odd", "α"]), (7, "", ["odd"])])
    yield made
    made.close()


def rows_of(index, **given) -> list[int]:
    return [row for row, _ in index.chosen(View(**given), Clock())]


def test_rows_are_sorted_and_filtered_as_numpy_has_them(index, table):
    nll, lengths = np.asarray(table["mean_nll"]), np.asarray(table["num_tokens"])
    expected = [i for i in np.argsort(-nll, kind="stable") if 1 <= nll[i] <= 2.5 and lengths[i] >= 100]
    chosen = {"sort": "mean_nll", "down": True, "ranges": {"mean_nll": Range(1, 2.5), "num_tokens": Range(100)}}
    assert rows_of(index, **chosen) == expected
    page = index.page(View(**chosen, page=2), Clock())
    assert [row["row"] for row in page] == expected[PAGE_ROWS : 2 * PAGE_ROWS]
    assert page[0]["question"] == TALKS[page[0]["row"]][0][1] and page[0]["num_tokens"] == lengths[page[0]["row"]]
    totals = index.totals(View(**chosen), Clock())
    assert totals["rows"] == len(expected) and totals["num_tokens"] == lengths[expected].sum()
    assert totals["mean_nll"] == pytest.approx(np.average(nll[expected], weights=lengths[expected]), rel=1e-6)


def test_texts_are_found_as_they_stand_whatever_their_case(index):
    assert rows_of(index, text="größe 3") == [i for i in range(ROWS) if i % 7 == 3]
    assert rows_of(index, text="question 12:") == [12]
    assert len(rows_of(index, text="0% IT_")) == ROWS and rows_of(index, text="%it") == []  # no wildcards
    assert rows_of(index, text="' OR 1=1 --") == []


def test_roles_marks_and_conditions_choose_rows(index, table):
    assert rows_of(index, roles={"user": Range(2, 2)}) == [i for i in range(ROWS) if i % 3 == 1]
    assert rows_of(index, roles={"tool": Range(1)}) == []
    assert rows_of(index, roles={"user": Range(None, 2), "assistant": Range(1, 1)}) == [
        i for i in range(ROWS) if i % 3 < 2
    ]
    assert rows_of(index, marked=True) == [5, 7] and rows_of(index, tag="α") == [5]
    assert rows_of(index, sort="note", down=True)[:1] == [5]
    condition = "perplexity > 20 and num_messages = 3 or row = 2"
    nll = np.asarray(table["mean_nll"], np.float64)
    expected = [i for i in range(ROWS) if (np.exp(nll[i]) > 20 and i % 3 == 1) or i == 2]
    assert rows_of(index, where=condition) == expected


@pytest.mark.parametrize("sort", ["row", "mean_nll", "top1_rate", "question"])
@pytest.mark.parametrize("down", [False, True])
def test_the_place_in_the_selection(index, sort, down):
    view = View(sort=sort, down=down, ranges={"mean_entropy": Range(1, 2)})
    chosen = rows_of(index, sort=sort, down=down, ranges=view.ranges)
    for at in (0, 1, len(chosen) // 2, len(chosen) - 1):
        previous, following = (chosen[at - 1] if at else None), (chosen[at + 1] if at + 1 < len(chosen) else None)
        found = index.neighbours(view, chosen[at], Clock())
        assert found == {"of": len(chosen), "place": at + 1, "previous": previous, "next": following}
    outside = next(row for row in range(ROWS) if row not in set(chosen))
    assert index.neighbours(view, outside, Clock()) == {
        "of": len(chosen), "place": None, "previous": None, "next": None
    }  # fmt: skip


def test_histograms_count_all_rows_and_those_that_other_filters_leave(index, table):
    nll, entropies = np.asarray(table["mean_nll"], np.float64), np.asarray(table["mean_entropy"])
    view = View(ranges={"mean_nll": Range(2, 3), "mean_entropy": Range(1, 2)})
    counted = index.histogram("mean_nll", view, Clock())
    assert sum(counted.total) == ROWS and len(counted.edges) == BINS + 1
    left = nll[(entropies >= 1) & (entropies <= 2)]  # its own range is not applied
    low, high = counted.edges[0], counted.edges[-1]
    bins = np.clip(np.floor((left - low) / (high - low) * BINS), 0, BINS - 1)
    assert counted.counts == np.bincount(bins.astype(int), minlength=BINS).tolist()


def test_rows_without_numbers_come_last_with_their_reason(tmp_path, table):
    index = Index(tmp_path)
    index.add_numbers(0, table.slice(0, 5))
    index.add_faults(5, 2, "damaged")
    assert (
        sorted(rows_of(index, sort="mean_nll")[-2:])
        == [5, 6]
        == sorted(rows_of(index, sort="mean_nll", down=True)[-2:])
    )
    assert index.page(View(), Clock())[-1]["fault"] == "damaged"
    assert index.totals(View(), Clock())["rows"] == 7
    index.close()


def test_many_threads_ask_at_once(index):
    view = View(ranges={"mean_entropy": Range(1, 2)})
    expected = rows_of(index, ranges=view.ranges)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: [row for row, _ in index.chosen(view, Clock())], range(200)))
    assert all(rows == expected for rows in found)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY numbers TO '/tmp/out.csv'",
        "ATTACH '/tmp/other.db'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT * FROM table",
    ],
)
def test_duckdb_is_locked(index, query):
    with pytest.raises(duckdb.Error):
        index._connection.cursor().execute(query).fetchall()


@pytest.mark.parametrize(
    "condition", ["1=1) OR (1=1", "(SELECT count(*) FROM marks) > 0", "read_text('/etc/passwd') = ''", "note = ''", "1"]
)
def test_a_condition_is_one_condition_on_the_columns(index, condition):
    with pytest.raises(UsageError):
        rows_of(index, where=condition)


def test_an_address_says_what_is_chosen_and_nothing_else():
    query = "q=a+b&where=mean_nll+%3E+4&mean_nll=1.5..3&role=user%3A2..&marked=1&tag=odd&sort=mean_nll&down=1&page=3"
    view = View.read(parse_qsl(query))
    assert view.query() == query and view.roles == {"user": Range(2)} and view.page == 3
    assert View().query() == ""
    for name, value in (
        ("sort", "text"),
        ("page", "0"),
        ("mean_nll", "1"),
        ("mean_nll", "nan.."),
        ("x", "1"),
        ("down", "x"),
    ):
        with pytest.raises(UsageError, match=name):
            View.read([(name, value)])
