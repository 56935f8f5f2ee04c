"""Whatever is asked of the server is answered in words with a 4xx, and a damaged row spoils no other."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WIDE
from served import ask, pages, served

from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.browse.browsed import Browsed

DIGITS = "7" * 5000


@pytest.fixture(scope="module")
def server(quick_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(quick_run, folder / "out")
    with served(folder / "out", folder) as running:
        yield running


@pytest.mark.parametrize("path", [f"/row/{DIGITS}", f"/compare/{DIGITS}", f"/lines?rows={DIGITS}", "/row/x", "/row/-1"])
def test_numbers_of_any_length_are_refused_in_words(server, path):
    status, _, text = ask(server.port, path)
    assert status == 400 and DIGITS[:100] not in text and "this was not expected" not in text
    assert ("expected 1 to 64 numbers of rows below 160" if path.startswith("/lines") else "has 160 rows") in text


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/marks", {"source_index": 10**30, "note": "n", "tags": []}, "expected the number of a source row"),
        ("/marks", {"source_index": -1, "note": "n", "tags": []}, "expected the number of a source row"),
        ("/marks", {"source_index": 10**9, "note": "n", "tags": []}, "source row 1000000000: it is not in the dataset"),
        ("/marks", {"source_index": 1, "note": "\ud800", "tags": []}, "half a character"),
        ("/marks", {"source_index": 1, "note": "n", "tags": ["\udfff"]}, "half a character"),
        ("/save", {"folder": "a\0b", "query": ""}, "folder a\\x00b: not a valid file name"),
        ("/save", {"folder": "~nouser/x", "query": ""}, "folder ~nouser/x: no such user"),
        ("/save", {"folder": "x" * 5000, "query": ""}, "File name too long"),
        ("/save", {"folder": "\ud800", "query": ""}, "folder \\ud800: not a valid file name"),
        ("/save", {"folder": "new", "query": "q=\ud800"}, "expected the folder to write to"),
    ],
)
def test_odd_content_is_refused_in_words(server, path, content, words):
    before = server.browsed.marks.all()
    status, _, text = ask(server.port, path, "POST", json.dumps(content), x_browse_token=server.token)
    assert (status, words in text) == (400, True), text
    assert server.browsed.marks.all() == before


def test_a_body_that_is_nested_without_end_is_no_object(server):
    status, _, text = ask(server.port, "/marks", "POST", "[" * 60_000, x_browse_token=server.token)
    assert (status, text) == (400, "expected a JSON object\n")


# --- rows that are damaged, or of no probability ---


def rewritten(quick_run, tmp_path, change):
    """A copy of the dataset whose first shard has the three rows that ``change`` leaves, as a list of dicts."""
    shutil.copytree(quick_run, tmp_path / "out")
    path = min((tmp_path / "out").glob("data/*/*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return tmp_path / "out"


def lines_of(folder, tmp_path, rows) -> list:
    dataset, tokenizer = open_with_tokenizer(str(folder))
    browsed = Browsed(dataset, tokenizer, tmp_path)
    try:
        return browsed.lines(rows)
    finally:
        browsed.index.close()


DAMAGE = {
    "extra": lambda row: row["messages"][0].update(extra="not json"),
    "role": lambda row: row["messages"][0].update(role=None),
    "tools": lambda row: row.update(tools="not json"),
    "messages": lambda row: row.update(messages=None),
    "message": lambda row: row.update(messages=[None]),
    "log_probs": lambda row: row.update(token_log_probs=None),
    "nan": lambda row: row["token_log_probs"].__setitem__(0, math.nan),
    "positive": lambda row: row["token_log_probs"].__setitem__(0, math.inf),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_takes_nothing_from_the_others(quick_run, tmp_path, damage):
    whole = lines_of(quick_run, tmp_path, [0, 1, 2, 3])
    (tmp_path / "again").mkdir()
    folder = rewritten(quick_run, tmp_path / "again", lambda rows: DAMAGE[damage](rows[0]))
    broken, *others = lines_of(folder, tmp_path / "again", [0, 1, 2, 3])
    assert others == whole[1:] and all(line.bars for line in others)
    assert broken.fault and not broken.bars


def test_a_target_token_of_no_probability_is_shown_as_such(quick_run, tmp_path, browser):
    """FORMAT.md allows −inf; JSON has no such number, and the page says ∞."""
    found = []

    def change(rows: list[dict]) -> None:
        rows[1]["token_log_probs"][2] = -math.inf
        rows[1].update(mean_nll=math.inf, max_surprisal=math.inf)
        found.append(len(rows[1]["token_log_probs"]))

    folder = rewritten(quick_run, tmp_path, change)
    with served(folder, tmp_path, begins=False) as server:
        (line,) = json.loads(ask(server.port, "/lines?rows=1")[2])
        assert line["fault"] is None and line["at"] == 2 and line["surprisal"] is None
        assert len(line["bars"]) == min(48, found[0]) and line["bars"].count(None) == 1
        with pages(browser, server, WIDE) as opened:
            page = opened("/")
            page.wait_for_selector("#view[data-lines=all]")
            row = page.locator("tr[data-row='1']")
            assert row.locator(".worst .number").inner_text() == "∞"
            assert row.locator(".worst a").get_attribute("title").endswith(": ∞ nats")
            assert row.locator(".spark svg").get_attribute("aria-label").endswith("up to ∞ nats")
            assert not page.complaints
