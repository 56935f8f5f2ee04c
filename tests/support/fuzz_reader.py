"""Damages a small dataset in thousands of ways and reads it each time; prints what came of it as JSON.

    python fuzz_reader.py FOLDER SEED COUNT

A read must end in a ToolkitError, or give what was written. Runs in a process of its own, so that a crash of the
Parquet library, a hang or an allocation without end shows.
"""

import json
import random
import re
import shutil
import signal
import sys
import traceback
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.json_files import canonical
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import METADATA_KEY, SCHEMA
from chat_logits.storage.shard_reading import check_shard
from explore_logits import analyze_token_probabilities

SHARD = "data/00000/train-00001.parquet"
DEEP = json.loads("[" * 900 + "]" * 900)
NUMBERS = [None, True, -1, 0, 1, 7, 2**31, 2**70, 1e308]
NASTY = [*NUMBERS, "", "x", "\ud800", "../x", "x" * 10**5, [], {}, [None], {"a": 1}, DEEP]
KINDS = ("extraction bytes", "extraction", "listing", "parquet", "parquet", "metadata", "columns")
SECONDS = 20


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flip, set, cut, extend, blank, move or double some bytes, mostly near the end, where a Parquet footer is."""
    content = bytearray(data)

    def place() -> int:
        return dice.randrange(len(content)) if dice.random() < 0.5 else -1 - dice.randrange(min(len(content), 3000))

    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        if not content:
            break
        kind, at, size = dice.randrange(7), place() % len(content), dice.choice((1, 2, 4, 40))
        if kind == 0:
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            content[at] = dice.choice((0, 255, 127, 128, dice.randrange(256)))
        elif kind == 2 and len(content) > 1:
            del content[at : None if dice.random() < 0.2 else at + size]
        elif kind == 3:
            content[at:at] = dice.randbytes(size)
        elif kind == 4:
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif kind == 5:
            other = place() % len(content)
            content[at : at + size] = content[other : other + len(content[at : at + size])]
        else:
            content[at : at + size] = dice.randbytes(len(content[at : at + size]))
    return bytes(content)


def damage_value(value, dice: random.Random):
    """A JSON value with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(sorted(value))
        if dice.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        if dice.random() < 0.05:
            return {**value, "surplus": dice.choice(NASTY)}
        return {**value, key: damage_value(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        if dice.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damage_value(value[at], dice), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.5:
        return value + dice.choice((-1, 1, 64, -64))
    return dice.choice(NASTY)


class Damage:
    """The dataset in ``folder``, of which one file at a time is spoilt and restored."""

    def __init__(self, folder: Path, dice: random.Random):
        self.folder, self.dice = folder, dice
        self.whole = {name: (folder / name).read_bytes() for name in ("extraction.json", "shards.json", SHARD)}
        self.table = pq.read_table(folder / SHARD)
        self.metadata = json.loads(pq.ParquetFile(folder / SHARD).metadata.metadata[METADATA_KEY.encode()])

    def spoil(self) -> tuple[str, list[dict] | None]:
        """Spoil one file. Gives the kind of damage, and the shard's rows where a writer gave it other ones."""
        kind = self.dice.choice(KINDS)
        if kind == "parquet":
            (self.folder / SHARD).write_bytes(damage_bytes(self.whole[SHARD], self.dice))
        elif kind == "metadata":
            self._rewrite(self.table, damage_value(self.metadata, self.dice), mend=self.dice.random() < 0.5)
        elif kind == "columns":
            return kind, self._spoil_columns()
        else:
            name = "shards.json" if kind == "listing" else "extraction.json"
            text = self.whole[name]
            if self.dice.random() < 0.02:
                text = b"[" * 10**5
            elif kind == "extraction bytes" or self.dice.random() < 0.3:
                text = damage_bytes(text, self.dice)
            else:
                text = json.dumps(damage_value(json.loads(text), self.dice)).encode()
            (self.folder / name).write_bytes(text)
        return kind, None

    def _spoil_columns(self) -> list[dict]:
        """What a writer with a fault would leave: other values in one row's columns, checksums as they should be."""
        rows = self.table.to_pylist()
        row, schema = self.dice.choice(rows), SCHEMA
        name = self.dice.choice(SCHEMA.names)
        if self.dice.random() < 0.2:
            kind = self.dice.choice((pa.int64(), pa.string(), pa.list_(pa.int64()), pa.float32()))
            schema = SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, kind))
            rows = [{**row, name: None} for row in rows]
        else:
            row[name] = self._other_value(row[name])
        table = pa.Table.from_pylist(rows, schema=schema)
        metadata = {key: value for key, value in self.metadata.items() if key != "row_crc32"}
        self._rewrite(table, metadata, mend=True)
        return table.to_pylist()

    def _other_value(self, value):
        if value is None or self.dice.random() < 0.1:
            return None
        if isinstance(value, bytes):
            return damage_bytes(value, self.dice) if value else b"\1"
        if isinstance(value, int):
            return max(0, min(2**31 - 1, value + self.dice.choice((-1, 1, 1000, -(10**9), 10**9))))
        if isinstance(value, float):
            return self.dice.choice((-value, value + 1, value - 1, 0.0, 1e30, float("inf")))
        if self.dice.random() < 0.5:
            return value[: self.dice.randrange(len(value) + 1)]
        return [*value, *value[:1]]

    def _rewrite(self, table: pa.Table, metadata, mend: bool) -> None:
        if mend and isinstance(metadata, dict):
            metadata = {key: value for key, value in metadata.items() if key != "crc32"}
            metadata["crc32"] = zlib.crc32(canonical(metadata))
        with pq.ParquetWriter(self.folder / SHARD, table.schema, store_schema=False) as writer:
            writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata)})
            writer.write_table(table, row_group_size=16)

    def restore(self) -> None:
        for name, content in self.whole.items():
            (self.folder / name).write_bytes(content)


def peak() -> int:
    """Bytes of memory at most so far; ``ru_maxrss`` would begin with the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Oracle:
    """What reading the dataset gives while nothing is damaged."""

    def __init__(self, folder: Path):
        dataset = open_dataset(str(folder))
        self.tokenizer = load_tokenizer(dataset.manifest.model_id)
        self.rows = [dataset.read_row(i) for i in range(dataset.num_rows)]
        self.first = dataset.shards[0].num_rows
        self.tokens = [self.told(row, dataset.manifest) for row in self.rows]
        self.check = (dataset.manifest.fingerprint, dataset.manifest.rows_per_shard)
        self.entry = check_shard(folder, SHARD, *self.check)

    def told(self, row: dict, manifest: Manifest) -> list:
        found = analyze_token_probabilities(row, self.tokenizer, manifest)
        return [(token.text, token.status, token.log_prob, token.rank, len(token.predictions)) for token in found]

    def reads_right(self, folder: Path, index: int, written: list[dict] | None) -> bool:
        """Read a row and its tokens, or, where a writer gave the shard other rows, that row."""
        found = open_dataset(str(folder))
        row = found.read_row(index)
        if written is not None:
            return row == written[index - self.first]
        return row == self.rows[index] and self.told(row, found.manifest) == self.tokens[index]

    def checks_right(self, folder: Path) -> bool:
        found = check_shard(folder, SHARD, *self.check)
        return replace(found, num_bytes=0) == replace(self.entry, num_bytes=0)


def outcome(read, *arguments) -> tuple[str, str | None]:
    """In a word how a read ended, and what was wrong with that, if anything."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # of this process's own, whatever else the machine does
    try:
        return "read", None if read(*arguments) else "something else was read"
    except ToolkitError as error:
        return type(error).__name__, None
    except Exception:
        return "failed", traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def main(folder: Path, seed: int, count: int) -> None:
    dice, oracle = random.Random(seed), Oracle(folder)
    work = shutil.copytree(folder, folder.with_name(f"work{seed}"))
    damage, outcomes, wrong, before = Damage(work, dice), Counter(), [], peak()
    for case in range(count):
        kind, written = damage.spoil()
        ends = {kind: outcome(oracle.reads_right, work, dice.randrange(oracle.first, len(oracle.rows)), written)}
        if kind == "parquet":
            ends["resume"] = outcome(oracle.checks_right, work)
        for name, (word, fault) in ends.items():
            outcomes[f"{name}: {word}"] += 1
            wrong += [f"{seed}/{case} {name}: {fault}"] if fault else []
        damage.restore()
    told = {"outcomes": outcomes, "wrong": wrong[:20], "number": len(wrong), "grown": peak() - before}
    print("FUZZ", json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
