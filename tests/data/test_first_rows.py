"""Datasets that begin with rows which are merely not wanted, too long or without an answer: what stands behind them."""

import logging

import pytest
from conftest import MODEL, TEMPLATE
from runs import rows_in

import extract_logits
from chat_logits.data import reader as reader_module
from chat_logits.data.config import SourceConfig
from chat_logits.data.reader import open_reader
from chat_logits.data.source import FIRST_ROWS
from chat_logits.data.templates import PrefixError
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError
from chat_logits.model.limits import InputLimits
from chat_logits.storage.dataset import open_dataset

LONG = {"question": "What is it?", "answer": "It is so. " * 60}
SHORT = {"question": "What is it?", "answer": "It is so."}
TOO_LONG = "longer than 100 tokens"
ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
OPEN, WHOLE = {"messages": [ASKED]}, {"messages": [ASKED, ANSWER]}
LEFT_OUT = {"messages": [ASKED, {**ANSWER, "weight": 0}]}
BAD = {"messages": [{"role": "narrator", "content": "Once"}, ANSWER]}
SILENT = {"messages": [ASKED, {**ANSWER, "content": ""}]}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL))


@pytest.fixture
def opened(tokenizer, chat_file):
    """The reader of some rows, written to a file."""

    def read(rows: list[dict], positions: int | None = None, **options):
        path = chat_file(rows)
        config = SourceConfig(dataset_id=str(path), **{"chat_template": str(TEMPLATE), **options})
        return open_reader(config, tokenizer, InputLimits(49_152, positions))

    return read


def source_indices(reader, first: int, end: int) -> tuple[list[int], list[int]]:
    ready, skipped = reader.align(first, end)
    return [one.source_index for one in ready], [entry["row"] for entry in skipped]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_long", [31, 32, 33, 40, 96])
def test_rows_that_are_too_long_do_not_hide_those_behind(opened, num_long, streaming):
    """Whatever rows are asked for, in whatever pieces, each comes once; those of the start are the first ones."""
    rows = [LONG] * num_long + [SHORT] * 40
    reader = opened(rows, max_length=100, streaming=streaming)
    looked_at = [one.source_index for one in reader.first_ready] + [entry["row"] for entry in reader.first_skipped]
    assert sorted(looked_at) == list(range((num_long // 32 + 1) * 32))
    assert {entry["reason"] for entry in reader.first_skipped} == {TOO_LONG}
    assert reader.tokens_a_row == pytest.approx(4 * (len(looked_at) - num_long) / len(looked_at))
    right = list(range(num_long, len(rows))), list(range(num_long))
    assert source_indices(reader, 0, 500) == right
    pieces = [source_indices(reader, first, first + 25) for first in range(0, 200, 25)]
    assert tuple([row for piece in pieces for row in piece[kind]] for kind in (0, 1)) == right
    assert reader.read(10, 20)[1] == [] and len(reader.read(0, 500)[1]) == len(rows) - len(looked_at)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_counts_them_and_stores_the_others(small_model, chat_file, tmp_path, capsys, streaming):
    """As the short ones alone; its resumption has nothing left to do."""
    flags = ["--model_id", str(small_model), "--device", "cpu", "--max_length", "100", "--rows_per_shard", "25"]
    mixed, short = chat_file([LONG] * 40 + [SHORT] * 40), chat_file([SHORT] * 40, "short.jsonl")
    run = [*flags, *["--streaming"] * streaming, "--output_dir", str(tmp_path / "out"), "--dataset_id", str(mixed)]
    assert extract_logits.main(run) == 0
    told = capsys.readouterr()
    assert "Conversations  40 written, 40 skipped" in told.out and f"40 × {TOO_LONG}" in told.out
    assert f"None of the first 32 rows is wanted (32 × {TOO_LONG}): looking further" in told.err
    shards = open_dataset(str(tmp_path / "out")).shards
    assert sum(shard.skipped.get(TOO_LONG, 0) for shard in shards) == 40 == sum(shard.num_rows for shard in shards)
    assert not any(shard.bad for shard in shards)
    assert extract_logits.main([*flags, "--output_dir", str(tmp_path / "short"), "--dataset_id", str(short)]) == 0
    rows, alone = rows_in(tmp_path / "out"), rows_in(tmp_path / "short")
    assert [row["source_index"] for row in rows] == list(range(40, 80))
    assert [row["alignment_checksum"] for row in rows] == [row["alignment_checksum"] for row in alone]
    assert extract_logits.main(run) == 0 and rows_in(tmp_path / "out") == rows


@pytest.mark.parametrize("row", [OPEN, LEFT_OUT])
def test_conversations_without_an_answer_do_not_hide_those_behind(opened, row):
    reader = opened([row] * 70 + [WHOLE] * 3)
    assert [one.source_index for one in reader.first_ready] == [70, 71, 72]
    assert [entry["row"] for entry in reader.first_skipped] == list(range(70))


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([SILENT] * 32 + [WHOLE], "32"),
        ([BAD] * 32 + [WHOLE], "32"),
        ([OPEN] * 16 + [BAD] * 16 + [WHOLE], "32"),
        ([OPEN] * 32 + [SILENT] * 32 + [WHOLE], "64"),
        ([OPEN] * 15 + [BAD] + [SILENT] * 16 + [WHOLE], "32"),
        ([OPEN] * 100, "100"),
    ],
)
def test_what_is_no_mere_wish_ends_the_run_where_it_stands(opened, rows, count):
    with pytest.raises(ToolkitError, match=f"nothing to extract in the first {count} conversations") as raised:
        opened(rows)
    assert ("Three ways out" in str(raised.value)) == (SILENT in rows)


@pytest.mark.parametrize("few", [[BAD], [SILENT], [BAD] * 8 + [SILENT] * 7])
def test_a_few_bad_ones_among_them_do_not_end_it(opened, few):
    first = len(few) + 60
    reader = opened([OPEN] * 30 + few + [OPEN] * 30 + [WHOLE])
    assert [one.source_index for one in reader.first_ready] == [first]
    assert [entry["row"] for entry in reader.first_skipped] == list(range(first))
    assert len(opened([*few, *[OPEN] * 60, WHOLE]).first_ready) == 1


def test_beside_one_that_is_ready_they_are_skipped(opened):
    reader = opened([OPEN] * 32 + [SILENT, BAD, WHOLE])
    assert [one.source_index for one in reader.first_ready] == [34]
    assert [entry["row"] for entry in reader.first_skipped] == list(range(34))
    assert [entry["row"] for entry in reader.first_skipped if "place" in entry] == [33]


def test_max_samples_ends_the_search(opened):
    with pytest.raises(ToolkitError, match=f"in the first 40 conversations \\(40 × {TOO_LONG}\\)"):
        opened([LONG] * 50 + [SHORT] * 50, max_length=100, max_samples=40)


def test_the_search_has_an_end(opened, monkeypatch, caplog):
    """And says which option lets the rows in, or that none does."""
    monkeypatch.setattr(reader_module, "MOST_FIRST_ROWS", 3 * FIRST_ROWS)
    rows = [LONG] * 96 + [SHORT]
    with pytest.raises(ToolkitError, match=f"the first 96 conversations \\(96 × {TOO_LONG}\\)") as raised:
        opened(rows, max_length=100)
    assert str(raised.value).endswith("\nA larger `max_length` includes those that are too long.")
    assert len(opened(rows, max_length=1000).first_ready) == FIRST_ROWS
    with pytest.raises(ToolkitError, match="The model has 100 positions; expected conversations that fit into them"):
        opened(rows, positions=100)
    caplog.set_level(logging.INFO, logger="chat_logits")
    caplog.clear()
    assert len(opened(rows[1:], max_length=100).first_ready) == 1
    looking = [message for message in caplog.messages if "looking further" in message]
    assert looking == [f"None of the first 32 rows is wanted (32 × {TOO_LONG}): looking further"]


def test_prefixes_that_do_not_nest_behind_them_are_told_as_in_the_first_rows(opened, tokenizer):
    counting = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(PrefixError, match="renders differently alone than inside the whole: after '' it has '1"):
        opened([OPEN] * 40 + [WHOLE], chat_template=counting)


def test_the_preview_shows_the_rows_that_were_asked_for(small_model, chat_file, capsys):
    path = chat_file([LONG] * 40 + [SHORT] * 40)
    flags = ["--model_id", str(small_model), "--dataset_id", str(path), "--max_length", "100", "--preview", "3"]
    assert extract_logits.main(flags) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert lines == [f"Source row {row} would be skipped: {TOO_LONG}" for row in range(3)]
