"""Conditions against plain Python, and the rows that are taken out of a dataset against those in it."""

import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MODEL
from runs import ROWS, ROWS_PER_SHARD, rows_in

import explore_logits
import extract_logits
from chat_logits.analysis.condition import Condition
from chat_logits.analysis.filtering import save_rows
from chat_logits.analysis.verification import check_rows
from chat_logits.data.remarks import SPECIAL, UNASKED
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import DamagedRow, StoredDataset, open_dataset
from chat_logits.storage.footer import TAIL
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.numbers import NUMBER_COLUMNS, number_table, read_columns
from chat_logits.storage.shard import METADATA_KEY
from chat_logits.storage.shard_reading import check_shard, shard_sizes
from explore_logits import execute_filtering, execute_thinning
from logit_codec import ROW_NUMBERS

CHOSEN = "num_tokens > 100"
HOLE = 8192  # bytes between two columns of a row group that pyarrow reads at most, rather than ask twice


@pytest.fixture(scope="module")
def rows(quick_run):
    return rows_in(quick_run)


@pytest.fixture(scope="module")
def filtered(quick_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("filtered") / "out"
    execute_filtering(str(quick_run), CHOSEN, str(folder), quiet=True)
    return folder


def described(path: Path) -> dict:
    return json.loads(pq.read_metadata(path).metadata[METADATA_KEY.encode()])


# --- conditions ---


def question(row):
    return next((message["content"] for message in row["messages"] if message["role"] == "user"), "")


CONDITIONS = {
    "mean_nll > 9.9": lambda row: row["mean_nll"] > np.float32(9.9),
    "MAX_SURPRISAL BETWEEN 13.5 AND 14": lambda row: 13.5 <= row["max_surprisal"] <= 14,
    "top1_rate > 0 OR mean_entropy < 6.85": lambda row: row["top1_rate"] > 0 or row["mean_entropy"] < np.float32(6.85),
    "perplexity > 20000 AND NOT num_tokens < 50": lambda row: (
        math.exp(row["mean_nll"]) > 20000 and row["num_tokens"] >= 50
    ),
    "question ILIKE '%IS 1_?%'": lambda row: question(row)[:9] == "What is 1" and len(question(row)) == 11,
    "row % 10 = 3": lambda row: row["row"] % 10 == 3,
    "source_index IN (1, 2, 177)": lambda row: row["source_index"] in (1, 2, 177),
    "num_messages = 2 AND tools IS NULL": lambda row: len(row["messages"]) == 2 and row["tools"] is None,
    "round(ln(num_tokens)) = 4 -- a remark": lambda row: round(math.log(row["num_tokens"])) == 4,
    "regexp_matches(question, '^What is [0-9]{3}')": lambda row: row["source_index"] >= 100,
    "false": lambda row: row is None,
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_is_true_of_the_rows_that_python_finds(text, quick_run, rows):
    expected = [i for i, row in enumerate(rows) if CONDITIONS[text]({**row, "row": i})]
    assert Condition(text).rows_of(open_dataset(str(quick_run))).tolist() == expected
    assert text == "false" or len(expected) > 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected 1 to 10,000 characters"),
        ("x" * 10_001, "expected 1 to 10,000 characters"),
        (3, "expected a condition as text"),
        ("mean_nll", "of type FLOAT, expected one that is true or false"),
        ("1", "of type INTEGER"),
        ("NULL", "of type"),
        ("mean_nll >", "syntax error at its end"),
        ("mean_nll > 4; SELECT 1", "more than one expression"),
        ("mean_nll > 4; DROP TABLE rows", "syntax error"),
        ("mean_nll > 4) OR (true", "syntax error"),
        ("mean_nll > 4, true", "more than one expression"),
        ("true) FROM rows WHERE (true", "syntax error"),
        ("true FROM rows UNION SELECT true", "."),
        ("true ORDER BY 1", "syntax error"),
        ("mean_nll > 4 /* open", "unterminated"),
        ("perplexities > 3", "no column perplexities; expected some of row, source_index"),
        ("rows.mean_nll > 4", "no column rows.mean_nll"),
        ("messages IS NULL", "no column messages"),
        ("question > 3", "Cannot compare"),
        ("num_tokens % 0 = 1", "Division by zero"),
        ("mean_nll > (SELECT 1)", "subquery is not for conditions"),
        ("EXISTS (FROM '/etc/passwd')", "subquery is not for conditions"),
        ("sum(mean_nll) > 4", "the function sum is not for conditions"),
        ("row_number() OVER () < 3", "window is not for conditions"),
        ("read_text('/etc/passwd') = ''", "the function read_text is not for conditions"),
        ("getenv('HOME') = ''", "the function getenv is not for conditions"),
        ("repeat('x', 1000000000) = ''", "the function repeat is not for conditions"),
        ("? > 1", "parameter is not for conditions"),
        ("COLUMNS(*) > 1", "star is not for conditions"),
        ("len([x FOR x IN [1]]) > 0", "is not for conditions"),
        ("(" * 3000 + "true" + ")" * 3000, "expression depth"),
        ("NOT " * 2000 + "true", "."),
    ],
)
def test_what_is_no_condition_is_refused_in_a_line(text, reason, quick_run):
    with pytest.raises(UsageError, match=reason) as caught:
        Condition(text).rows_of(open_dataset(str(quick_run)))
    assert str(caught.value).startswith("`where` ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 420


def test_a_condition_reads_neither_files_nor_settings(tmp_path, quick_run):
    """Also where the tree is not held against the list: the connection itself lets nothing through."""
    (tmp_path / "x.csv").write_text("a\n1\n")
    condition = Condition("true")
    for query in (
        f"FROM '{tmp_path}/x.csv'",
        f"COPY (SELECT 1) TO '{tmp_path}/y.csv'",
        f"ATTACH '{tmp_path}/z.db'",
        "SET enable_external_access = true",
        "SET memory_limit = '1GB'",
        "LOAD httpfs",
        "SELECT * FROM read_text('https://127.0.0.1/x')",
    ):
        with pytest.raises(UsageError):
            condition._answer(number_table(open_dataset(str(quick_run))), query)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


# --- numbers ---


def test_numbers_are_the_rows(quick_run, rows):
    table = number_table(open_dataset(str(quick_run))).to_pylist()
    assert [row["row"] for row in table] == list(range(len(rows)))
    for found, row in zip(table, rows, strict=True):
        assert {name: found[name] for name in NUMBER_COLUMNS} == {name: row[name] for name in NUMBER_COLUMNS}
        assert found["perplexity"] == pytest.approx(math.exp(row["mean_nll"]), rel=1e-12)


class CountingFile:
    """A file that counts the bytes that are read."""

    closed = False

    def __init__(self, path: Path):
        self._file, self.size, self._read = path.open("rb"), path.stat().st_size, []

    @property
    def count(self) -> int:
        return sum(self._read)

    def read(self, size=-1):
        data = self._file.read(size)
        self._read.append(len(data))
        return data

    def _fetch_range(self, start, end):
        """As of a file on the Hub, by several threads at once."""
        self._read.append(end - start)
        return os.pread(self._file.fileno(), end - start, start)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_only_the_columns_of_numbers_are_read(real_extraction, monkeypatch):
    """Of a shard that is fetched by ranges."""
    (path,) = real_extraction.glob("data/*/*.parquet")
    dataset = open_dataset(str(real_extraction))
    fingerprint, file = dataset.manifest.fingerprint, CountingFile(path)
    monkeypatch.setattr(StoredDataset, "opened", lambda *_, **__: nullcontext(file))
    table = read_columns(dataset, NUMBER_COLUMNS)
    sizes = shard_sizes(path, path.name, fingerprint)
    needed = sizes["footer"] + sum(sizes[name] for name in NUMBER_COLUMNS)
    print(f"{file.count:,} of {file.size:,} bytes read, {needed:,} of the columns and the footer")
    assert table.num_rows == 32 and needed <= file.count <= needed + TAIL + 2 * HOLE


@pytest.mark.parametrize(("column", "value"), [("mean_nll", math.nan), ("top1_rate", 2.0), ("max_surprisal", None)])
def test_a_number_that_no_row_has_is_refused(column, value, quick_run, copied):
    folder = copied(quick_run, lambda rows: rows[1].update({column: value}))
    with pytest.raises(DamagedRow, match=f"column {column} of row 1: found"):
        read_columns(open_dataset(str(folder)), [column])


@pytest.fixture
def copied(tmp_path):
    """A dataset of another one's first shard, whose rows are changed."""

    def write(source: Path, change) -> Path:
        from chat_logits.storage.shard import write_shard
        from chat_logits.storage.shard_list import shards_text

        dataset, folder = open_dataset(str(source)), tmp_path / "copied"
        rows = list(dataset.shard_rows(0))
        change(rows)
        folder.mkdir()
        entry = write_shard(folder, dataset.manifest, 0, rows, dataset.shard_notes(0)[0])
        (folder / "extraction.json").write_text(dataset.manifest.text, encoding="utf-8")
        (folder / "shards.json").write_text(shards_text([entry]), encoding="utf-8")
        return folder

    return write


# --- out of the dataset ---


def test_a_filtered_dataset_has_the_rows_as_they_are(quick_run, rows, filtered):
    expected = [row for row in rows if row["num_tokens"] > 100]
    assert 10 < len(expected) < len(rows) and rows_in(filtered) == expected
    crcs = {}
    for path in quick_run.glob("data/*/*.parquet"):
        indices = pq.read_table(path, columns=["source_index"])["source_index"].to_pylist()
        crcs |= dict(zip(indices, described(path)["row_crc32"], strict=True))
    for path in filtered.glob("data/*/*.parquet"):
        indices = pq.read_table(path, columns=["source_index"])["source_index"].to_pylist()
        assert described(path)["row_crc32"] == [crcs[index] for index in indices]
    assert len(datasets.load_dataset(str(filtered), split="train")) == len(expected)


def test_its_shards_tell_of_every_source_row(quick_run, filtered, rows):
    dataset = open_dataset(str(filtered))
    with_rows = {row["source_index"] // ROWS_PER_SHARD for row in rows if row["num_tokens"] > 100}
    assert [entry.shard for entry in dataset.shards] == sorted(with_rows)
    for entry in dataset.shards:
        assert check_shard(filtered, entry.path, dataset.manifest.fingerprint, ROWS_PER_SHARD) == entry
        before, after = described(quick_run / entry.path), described(filtered / entry.path)
        assert [after[key] for key in ("first_row", "end_row")] == [before[key] for key in ("first_row", "end_row")]
        assert [one for one in after["skipped"] if one["reason"] != "not chosen"] == before["skipped"]
        stored = [row["source_index"] for row in rows if row["source_index"] // ROWS_PER_SHARD == entry.shard]
        left_out = [one["row"] for one in after["skipped"] if one["reason"] == "not chosen"]
        kept = pq.read_table(filtered / entry.path, columns=["source_index"])["source_index"].to_pylist()
        assert sorted([*left_out, *kept]) == stored


def test_its_manifest_says_where_it_is_from(quick_run, filtered, tmp_path):
    before, after = (
        json.loads((folder / "extraction.json").read_text(encoding="utf-8")) for folder in (quick_run, filtered)
    )
    first = {"fingerprint": Manifest.from_json(before, "").fingerprint, "condition": CHOSEN, "rows": None}
    assert after == before | {"filtered_from": [first]}
    fingerprint = Manifest.from_json(after, "").fingerprint
    assert fingerprint != first["fingerprint"]
    card = " ".join((filtered / "README.md").read_text(encoding="utf-8").split())
    assert f"another dataset (run {first['fingerprint'][:16]}), those with `{CHOSEN}`" in card
    save_rows(open_dataset(str(filtered)), [4, 2, 2], str(tmp_path / "again"))
    again = open_dataset(str(tmp_path / "again"))
    second = {"fingerprint": fingerprint, "condition": None, "rows": [2, 4]}
    assert again.manifest.filtered_from == [first, second]
    assert list(again.rows()) == [rows_in(filtered)[i] for i in (2, 4)]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"fingerprint": "x", "condition": None, "rows": None},
        {"fingerprint": "x", "condition": "true", "rows": [1]},
        {"fingerprint": "x", "condition": None, "rows": [-1]},
        {"fingerprint": "x", "condition": None, "rows": [True]},
        {"fingerprint": 1, "condition": "true", "rows": None},
    ],
)
def test_an_origin_that_is_none_is_refused(wrong, filtered):
    content = json.loads((filtered / "extraction.json").read_text(encoding="utf-8"))
    with pytest.raises(ToolkitError, match=r"filtered_from .*expected a list of objects with fingerprint, condition"):
        Manifest.from_json(content | {"filtered_from": [wrong]}, "here")


def test_thinning_and_filtering_go_in_either_order(quick_run, filtered, tmp_path):
    execute_thinning(str(filtered), (8, 4, 0.9, tmp_path / "thinned last"), quiet=True)
    execute_thinning(str(quick_run), (8, 4, 0.9, tmp_path / "thinned"), quiet=True)
    execute_filtering(str(tmp_path / "thinned"), CHOSEN, str(tmp_path / "thinned first"), quiet=True)
    assert rows_in(tmp_path / "thinned last") == rows_in(tmp_path / "thinned first")


def test_it_holds_up_against_the_model(real_extraction, smollm2, tmp_path):
    execute_filtering(str(real_extraction), "mean_nll > 4.6", str(tmp_path / "hard"), quiet=True)
    dataset = open_dataset(str(tmp_path / "hard"))
    assert 1 < dataset.num_rows < 10
    assert check_rows(dataset, smollm2[0], load_tokenizer(str(MODEL)), range(dataset.num_rows)).holds


def test_a_student_is_trained_on_it(filtered, rows):
    from chat_logits.training.dataset import training_dataset

    examples = training_dataset(filtered, end_of_turn="skip")
    expected = [row["num_tokens"] for row in rows if row["num_tokens"] > 100]
    assert [len(example["target_ids"]) for example in examples] == expected


def test_turns_left_out_are_those_of_its_rows(quick_model, chat_file, tmp_path):
    def chat(*weights):
        turns = [({"role": "user"}, {"role": "assistant", "weight": weight}) for weight in weights]
        return {"messages": [{**turn, "content": f"This is {i}."} for i, pair in enumerate(turns) for turn in pair]}

    source = chat_file([chat(1, 0), chat(1, 1, 1), chat(0, 1, 0)])
    words = ("--model_id", quick_model, "--dataset_id", source, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert extract_logits.main([*map(str, words), "--top_k", "4"]) == 0
    dataset = open_dataset(str(tmp_path / "out"))
    assert [entry.turns_left_out for entry in dataset.shards] == [3]
    for chosen, turns in (([0], 1), ([1], 0), ([1, 2], 2)):
        folder = tmp_path / f"rows {chosen}"
        save_rows(dataset, chosen, str(folder))
        assert [entry.turns_left_out for entry in open_dataset(str(folder)).shards] == [turns]


def test_remarks_are_those_of_its_rows(quick_model, chat_file, tmp_path, capsys):
    """Of four conversations one begins with an answer, two name a special token, and one of those has both."""
    texts = [("What?", "That."), ("What is <|im_end|>?", "That."), ("<|im_end|>?", "That."), ("What?", "Nothing.")]
    talks = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    talks[2:] = [[talks[0][1], *talk] for talk in talks[2:]]
    source = chat_file([{"messages": talk} for talk in talks])
    words = ["--model_id", quick_model, "--dataset_id", source, "--output_dir", tmp_path / "out", "--device", "cpu"]
    words = [*map(str, words), "--top_k", "4", "--rows_per_shard", "3"]
    for _ in ("computed", "resumed"):
        assert extract_logits.main(words) == 0
        counted = re.findall(r"(\d) conversations with (.+)", capsys.readouterr().out)
        assert sorted(counted) == sorted([("2", SPECIAL), ("2", UNASKED)])
    assert f"2 conversations with {UNASKED}." in (tmp_path / "out" / "README.md").read_text()
    dataset = open_dataset(str(tmp_path / "out"))
    assert [entry.remarks for entry in dataset.shards] == [{SPECIAL: 2, UNASKED: 1}, {UNASKED: 1}]
    save_rows(dataset, [1, 3], str(tmp_path / "some"))
    assert [entry.remarks for entry in open_dataset(str(tmp_path / "some")).shards] == [{SPECIAL: 1}, {UNASKED: 1}]
    execute_thinning(str(tmp_path / "out"), (2, 1, 0.9, str(tmp_path / "thin")), quiet=True)
    thinned = open_dataset(str(tmp_path / "thin"))
    assert [entry.remarks for entry in thinned.shards] == [entry.remarks for entry in dataset.shards]


def test_messages_and_source_indices(quick_run, rows, tmp_path):
    for name in ("rows.jsonl", "rows.txt"):
        execute_filtering(str(quick_run), CHOSEN, str(tmp_path / name), quiet=True)
    expected = [row["source_index"] for row in rows if row["num_tokens"] > 100]
    assert [int(line) for line in (tmp_path / "rows.txt").read_text().splitlines()] == expected
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["source_index"] for line in lines] == expected
    for line in lines:
        source = ROWS[line["source_index"]]
        assert line["messages"] == [
            {"role": "user", "content": source["question"]},
            {"role": "assistant", "content": source["answer"]},
        ]


def test_messages_have_the_keys_and_tools_that_they_had(quick_run, tmp_path, copied):
    extra, tools = '{"name":"Ann"}', '[{"type":"function"}]'

    def change(rows):
        rows[0]["messages"][0]["extra"] = extra
        rows[0]["tools"] = tools

    save_rows(open_dataset(str(copied(quick_run, change))), [0], str(tmp_path / "x.jsonl"))
    line = json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))
    assert line["messages"][0]["name"] == "Ann" and line["tools"] == json.loads(tools)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("rows.csv", "expected a folder, or a file that ends in .jsonl or .txt"),
        ("rows.parquet", "expected a folder, or a file"),
        ("missing/rows.txt", "missing is missing, expected a file to write"),
        ("filled", "holds files, such as x"),
        ("", "no name; expected the name of a file or a folder"),
    ],
)
def test_places_that_cannot_be_saved_to(place, reason, quick_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "x").touch()
    with pytest.raises(UsageError, match=reason):
        execute_filtering(str(quick_run), CHOSEN, place, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["filled"]


@pytest.mark.parametrize("rows", [[-1], [10_000], ["x"], [1.5], [True], 3])
def test_rows_that_are_not_there(rows, quick_run, tmp_path):
    with pytest.raises(UsageError, match="row"):
        save_rows(open_dataset(str(quick_run)), rows, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_saved_of_no_rows(quick_run, tmp_path, capsys):
    assert explore_logits.main([str(quick_run), "--where", "false", "--save", str(tmp_path / "out")]) == 1
    assert "no row is chosen, so there is nothing to save" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_lists_the_rows(quick_run, rows, tmp_path, capsys):
    words = [str(quick_run), "--where", "num_tokens > 180", "--json", str(tmp_path / "found.json")]
    assert explore_logits.main(words) == 0
    printed = capsys.readouterr().out
    expected = [(i, row) for i, row in enumerate(rows) if row["num_tokens"] > 180]
    content = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert content["condition"] == "num_tokens > 180" and content["num_conversations"] == len(rows)
    assert [(row["row"], row["question"]) for row in content["rows"]] == [(i, question(row)) for i, row in expected]
    for found, (_, row) in zip(content["rows"], expected, strict=True):
        assert [found[name] for name in ROW_NUMBERS] == [row[name] for name in ROW_NUMBERS]
    titles, *lines = [line.split("|") for line in printed.splitlines() if line.count("|") == 7]
    assert [title.strip() for title in titles if "nats" in title] == ["Entropy, nats", "Largest, nats"]
    assert [int(line[0]) for line in lines] == [i for i, _ in expected]
    for line, (_, row) in zip(lines, expected, strict=True):
        assert float(line[3].replace(",", "")) == pytest.approx(math.exp(row["mean_nll"]), abs=0.006)
        assert line[7].strip() == json.dumps(question(row))


def test_where_goes_with_nothing_else(quick_run, capsys):
    assert explore_logits.main([str(quick_run), "--where", "true", "--summary"]) == 2
    assert explore_logits.main([str(quick_run), "--save", "x"]) == 2
    assert "--where does not go with --summary" in (told := capsys.readouterr().err)
    assert "--save is for --where" in told


def test_many_rows_are_listed_in_part(quick_run):
    found = execute_filtering(str(quick_run), "true", quiet=True)
    many = replace(found, rows=found.rows[:101])
    assert "… and 1 more" in str(many) and "more" not in str(replace(found, rows=found.rows[:100]))
