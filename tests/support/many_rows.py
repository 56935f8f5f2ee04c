"""Logit datasets of many rows, written without a model: an extraction's rows again with other questions, and rows of
numbers that nothing stands behind."""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import CONVERSATIONS, TEMPLATE, make_tiny_model

from chat_logits.data.alignment import Aligner
from chat_logits.data.stored_messages import from_stored
from chat_logits.data.tokenizer_files import read_tokenizer
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import EXTRACTION_FILE
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import SHARDS_FILE, shards_text
from logit_codec import ROW_NUMBERS


def extracted_rows(folder: Path) -> tuple[Path, Path]:
    """A dataset of 64 real conversations, extracted with a random tiny model, and the model's folder."""
    import extract_logits

    model = make_tiny_model(folder / "model", vocab_size=49_152)
    flags = ["--model_id", model, "--dataset_id", CONVERSATIONS, "--max_samples", 64, "--output_dir", folder / "some"]
    with redirect_stdout(sys.stderr):
        assert extract_logits.main([*map(str, flags), "--chat_template", str(TEMPLATE)]) == 0
    return folder / "some", model


def repeated(source: Path, folder: Path, count: int, model: Path, rows_per_shard: int = 256) -> Path:
    """A dataset of ``count`` rows, those of ``source`` in turn, each with its number before its question.

    The answers' tokens, and so their distributions, stay as they are; the checksums of the tokens are made anew.
    """
    dataset = open_dataset(str(source))
    rows, manifest = list(dataset.rows()), replace(dataset.manifest, rows_per_shard=rows_per_shard)
    aligner = Aligner.from_recorded(read_tokenizer(str(model), None), manifest)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXTRACTION_FILE).write_text(manifest.text, encoding="utf-8")
    entries = []
    for start in range(0, count, manifest.rows_per_shard):
        numbers = range(start, min(count, start + manifest.rows_per_shard))
        changed = [_renumbered(rows[i % len(rows)], i, aligner) for i in numbers]
        entries.append(write_shard(folder, manifest, start // manifest.rows_per_shard, changed, []))
    (folder / SHARDS_FILE).write_text(shards_text(entries), encoding="utf-8")
    return folder


def _renumbered(row: dict, number: int, aligner: Aligner) -> dict:
    first, *others = row["messages"]
    messages = [{**first, "content": f"{number}. {first['content']}"}, *others]
    alignment = aligner.align(from_stored(messages))
    assert len(alignment.positions) == row["num_tokens"]
    checksum = alignment.checksum
    return {**row, "messages": messages, "source_index": number, "alignment_checksum": checksum}


def numbers_alone(count: int) -> pa.Table:
    """Columns of numbers, as stored rows have them: rows of 5 to 3,000 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(5), np.log(3000), count)).astype(np.int32)
    columns = {name: generator.gamma(3, 0.7, count).astype(np.float32) for name in ROW_NUMBERS}
    columns["top1_rate"] = generator.beta(3, 2, count).astype(np.float32)
    columns["max_surprisal"] += columns["mean_nll"]
    return pa.table({"source_index": np.arange(count), "num_tokens": lengths, **columns})


def damaged(folder: Path, row_groups: int = 1) -> None:
    """Spoil the first bytes of a dataset's first shard, which are codes of its first row groups."""
    path = min(folder.glob("data/*/*.parquet"))
    metadata = pq.read_metadata(path)
    end = metadata.row_group(row_groups - 1).column(0).total_compressed_size
    data = bytearray(path.read_bytes())
    data[4 : 4 + end] = bytes(end)
    path.write_bytes(bytes(data))
