"""A run of 60 small shards, some of whose rows are skipped, for tests of what may happen to it on the way."""

import json
import re
from pathlib import Path

import numpy as np
from conftest import TEMPLATE

from chat_logits.storage.dataset import open_dataset

ROWS = [
    {"question": f"What is {i}?", "answer": " ".join(f"It is {word} of {i}." for word in range(i % 7 * 5 + 2))}
    if i % 9
    else {"question": "Nothing to say?", "answer": ""}
    for i in range(180)
]
ROWS_PER_SHARD, SHARDS = 3, 60


def write_source(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def flags_for(model: Path, source: Path, out: Path) -> list[str]:
    """The command's options."""
    options = options_for(model, source, out)
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def options_for(model: Path, source: Path, out: Path) -> dict:
    """The same, for an ``ExtractConfig``."""
    places = {"model_id": model, "dataset_id": source, "output_dir": out}
    return {**places, "device": "cpu", "chat_template": TEMPLATE, "rows_per_shard": ROWS_PER_SHARD}


def without(option: str, flags: list[str]) -> list[str]:
    """The flags but for one option and its value."""
    place = flags.index(option)
    return [*flags[:place], *flags[place + 2 :]]


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a run, the card's snippets naming a folder, whichever repository they name."""
    named = re.compile(rb'"user/[^"\n]+"(, revision="[^"\n]+")?')
    return {
        name: named.sub(b'"path/to/this/folder"', data) if name == "README.md" else data for name, data in files.items()
    }


def files_in(folder: Path) -> dict[str, bytes]:
    """What is in a run's folder, hidden files left out, comparable with the same run under another name."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return comparable(files)


def rows_in(folder: Path) -> list[dict]:
    """All stored rows of a run, in order."""
    return list(open_dataset(str(folder)).rows())


def assert_alike(found: list[dict], expected: list[dict], atol: float = 2e-5) -> None:
    """The same conversations, and numbers that differ in last bits at most.

    For rows that were computed in two ways: in other batches, after a prefix, or with weights elsewhere in memory. Then
    sums run in another order, float32 logits of about 20 differ by up to 2e-5, and tokens that are as good as tied
    change places.
    """
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for key in ("source_index", "num_tokens", "alignment_checksum", "messages"):
            assert row[key] == other[key]
        for key in ("token_log_probs", "logsumexp"):
            np.testing.assert_allclose(row[key], other[key], atol=atol)
        ids, others = np.array(row["top_indices_low"]), np.array(other["top_indices_low"])
        assert (ids != others).mean() < 0.005


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/*/[!.]*.parquet"))
