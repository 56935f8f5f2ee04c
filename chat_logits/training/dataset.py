"""A stored logit dataset as a `datasets.Dataset` to train a student on; targets are computed when it is read."""

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chat_logits.analysis.opening import open_given, open_with_tokenizer
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.templates import portable_template
from chat_logits.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import explain_hub_error
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import FULL, TOO_LARGE, free_bytes, size_text
from chat_logits.storage.json_files import canonical
from chat_logits.storage.shard_list import ShardEntry
from chat_logits.training.examples import INTEGERS, STORED, TOKENS, AlignedRows, ExampleMaker

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Of the rows in the cache. Raise it whenever a change to ``RowAligner`` or ``AlignedRows`` gives a stored row other
# tokens, positions or ends of turns: rows that were cached before are then aligned again.
ALIGNING_VERSION = 1


def training_dataset(
    dataset_id: str | Path,
    tokenizer: Any = None,
    revision: str | None = None,
    *,
    chat_template: str | None = None,
    hard_weight: float = 0.0,
    end_of_turn: str = "hard",
    allow_biased: bool = False,
    max_length: int | None = None,
    streaming: bool = False,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """A logit dataset, a folder or a Hub id at ``revision``, with the examples that ``ExampleMaker`` makes.

    Without ``streaming``, all rows are read, checked and aligned at once, by ``num_proc`` processes, and kept as Arrow
    in ``cache_dir`` (by default that of `datasets`), where the next call finds them; ids and weights are computed from
    these whenever an example is read, without a tokenizer. With ``streaming``, all of this is done while reading, in
    the DataLoader's workers, shard by shard: nothing is written, and `datasets` splits, shuffles and resumes by shards.
    Both are pinned to the Hub's commit, and support `datasets`' own ``shuffle``, ``skip``, ``state_dict`` and
    ``split_dataset_by_node``.

    ``tokenizer`` is the student's: a transformers tokenizer, a folder or a Hub id; None for the extraction's own.
    ``chat_template`` replaces the recorded one. ``hard_weight``, ``end_of_turn`` and ``allow_biased`` are as in
    ``row_targets``. Conversations of more than ``max_length`` tokens are skipped, with a warning that counts them.

    Raises UsageError for an argument of the wrong type or out of range, for rows without draws, and for a tokenizer
    with other tokens; ToolkitError if a row is damaged or its tokens cannot be rebuilt, naming the row (when streaming,
    as soon as the row is read), and if the disk of the cache has no room for the aligned rows.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads do not survive a fork
    maker = ExampleMaker(hard_weight, end_of_turn, allow_biased)
    stored, own_tokenizer = open_for_student(dataset_id, tokenizer, revision, trust_remote_code)
    stored.refuse_empty()
    maker.refuse(stored.manifest.top_k, stored.manifest.num_sampled)
    template = portable_template(chat_template)
    rows = AlignedRows(stored, RowAligner(own_tokenizer, stored.manifest, template))
    if streaming:
        return _streamed(StreamedExamples(rows, maker, max_length))
    aligned = _cached(rows, _identity(stored, template), cache_dir, num_proc)
    return _short_enough(aligned, max_length).with_transform(maker)


# --- rows in Arrow files ---


def _cached(rows: AlignedRows, identity: str, cache_dir: str | None, num_proc: int | None) -> "datasets.Dataset":
    """The aligned rows as a memory-mapped dataset, made unless the cache has one of this identity."""
    import datasets

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    is_made = any(folder.glob(f"generator/*{identity}/*/dataset_info.json"))
    if not is_made and free_bytes(folder) < _least_bytes(rows.dataset):
        raise _no_room(rows.dataset, folder, cache_dir)
    integers = dict.fromkeys(INTEGERS, datasets.Value("int64"))
    features = datasets.Features(integers | dict.fromkeys((*TOKENS, *STORED), datasets.Value("binary")))
    shards = [shard for shard in rows.dataset.shards if shard.num_rows]
    try:
        return datasets.Dataset.from_generator(
            rows,
            features=features,
            gen_kwargs={"shards": shards},
            fingerprint=identity,
            cache_dir=cache_dir,
            num_proc=min(num_proc, len(shards)) if num_proc else None,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        if isinstance(error.__cause__, ToolkitError):
            raise error.__cause__ from None
        if explained := _explained(error, rows.dataset, folder, cache_dir):
            raise explained from error
        raise


def _explained(error: Exception, stored: StoredDataset, folder: Path, cache_dir: str | None) -> ToolkitError | None:
    """What to tell of an error while the cache in ``folder`` is written; None if it was not expected."""
    kind, said = _last_line(error if isinstance(error, OSError) else error.__cause__)
    if os.strerror(errno.EFBIG) in said:
        return ToolkitError(
            f"the aligned rows need {size_text(_least_bytes(stored))} in the cache {folder}: {TOO_LARGE}."
        )
    if any(os.strerror(number) in said for number in FULL):
        return _no_room(stored, folder, cache_dir)
    if kind.startswith("chat_logits."):
        return ToolkitError(said)
    return explain_hub_error(error, "the aligned rows") if isinstance(error, OSError) else None


def _last_line(error: BaseException | None) -> tuple[str, str]:
    """An error's last line, and before it the error's type, if it comes from another process: of such a one there is
    only the traceback as text, which ends in that of the `datasets` error that it caused."""
    last = str(error).split("\n\nThe above exception was")[-2:][0].rpartition("\n")[2]
    kind, _, said = last.partition(": ")
    return (kind, said) if said else ("", last)


def _least_bytes(stored: StoredDataset) -> int:
    """Bytes of the aligned rows, at least: an entry's code and id, and a token's id and position. With 80 entries that
    is 268 for each extracted token; 270 were measured, where prompts are short."""
    entries = stored.manifest.top_k + stored.manifest.num_sampled
    return int(sum(shard.num_tokens for shard in stored.shards) * (3.25 * entries + 8))


def _no_room(stored: StoredDataset, folder: Path, cache_dir: str | None) -> ToolkitError:
    elsewhere = "give another `cache_dir`" if cache_dir else "set HF_DATASETS_CACHE to a folder on another disk"
    needed, free = size_text(_least_bytes(stored)), size_text(free_bytes(folder))
    return ToolkitError(
        f"the disk of the cache {folder} has no room for the aligned rows of {stored.dataset_id}: they need at least "
        f"{needed}, more with long prompts; {free} are free. Make room, or {elsewhere}."
    )


def _identity(stored: StoredDataset, chat_template: str | None) -> str:
    """A hash of the aligned rows, hex: of what was extracted, the shards, and how and by which code version the rows
    are aligned."""
    shards = [shard.as_json() for shard in stored.shards]
    content = [ALIGNING_VERSION, stored.manifest.as_json(), shards, chat_template, INTEGERS, TOKENS, STORED]
    return hashlib.sha256(canonical(content)).hexdigest()[:32]


def _short_enough(aligned: "datasets.Dataset", max_length: int | None) -> "datasets.Dataset":
    """The conversations of at most ``max_length`` tokens. Raises ToolkitError if none is left."""
    if max_length is None:
        return aligned
    lengths = np.array(aligned.with_format("arrow")["length"])
    kept = np.flatnonzero(lengths <= max_length)
    if len(kept) == len(aligned):
        return aligned
    counted = (
        f"{len(aligned) - len(kept)} of {len(aligned)} conversations have more than max_length {max_length} tokens"
    )
    if not len(kept):
        raise ToolkitError(f"{counted}: none is left to train on")
    logger.warning("%s and are skipped", counted)
    return aligned.select(kept)


# --- streamed rows ---


@dataclass(frozen=True)
class StreamedExamples:
    """Reads shards and makes examples of their rows."""

    rows: AlignedRows
    maker: ExampleMaker
    max_length: int | None
    counts: Counter = field(default_factory=Counter)

    def __call__(self, shards: Sequence[ShardEntry]) -> Iterator[dict]:
        """The examples of the rows of ``shards``, in order."""
        for batch in self.rows.batches(shards):
            kept = [row for row in batch if self._is_short_enough(row)]
            if kept:
                examples = self.maker({name: [row[name] for row in kept] for name in kept[0]})
                for values in zip(*examples.values(), strict=True):
                    yield dict(zip(examples, values, strict=True))

    def _is_short_enough(self, row: dict) -> bool:
        """False for a row that is skipped; a warning is logged for the first one, the tenth, the hundredth …"""
        if self.max_length is None or row["length"] <= self.max_length:
            return True
        self.counts["skipped"] += 1
        count = self.counts["skipped"]
        if str(count).strip("0") == "1":
            logger.warning(
                "skipped so far: %d conversations of more than max_length %d tokens; row %d has %d",
                count,
                self.max_length,
                row["row"],
                row["length"],
            )
        return False


def _streamed(examples: StreamedExamples) -> "datasets.IterableDataset":
    import datasets

    shards = [shard for shard in examples.rows.dataset.shards if shard.num_rows]
    return datasets.IterableDataset.from_generator(examples, gen_kwargs={"shards": shards})


# --- tokenizers ---


def open_for_student(
    dataset_id: str | Path, given: Any, revision: str | None, trust_remote_code: bool, tokenizer_id: str | None = None
) -> tuple[StoredDataset, Any]:
    """The dataset and a tokenizer to align it with: ``given`` (the student's) if it is the same as the extraction's,
    else the extraction's own, loaded from ``tokenizer_id`` if given.

    Raises UsageError if the student's has other tokens.
    """
    if given is None:
        return open_with_tokenizer(dataset_id, revision, tokenizer_id, trust_remote_code)
    stored = open_given(dataset_id, revision)
    if isinstance(given, str | Path):
        given = load_tokenizer(str(given), trust_remote_code=trust_remote_code)
    if not getattr(given, "backend_tokenizer", None):
        raise UsageError(
            f"tokenizer: a {type(given).__name__}, expected a fast tokenizer of transformers, or its place"
        )
    if tokenizer_fingerprint(given) == stored.manifest.tokenizer_fingerprint:
        return stored, given
    try:
        _, own = open_with_tokenizer(dataset_id, stored.revision, tokenizer_id, trust_remote_code)
    except ToolkitError as error:
        raise type(error)(
            f"the tokenizer is not the extraction's, which cannot be opened to compare their tokens: {error}"
        ) from error
    check_student_tokenizer(given, own)
    return stored, own


def check_student_tokenizer(student: Any, extraction: Any) -> None:
    """Raise UsageError if, for any id of the extraction's tokenizer, the student's has another token or none.

    The student may have more tokens, and its lm_head may have more rows than tokens.
    """
    tokens = {token_id: token for token, token_id in student.get_vocab().items()}
    for token, token_id in sorted(extraction.get_vocab().items(), key=itemgetter(1)):
        if tokens.get(token_id) != token:
            found = f"the token {tokens[token_id]!r}" if token_id in tokens else "no token"
            raise UsageError(
                f"the student's tokenizer has {found} with id {token_id}, the extraction's {token!r}: stored ids mean "
                "something else to this student. Choose one with the extraction's tokenizer."
            )
