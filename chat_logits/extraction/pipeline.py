"""The loop over shards: read and align, compute, encode and write, each beside the others, with progress on the way."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tqdm import tqdm

import logit_codec
from chat_logits.data.reader import Aligned, Reader
from chat_logits.model.batching import Batches
from chat_logits.model.selection import PendingDistributions
from chat_logits.storage.manifest import Manifest

BACKLOG = 2  # batches whose results wait to be encoded and written

Shard = tuple[int, list[Aligned], list[dict]]  # its number, the conversations that are ready, those that are skipped


def run_shards(model, settings: Manifest, shards: Iterator[Shard], side: "Side", write: Callable, bar: tqdm) -> None:
    """Compute the shards that ``side`` reads and give each, finished, to ``write(shard, rows, skipped)``.

    ``settings`` say what is kept, and how batches are formed. While the model computes, one thread reads and aligns the
    next shard, and one encodes and writes the last batches.
    """
    batches, started = Batches(model, settings), time.monotonic()
    for shard, ready, skipped in shards:
        rows: list[dict] = []
        bar.update(len(skipped))
        for members, pending in batches.compute(ready):
            side.write(encode_batch, members, pending, rows)
            bar.set_postfix_str(f"{batches.input_tokens / (time.monotonic() - started):,.0f} tokens/s")
            bar.update(len(members))
        side.write(_finish, shard, rows, skipped, write)
    side.finish()


class Side:
    """The two threads beside the model's: one reads a shard ahead, one writes, at most ``BACKLOG`` batches behind.

    What either raises is raised in the caller at its next step. After a failure nothing more is written, so that no
    shard is finished with rows missing; after a failure to read, what was read before is.
    """

    def __enter__(self) -> "Side":
        self._reading = ThreadPoolExecutor(1, "read")
        self._writing = ThreadPoolExecutor(1, "write")
        self._backlog: deque[Future] = deque()
        self._stopped = False
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown()

    def read_ahead(self, reader: Reader, shards: Iterable[int], rows_per_shard: int) -> Iterator[Shard]:
        """These shards of the reader's rows, the next one under way; ends where the rows do.

        ``shards`` may make the reading thread wait for its next number.
        """
        numbers = iter(shards)
        upcoming = self._reading.submit(_read_next, reader, numbers, rows_per_shard)
        while found := self._awaited(upcoming):
            upcoming = self._reading.submit(_read_next, reader, numbers, rows_per_shard)
            yield found

    def _awaited(self, reading: Future) -> Shard | None:
        """What was read. Until it is, whatever a write raises is raised here."""
        while not reading.done():
            wait([reading, *self._backlog], return_when=FIRST_COMPLETED)
            self._collect()
        try:
            return reading.result()
        except Exception:
            self.finish()
            raise

    def write(self, task, *arguments) -> None:
        """Do ``task(*arguments)`` after all that was given before."""
        self._backlog.append(self._writing.submit(self._unless_stopped, task, arguments))
        while len(self._backlog) > BACKLOG:
            self._backlog.popleft().result()
        self._collect()

    def _collect(self) -> None:
        while self._backlog and self._backlog[0].done():
            self._backlog.popleft().result()

    def finish(self) -> None:
        """Wait for all that was given."""
        while self._backlog:
            self._backlog.popleft().result()

    def _unless_stopped(self, task, arguments) -> None:
        if self._stopped:
            return
        try:
            task(*arguments)
        except BaseException:
            self._stopped = True
            raise


def _read_next(reader: Reader, numbers: Iterator[int], rows_per_shard: int) -> Shard | None:
    """The next shard, None after the last one."""
    shard = next(numbers, None)
    if shard is None:
        return None
    ready, skipped = reader.align(shard * rows_per_shard, (shard + 1) * rows_per_shard)
    return (shard, ready, skipped) if ready or skipped else None


def encode_batch(members: list[Aligned], pending: PendingDistributions, rows: list[dict]) -> None:
    """Append a batch's stored rows to those of its shard."""
    encoded = logit_codec.encode_rows(pending.wait(), [len(aligned.positions) for aligned in members])
    rows += [
        {
            **columns,
            "messages": aligned.messages,
            "source_index": aligned.source_index,
            "alignment_checksum": aligned.alignment.checksum,
        }
        for aligned, columns in zip(members, encoded, strict=True)
    ]


def _finish(shard: int, rows: list[dict], skipped: list[dict], write: Callable) -> None:
    write(shard, sorted(rows, key=lambda row: row["source_index"]), skipped)
