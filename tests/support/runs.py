"""A run of 60 small shards, some of whose rows are skipped, for tests of what may happen to it on the way."""

import json
from pathlib import Path

from conftest import TEMPLATE

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
    pairs = {"model_id": model, "dataset_id": source, "output_dir": out, "device": "cpu"}
    flags = [str(part) for name, value in pairs.items() for part in (f"--{name}", value)]
    return [*flags, "--chat_template", str(TEMPLATE), "--rows_per_shard", str(ROWS_PER_SHARD)]


def without(option: str, flags: list[str]) -> list[str]:
    """The flags but for one option and its value."""
    place = flags.index(option)
    return [*flags[:place], *flags[place + 2 :]]


def files_in(folder: Path) -> dict[str, bytes]:
    """What is in a run's folder, hidden files left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/*/[!.]*.parquet"))
