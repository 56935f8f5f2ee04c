"""A dataset from anywhere can be opened: nothing in it acts in the terminal, and it takes no more than it is given."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO
from data.test_render_process import BOMBS
from runs import files_in, flags_for, without

import explore_logits
import extract_logits
from chat_logits.errors import ToolkitError
from chat_logits.storage import shard_reading as shard_files
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import METADATA_KEY, SCHEMA, DamagedShard, write_shard
from chat_logits.storage.shard_list import shards_text
from chat_logits.storage.shard_reading import check_shard

GIB = 2**30
SECONDS = 15  # of computing, beside what a command takes in any case
# Threads take address space, and their number is the machine's.
FEW_THREADS = {"MALLOC_ARENA_MAX": "2", "RAYON_NUM_THREADS": "1"}
ESCAPE = "\x1b[2J\x1b]0;title\x07\u202e\x9b1m"
ACTING = re.compile(r"[^\n -~¡-\u2027\u2030-\ufffd]")


@pytest.fixture
def dataset(quick_run, tmp_path):
    """A dataset of three real rows, made by somebody who has changed what its record says, or its rows."""

    def make(rows=lambda rows: rows, **changes) -> Path:
        found = open_dataset(str(quick_run))
        manifest = replace(found.manifest, rows_per_shard=256, **changes)
        (tmp_path / "made").mkdir(exist_ok=True)
        entry = write_shard(tmp_path / "made", manifest, 0, rows([found.read_row(i) for i in range(3)]), [])
        (tmp_path / "made" / "extraction.json").write_text(manifest.text, encoding="utf-8")
        (tmp_path / "made" / "shards.json").write_text(shards_text([entry]), encoding="utf-8")
        return tmp_path / "made"

    return make


def limited(script: str, *arguments) -> tuple[subprocess.CompletedProcess, float]:
    """A command with 2 GiB of memory, each process of it; and the seconds that it has computed."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    # By a shell: what libraries do at a fork of this process, with all its threads, may wait for ever (`preexec_fn`).
    shell = ["bash", "-c", f'ulimit -v {2 * GIB // 1024} && exec "$@"', "bash"]
    before, command = spent(), [*shell, sys.executable, str(REPO / script), *map(str, arguments)]
    env = {**FEW_THREADS, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env, timeout=300)
    return done, spent() - before


# --- templates ---


@pytest.fixture(scope="module")
def exploring(quick_run) -> float:
    """The seconds of computing that the explorer takes with a template that does no harm."""
    done, seconds = limited("explore_logits.py", quick_run)
    assert done.returncode == 0, done.stderr
    return seconds


@pytest.mark.parametrize("bomb", ["memory", "time", "time within one instruction"])
def test_a_dataset_whose_template_takes_too_much_is_told_from_a_slow_one(dataset, exploring, bomb):
    done, seconds = limited("explore_logits.py", dataset(chat_template=BOMBS[bomb]))
    assert done.returncode == 1, done.stderr
    assert seconds - exploring < SECONDS
    assert re.fullmatch(
        r"error: row 0: the conversation cannot be rebuilt: the chat template exceeds its limits: it "
        r"took more than (5 s of computing, or too much memory|1,024 MiB of memory)\n",
        done.stderr,
    )


@pytest.fixture(scope="module")
def previewing(quick_model, calm_source) -> float:
    """As ``exploring``, of a preview with the model's own template."""
    flags = without("--chat_template", flags_for(quick_model, calm_source, "out"))
    done, seconds = limited("extract_logits.py", *flags, "--preview", 1)
    assert done.returncode == 0, done.stderr
    return seconds


@pytest.mark.parametrize("bomb", ["memory", "time within one instruction"])
def test_a_model_whose_template_takes_too_much_is_refused(flags, previewing, tmp_path, bomb):
    model = tmp_path / "model"
    model.mkdir()
    arguments = flags("out", "--preview", 1)
    for path in Path(arguments[arguments.index("--model_id") + 1]).iterdir():
        (model / path.name).symlink_to(path)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(BOMBS[bomb])
    arguments[arguments.index("--model_id") + 1] = str(model)
    done, seconds = limited("extract_logits.py", *without("--chat_template", arguments))
    assert done.returncode == 2, done.stderr
    assert seconds - previewing < SECONDS
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the chat template exceeds its limits"), done.stderr


# --- shards ---


def shard_with(folder: Path, table: pa.Table, **options) -> str:
    """Write the shard again, with its own metadata."""
    (path,) = folder.glob("data/*/*.parquet")
    metadata = pq.ParquetFile(path).metadata.metadata[METADATA_KEY.encode()].decode()
    with pq.ParquetWriter(path, SCHEMA, store_schema=False, **options) as writer:
        writer.add_key_value_metadata({METADATA_KEY: metadata})
        writer.write_table(table)
    return path.relative_to(folder).as_posix()


@pytest.mark.parametrize("encoding", ["plain", "dictionary"])
def test_a_small_shard_that_takes_much_memory_is_refused_before_it_is_read(dataset, monkeypatch, encoding):
    """Of one text of 150 MB, or of one of 50 MB that a dictionary has once for three rows."""
    size = 150 * 10**6 if encoding == "plain" else 50 * 10**6
    folder = dataset()
    (path,) = folder.glob("data/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    for row in rows[: 1 if encoding == "plain" else 3]:
        row["messages"][0]["content"] = "a" * size
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    relative = shard_with(folder, table, compression="zstd", use_dictionary=encoding == "dictionary")
    assert path.stat().st_size < 200_000
    del rows, table
    before = pa.default_memory_pool().bytes_allocated()
    peak = []
    monkeypatch.setattr(shard_files.pq.ParquetFile, "read_row_group", lambda *_: peak.append("read"))
    with pytest.raises(DamagedShard, match=r"bytes in the file and takes up to [\d,]+ in memory, expected"):
        open_dataset(str(folder)).read_row(2)
    with pytest.raises(DamagedShard, match=r"in memory, expected"):
        check_shard(folder, relative, open_dataset(str(folder)).manifest.fingerprint, 256)
    assert not peak and pa.default_memory_pool().bytes_allocated() - before < 10**6


def test_messages_have_a_limit(dataset, monkeypatch):
    folder = dataset()
    row = open_dataset(str(folder)).read_row(1)
    size = sum(pa.array([row[name]], SCHEMA.field(name).type).nbytes for name in ("messages", "tools"))
    monkeypatch.setattr(shard_files, "MESSAGES", size - 1)
    with pytest.raises(
        DamagedShard, match=rf"row 1 has {size} bytes of messages and tools, expected {size - 1} at most"
    ):
        open_dataset(str(folder)).read_row(1)
    monkeypatch.setattr(shard_files, "MESSAGES", size)
    assert open_dataset(str(folder)).read_row(1)["num_tokens"]


@pytest.mark.parametrize(("order", "told"), [((0, 1, 1), (1, 1)), ((1, 0), (0, 1))])
def test_a_shard_that_is_listed_twice_or_out_of_order_is_refused(quick_run, tmp_path, order, told):
    entries = open_dataset(str(quick_run)).shards
    (tmp_path / "extraction.json").write_bytes((quick_run / "extraction.json").read_bytes())
    (tmp_path / "shards.json").write_text(shards_text([entries[i] for i in order]))
    later, earlier = (rf"data/00000/train-0000{number}\.parquet" for number in told)
    with pytest.raises(ToolkitError, match=rf"lists {later} after {earlier}, expected each once, in order"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["data/00000/train-00000.parquet", "shards.json", "extraction.json"])
def test_a_pipe_in_a_files_place_is_refused_and_not_read(dataset, name):
    folder = dataset()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DamagedShard, match=rf"{name}: a folder, a pipe or a device, expected a file"):
        open_dataset(str(folder)).read_row(0)


def test_a_device_in_a_shards_place_is_refused_and_computed_again(flags, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = flags("out", "--max_samples", 9)
    assert extract_logits.main(arguments) == 0
    before = files_in(out)
    for number, special in enumerate(["/dev/zero", "fifo"]):
        path = out / f"data/00000/train-0000{number}.parquet"
        path.unlink()
        path.symlink_to(special) if special.startswith("/") else os.mkfifo(path)
    capsys.readouterr()
    assert extract_logits.main(arguments) == 0
    assert capsys.readouterr().err.count("a folder, a pipe or a device, expected a file\nSet aside as") == 2
    assert files_in(out) == before


# --- the terminal ---


def told(capsys, *arguments) -> str:
    capsys.readouterr()
    explore_logits.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return captured.out + captured.err


def refusal(text: str) -> str:
    return "{{ raise_exception('" + text.replace("\x1b", "\\x1b").replace("\x07", "\\x07") + "') }}"


def test_nothing_that_a_dataset_says_acts_in_the_terminal(dataset, capsys):
    hostile = {
        "chat_template": refusal(ESCAPE),
        "model_id": f"models/{ESCAPE}",
        "dataset_id": ESCAPE,
        "columns": {"messages": ESCAPE},
    }
    folder = dataset(**hostile)
    model = Manifest.read(REPO / folder / "extraction.json", "it").model_id
    for arguments in ([folder], [folder, "--summary"], [folder, "--verify", 1], [folder, "--json", "-"]):
        said = told(capsys, *arguments)
        assert "error" in said and "\\x1b[2J" in said and not ACTING.search(said), said
    assert model.endswith(ESCAPE)


@pytest.mark.parametrize("place", ["fingerprint", "path", "column", "json"])
def test_no_error_about_a_damaged_dataset_acts_in_the_terminal(dataset, capsys, place):
    folder = dataset()
    (path,) = folder.glob("data/*/*.parquet")
    if place == "column":
        table = pq.read_table(path)
        metadata = pq.ParquetFile(path).metadata.metadata[METADATA_KEY.encode()].decode()
        table = table.rename_columns([*table.column_names[:-1], ESCAPE])
        with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
            writer.add_key_value_metadata({METADATA_KEY: metadata})
            writer.write_table(table)
    elif place == "json":
        (folder / "extraction.json").write_text(json.dumps({ESCAPE: 1, "format_version": ESCAPE}))
    else:
        listed = json.loads((folder / "shards.json").read_text())["shards"]
        changed = {"path": f"data/{ESCAPE}"} if place == "path" else {"skipped": {ESCAPE: ESCAPE}}
        (folder / "shards.json").write_text(json.dumps({"shards": [{**listed[0], **changed}], "crc32": ESCAPE}))
    said = told(capsys, folder)
    assert said.startswith("error: ") and not ACTING.search(said), said


def test_json_on_standard_output_has_its_characters_as_escapes(hostile_extraction, capsys):
    said = told(capsys, hostile_extraction, "--json", "-", "--show_prompt")
    assert not ACTING.search(said)
    assert "\x1b[31mred\x1b]0;title\x07" in "".join(token["text"] for token in json.loads(said)["tokens"])


def test_what_libraries_log_and_warn_of_does_not_act(dataset, capsys, monkeypatch):
    import logging
    import warnings

    def opening(*_arguments, **_options):
        logging.getLogger("huggingface_hub.x").error("the Hub says %s", ESCAPE)
        print(warnings.formatwarning(f"and {ESCAPE}", UserWarning, "file", 1), file=sys.stderr)
        raise ToolkitError("end")

    monkeypatch.setattr(explore_logits, "open_logits", opening)
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler(sys.stderr))
    said = told(capsys, dataset())
    assert "error: end" in said and not ACTING.search(said)
