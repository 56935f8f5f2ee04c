"""`--plan`: what it prints, that it opens no weights, and how near its estimate of a dataset's tokens comes."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONVERSATIONS, MODEL, TEMPLATE

import extract_logits
from chat_logits.data import token_count
from chat_logits.data.reader import open_reader
from chat_logits.data.token_count import count_tokens
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.plan import plan
from chat_logits.model.limits import InputLimits

TOKENS, EXTRACTED = 51_037, 30_042  # of the 503 conversations, as they are extracted
opened: list[str] = []
is_watching: list[bool] = []


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and is_watching and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)  # which stays, so that it does nothing without is_watching


@pytest.fixture
def watched():
    """The files that Python opens within the test."""
    opened.clear()
    is_watching.append(True)
    yield opened
    is_watching.clear()


@pytest.fixture
def unreadable(quick_model, tmp_path) -> Path:
    """A model whose weights are no weights: whoever reads them fails."""
    folder = tmp_path / "model"
    shutil.copytree(quick_model, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def options(model: Path, **more) -> dict:
    return {"model_id": str(model), "dataset_id": str(CONVERSATIONS), "chat_template": str(TEMPLATE), **more}


def words(model: Path, *more: object) -> list[str]:
    given = options(model).items()
    return [*(word for name, value in given for word in (f"--{name}", value)), "--plan", *map(str, more)]


def test_the_command_opens_no_weights_and_writes_nothing(unreadable, tmp_path, watched, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = words(unreadable, "--max_samples", 40, "--plan_for", "h100-80gb", "--dtype", "bfloat16")
    assert extract_logits.main(given) == 0
    out, err = capsys.readouterr()
    assert [name for name in watched if name.endswith(".json")], "the configuration was seen being opened"
    assert not [name for name in watched if re.search(r"safetensors$|\.bin$|\.pt$|\.gguf$", name)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "Loading" not in err
    for line in (
        r"parameters +\| +[\d,]+ \| LlamaForCausalLM built from config.json, without values",
        r"weights, bfloat16 +\| +[\d.]+ kB \| 2 bytes each: --dtype",
        r"cards a worker +\| +1 \| one holds it",
        r"source rows +\| +40 \| --max_samples",
        r"tokens a row +\| +[\d.]+ \| all source rows, as a run renders them",
        r"output +\| +[\d.]+ kB \| 168 bytes a token at K = 64, S = 16: measured, docs/scale.md",
        r"time +\| +0\.\d+ s \| the longer, by the host; 1 worker",
    ):
        assert re.search(line, out), line


def test_those_weights_are_a_trap(unreadable, tmp_path, capsys):
    given = [
        word for word in words(unreadable, "--output_dir", tmp_path / "out", "--device", "cpu") if word != "--plan"
    ]
    assert extract_logits.main(given) == 1
    assert "its safetensors are damaged" in capsys.readouterr().err


def test_without_a_dataset_it_is_the_models_part(unreadable, capsys):
    assert extract_logits.main(["--model_id", str(unreadable), "--plan", "--plan_for", "80GiB"]) == 0
    out = capsys.readouterr().out
    assert "held at the peak" in out and "source rows" not in out and "not known" not in out


def test_without_a_dataset_its_options_are_told_and_the_models_count(unreadable, capsys):
    given = ["--model_id", str(unreadable), "--plan", "--plan_for", "80GiB", "--tensor_parallel", "2"]
    assert extract_logits.main([*given, "--top_k", "8", "--max_samples", "5"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"cards a worker +\| +2 \| --tensor_parallel", out) and "which is taken" in out
    assert "No --dataset_id: the plan is only the model's part, without --max_samples, --top_k" in err


def test_the_bytes_of_a_sharded_checkpoint_are_its_indexs(unreadable):
    (unreadable / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 123_456}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (unreadable / "model.safetensors.index.json").write_text(json.dumps(index))
    found = plan(ExtractConfig(**options(unreadable, max_samples=33)), "h100-80gb")
    assert found["checkpoint"].value == 123_456 and "index" in found["checkpoint"].source


def test_a_plan_in_figures(unreadable):
    """Each figure from those before it, and the table of docs/scale.md."""
    config = ExtractConfig(**options(unreadable, top_k=16, num_sampled=8, num_workers=4, dtype="bfloat16"))
    found = plan(config, "h100-80gb", 60)
    a_row = found["extracted a row"]
    assert found["source rows"].value == 503 and a_row.error
    assert found["extracted tokens"].value == pytest.approx(503 * a_row.value)
    assert found["extracted tokens"].error == pytest.approx(503 * a_row.error)
    assert found["output"].value / found["extracted tokens"].value == pytest.approx(67)
    by_host = found["tokens"].value / 198_900
    assert found["time"].value == pytest.approx(by_host / 4) and found["card hours"].value == pytest.approx(
        by_host / 3600
    )
    assert found["time by the cards"].value == pytest.approx(found["operations"].value / (0.4 * 989e12) / 4)
    unknown = plan(config, "80GiB", 60)["time"]
    assert unknown.value is None and "the peak of 80GiB is not known" in unknown.source
    wide = plan(ExtractConfig(**options(unreadable, dtype="float32")), "h100-80gb", 60)["time"]
    assert wide.value is None and "16 bits" in wide.source


def test_the_time_of_fewer_bits_is_said_to_be_unmeasured(unreadable):
    options_of_run = options(unreadable, dtype="bfloat16", quantization="bitsandbytes-4bit")
    found = plan(ExtractConfig(**options_of_run), "h100-80gb", 60)
    assert "no model in fewer bits was measured" in found["time by the cards"].source


def test_as_many_cards_as_are_asked_for(unreadable):
    found = plan(ExtractConfig(**options(unreadable, tensor_parallel=2, dtype="bfloat16")), "h100-80gb", 60)
    assert (found["cards a worker"].value, found["cards a worker"].source) == (2, "`tensor_parallel`")
    assert found["weights a card"].value < found["weights, bfloat16"].value * 0.52
    assert found["card hours"].value == pytest.approx(found["time"].value * 2 / 3600)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plan_for", "h200"], "--plan_for h200: expected one of h100-80gb, h200-141gb, "),
        (["--preview", "1"], "--plan and --preview: one at a time"),
        (["--gguf_file", "m.gguf"], "--gguf_file m.gguf: a plan reads no weights"),
        (["--top_k", "5000"], "--top_k 5000: the model has 4096 tokens"),
    ],
)
def test_mistakes(quick_model, capsys, more, message):
    assert extract_logits.main(words(quick_model, "--log_level", "error", *more)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_card_without_a_plan(capsys):
    assert extract_logits.main(["--model_id", "m", "--dataset_id", "d", "--plan_for", "h100-80gb"]) == 2
    assert capsys.readouterr().err == "error: --plan_for h100-80gb: it goes with --plan\n"


# --- the estimate ---


@pytest.fixture(scope="module")
def reader():
    config = ExtractConfig(**options(MODEL))
    return open_reader(config, load_tokenizer(str(MODEL)), InputLimits(49_152, 2048))


def test_all_rows_are_counted_where_they_are_few(reader):
    found = count_tokens(reader)
    assert (found.rows, found.sampled, found.skipped) == (503, 503, 0)
    assert found.tokens.times(503).mean == pytest.approx(TOKENS) and found.tokens.error == 0
    assert found.extracted.times(503).mean == pytest.approx(EXTRACTED)
    lengths = np.array([len(one.input_ids) for one in reader.align(0, 503)[0]])
    assert found.longest == lengths.max()
    assert found.pairs.mean == pytest.approx((lengths * (lengths + 1) / 2).mean())


def test_the_estimate_is_within_its_error_of_the_true_total(reader):
    """Over 24 samples of 100 rows: as near as their errors say, which are those that the whole dataset has."""
    found = [count_tokens(reader, 100, seed) for seed in range(24)]
    for name, true in (("tokens", TOKENS), ("extracted", EXTRACTED)):
        off = np.array(
            [(getattr(one, name).times(503).mean - true) / getattr(one, name).times(503).error for one in found]
        )
        assert np.abs(off).max() < 3.5 and (np.abs(off) < 1).mean() > 0.45, "normal: 0.68 within one"
        assert 0.6 < math.sqrt(np.square(off).mean()) < 1.45
    numbers = np.array([len(one.input_ids) for one in reader.align(0, 503)[0]])
    expected = numbers.std(ddof=1) / 10 * math.sqrt(1 - 100 / 503)
    assert np.mean([one.tokens.error for one in found]) == pytest.approx(expected, rel=0.08)


def test_streamed_parquet_is_sampled_in_runs_whose_likeness_the_error_has(tmp_path, monkeypatch):
    """Rows in order of length: those of a run are alike, so that it tells less than as many drawn alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(token_count, "STREAMED_RUN", 16)
    said = ["word " * (1 + i // 4) for i in range(800)]
    table = pa.table({"prompt": ["Say it."] * 800, "completion": said})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=64)
    config = ExtractConfig(**options(MODEL) | {"dataset_id": str(tmp_path / "rows.parquet"), "streaming": True})
    streamed = open_reader(config, load_tokenizer(str(MODEL)), InputLimits(49_152, 2048))
    true = count_tokens(streamed, 800).tokens
    found = [count_tokens(streamed, 160, seed).tokens for seed in range(8)]
    off = np.array([(one.mean - true.mean) / one.error for one in found])
    assert true.error == 0 and np.abs(off).max() < 4 and math.sqrt(np.square(off).mean()) < 2
    assert min(one.error for one in found) > 9, "between ten runs 16; between 160 rows drawn alone, 4"


def test_a_stream_in_order_tells_no_error(reader):
    from dataclasses import replace

    found = count_tokens(replace(reader, num_rows=None), 50)
    assert found.rows is None and found.sampled == 50 and found.tokens.error is None
    first = reader.align(0, 50)[0]
    assert found.tokens.mean == pytest.approx(sum(len(one.input_ids) for one in first) / 50)
