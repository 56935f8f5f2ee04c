"""What the host does beside the model, without one: tokens a second with one CPU worker and with two.

    python benchmarks/bench_host.py [--rows 4000] [--rounds 5] [--workers 2]

Two tables: source rows in, aligned conversations out; aligned conversations and ready distributions in, shards out.
Each round times every way once, in turn; ratios are of the same round. The data are the English construction questions
(demo/fetch.py) as often as it takes, the tokenizer is SmolLM2's.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

import logit_codec  # noqa: E402
from chat_logits.data.aligning import start_aligning  # noqa: E402
from chat_logits.data.config import SourceConfig  # noqa: E402
from chat_logits.data.reader import Aligned, Reader, open_reader  # noqa: E402
from chat_logits.data.tokenizer import load_tokenizer  # noqa: E402
from chat_logits.extraction.shard_computer import ReadWriteThreads, append_rows  # noqa: E402
from chat_logits.model.limits import InputLimits  # noqa: E402
from chat_logits.storage.shard import _table, _write_table  # noqa: E402

MODEL = REPO / ".cache" / "smollm2-135m-instruct"
DATA = REPO / ".cache" / "zaragoza" / "faq-en-sharegpt.jsonl"
ROWS_PER_SHARD, CONVERSATIONS_A_BATCH = 256, 128  # about what a card takes at once
TOP_K, SAMPLED = 64, 16


class Ready:
    """A batch's distributions, computed before."""

    def __init__(self, distributions: logit_codec.Distributions):
        self.wait = lambda: distributions


def many_rows(path: Path, rows: int) -> Path:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(itertools.islice(itertools.cycle(lines), rows)) + "\n", encoding="utf-8")
    return path


def shards_of(reader: Reader, workers: int, done: Callable[[list[Aligned]], None]) -> float:
    """Seconds for all rows to be read and aligned, in shards; the processes are there, and know the tokenizer."""
    shards = range(-(-(reader.num_rows or 0) // ROWS_PER_SHARD))
    with closing(start_aligning(reader, workers)) as aligning, ReadWriteThreads() as threads:
        for future in [aligning.submit(*reader.read(0, 64)) for _ in range(8 * workers)]:
            future.result()
        started = time.perf_counter()
        for shard in threads.read_ahead(reader, aligning, iter(shards), ROWS_PER_SHARD):
            done(shard.ready)
        return time.perf_counter() - started


def distributions(tokens: int, rng: np.random.Generator) -> logit_codec.Distributions:
    """As of a model that is mostly sure: nuclei of one to all of the K entries, ids without order."""
    probabilities = np.sort(rng.dirichlet(np.full(TOP_K, 0.05), tokens), axis=1)[:, ::-1]
    kept = logit_codec.nucleus_cut(probabilities, 0.98)
    ids = rng.integers(0, 49_152, (tokens, TOP_K))
    sampled = np.sort(rng.integers(0, 49_152, (tokens, SAMPLED)), axis=1)
    masses = rng.uniform(1e-5, 1e-3, (tokens, SAMPLED))
    logsumexp, target = rng.normal(20, 4, (2, tokens))
    return logit_codec.Distributions(
        np.where(kept, ids, -1), probabilities * kept, sampled, masses, logsumexp, -np.abs(target)
    )


def encoded(batches: list[tuple[list[Aligned], Ready]], writers: int, folder: Path) -> float:
    """Seconds for all batches to be encoded, and written as shards."""

    def finish(path: Path, rows: list[dict]) -> None:
        _write_table(path, _table(rows), {})

    started, a_shard = time.perf_counter(), ROWS_PER_SHARD // CONVERSATIONS_A_BATCH
    with ReadWriteThreads(writers) as threads:
        for number, start in enumerate(range(0, len(batches), a_shard)):
            rows: list[dict] = []
            waited = [threads.write(partial(append_rows, rows, *batch)) for batch in batches[start : start + a_shard]]
            threads.write(partial(finish, folder / f"{number}.parquet", rows), waited)
        threads.wait_for_writing()
    return time.perf_counter() - started


def table(title: str, tokens: int, times: dict[int, list[float]]) -> None:
    print(f"\n{title}\n\n| workers | tokens a second | a worker | of one worker | spread |")
    print("| --- | --- | --- | --- | --- |")
    for workers, found in times.items():
        speed = tokens / statistics.median(found)
        ratios = [one / mine for one, mine in zip(times[1], found, strict=True)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {workers} | {speed:,.0f} | {speed / workers:,.0f} | {statistics.median(ratios):.2f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="source rows (default: 4000)")
    parser.add_argument("--rounds", type=int, default=5, help="times each way is timed (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="timed beside one (default: 2)")
    options = parser.parse_args()
    ways = (1, options.workers)
    with tempfile.TemporaryDirectory() as place:
        source = SourceConfig(dataset_id=str(many_rows(Path(place) / "rows.jsonl", options.rows)))
        reader = open_reader(source, load_tokenizer(str(MODEL)), InputLimits(49_152, None))
        aligning: dict[int, list[float]] = {workers: [] for workers in ways}
        ready: list[Aligned] = []
        shards_of(reader, 1, ready.extend)
        for _, workers in itertools.product(range(options.rounds), ways):
            aligning[workers].append(shards_of(reader, workers, lambda _: None))
        table("Rows in, aligned conversations out", sum(len(one.input_ids) for one in ready), aligning)
        rng, writing = np.random.default_rng(0), {workers: [] for workers in ways}
        groups = [ready[i : i + CONVERSATIONS_A_BATCH] for i in range(0, len(ready), CONVERSATIONS_A_BATCH)]
        batches = [(group, Ready(distributions(sum(len(one.positions) for one in group), rng))) for group in groups]
        for _, workers in itertools.product(range(options.rounds), ways):
            writing[workers].append(encoded(batches, workers, Path(place)))
        table("Distributions in, shards out", sum(len(one.positions) for one in ready), writing)


if __name__ == "__main__":
    main()
