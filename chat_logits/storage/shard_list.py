"""``shards.json``: the shards that a run has written. FORMAT.md, "Files", is the specification."""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chat_logits.errors import ToolkitError
from chat_logits.storage.json_files import SHOWN, canonical, json_text, read_json

SHARDS_FILE = "shards.json"
SHARDS_A_FOLDER = 1000
COUNTED = ("skipped", "bad", "remarks")  # keys of an entry that map a text to a number of source rows
SHARD_PATH = re.compile(r"data/\d{5}/[\w.]+-(\d{5,})\.parquet")


@dataclass(frozen=True)
class ShardEntry:
    """The entry of a shard in ``shards.json``. ``nll`` is the target tokens' total negative log-likelihood in nats,
    None if it is infinite, which JSON cannot hold, or not given.

    ``skipped`` counts source rows by reason, ``bad`` those of them that are bad records. ``turns_left_out`` counts
    turns of the stored conversations that are marked not to be trained on, ``remarks`` stored conversations by what the
    model may not read as intended in them. Reading needs only the first two fields; other writers may omit the rest.
    """

    path: str
    num_rows: int
    num_tokens: int = 0
    nll: float | None = None
    num_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    turns_left_out: int = 0
    remarks: dict[str, int] = field(default_factory=dict)

    @property
    def shard(self) -> int:
        number = shard_number(self.path)
        assert number is not None, self.path
        return number

    @property
    def source_rows(self) -> int:
        """Number of source rows that the shard covers, including skipped ones."""
        return self.num_rows + sum(self.skipped.values())

    def as_json(self) -> dict:
        content = asdict(self)
        left_out = {key for key, empty in (("nll", None), ("remarks", {})) if content[key] == empty}
        return {key: value for key, value in content.items() if key not in left_out}


def shard_path(split: str, shard: int) -> str:
    """A shard's path within the dataset, such as ``data/00000/train-00042.parquet``."""
    return f"data/{shard // SHARDS_A_FOLDER:05d}/{split}-{shard:05d}.parquet"


def shard_number(path: str) -> int | None:
    """The number in a shard's path, None if it is not the path of a shard."""
    match = SHARD_PATH.fullmatch(path)
    return int(match[1]) if match else None


class ShardList(NamedTuple):
    """The content of a ``shards.json``: the entries, in order, and whether the run that wrote them is finished."""

    entries: list[ShardEntry]
    is_finished: bool


def counted_remarks(entries: Iterable[ShardEntry]) -> dict[str, int]:
    """Stored conversations in these shards by remark, the most frequent first."""
    return dict(sum((Counter(entry.remarks) for entry in entries), Counter()).most_common())


def mean_nll(entries: Collection[ShardEntry]) -> float | None:
    """Mean over all target tokens in these shards, nats; None without tokens, or if a shard's ``nll`` is None."""
    totals = [entry.nll for entry in entries if entry.num_tokens]
    known = [total for total in totals if total is not None]
    return sum(known) / sum(entry.num_tokens for entry in entries) if known and len(known) == len(totals) else None


def shards_text(entries: Iterable[ShardEntry], is_finished: bool = True) -> str:
    """The text of ``shards.json`` for these shards in order."""
    shards = [entry.as_json() for entry in entries]
    mark = {} if is_finished else {"unfinished": True}
    return json_text({"shards": shards, "crc32": zlib.crc32(canonical(shards)), **mark})


def read_shard_list(path: Path, dataset: str) -> ShardList:
    """The content of a ``shards.json``. Raises ToolkitError if it is damaged or not valid."""
    name = f"{dataset}: {SHARDS_FILE}"
    listing = read_json(path, name)
    shards = listing.get("shards")
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise ToolkitError(f"{name} lists no shards with path and num_rows")
    expected = zlib.crc32(canonical(shards))
    if listing.get("crc32", expected) != expected:
        raise ToolkitError(f"{name} is damaged (checksum {listing['crc32']!s:.{SHOWN}}, expected {expected})")
    known = ShardEntry.__dataclass_fields__.keys()
    entries = [ShardEntry(**{key: value for key, value in shard.items() if key in known}) for shard in shards]
    for one, following in itertools.pairwise(entries):
        if one.shard >= following.shard:
            raise ToolkitError(f"{name} lists {following.path} after {one.path}, expected each once, in order")
    return ShardList(entries, listing.get("unfinished") is not True)


def _is_entry(shard: object) -> bool:
    kinds: dict[str, Any] = {
        "path": str,
        "num_rows": int,
        "num_tokens": int,
        "nll": (int, float),
        "num_bytes": int,
        "skipped": dict,
        "bad": dict,
        "turns_left_out": int,
        "remarks": dict,
    }
    return (
        isinstance(shard, dict)
        and {"path", "num_rows"} <= shard.keys()
        and all(isinstance(shard[key], kind) for key, kind in kinds.items() if key in shard)
        and not any(isinstance(shard[key], bool) for key in kinds if key in shard)
        and shard_number(shard["path"]) is not None
        and shard["num_rows"] >= 0
        and all(isinstance(count, int) for name in COUNTED for count in shard.get(name, {}).values())
    )
