"""What the host does beside the model, without one: tokens a second here, in one process and in two.

    python benchmarks/bench_host.py [--rows 4000] [--rounds 5] [--workers 2]

Three tables: source rows in, aligned conversations out; aligned conversations and ready distributions in, shards out;
and how long this thread takes for launches, as a model's are, while encoding goes on beside it. Each round times every
way once, in turn; ratios are of the same round. The data are the English construction questions (demo/fetch.py) as
often as it takes, the tokenizer is SmolLM2's.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

import logit_codec  # noqa: E402
from chat_logits.data.aligning import AlignHere, Aligning, AlignProcesses  # noqa: E402
from chat_logits.data.config import SourceConfig  # noqa: E402
from chat_logits.data.reader import Aligned, Reader, open_reader  # noqa: E402
from chat_logits.data.tokenizer import load_tokenizer  # noqa: E402
from chat_logits.extraction.encoding import EncodeHere, EncodeProcesses, Encoding  # noqa: E402
from chat_logits.extraction.shard_computer import ReadWriteThreads  # noqa: E402
from chat_logits.model.limits import InputLimits  # noqa: E402
from chat_logits.storage.shard import ShardAround  # noqa: E402

MODEL = REPO / ".cache" / "smollm2-135m-instruct"
DATA = REPO / ".cache" / "zaragoza" / "faq-en-sharegpt.jsonl"
ROWS_PER_SHARD, CONVERSATIONS_A_BATCH = 256, 128  # about what a card takes at once
TOP_K, SAMPLED = 64, 16
LAUNCHES = 1085  # of the forward pass of a model of 24 layers

Batch = tuple[list[Aligned], logit_codec.Distributions]


def many_rows(path: Path, rows: int) -> Path:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(itertools.islice(itertools.cycle(lines), rows)) + "\n", encoding="utf-8")
    return path


def shards_of(reader: Reader, aligning: Aligning, workers: int, done: Callable[[list[Aligned]], None]) -> float:
    """Seconds for all rows to be read and aligned, in shards; the processes are there, and know the tokenizer."""
    shards = range(-(-(reader.num_rows or 0) // ROWS_PER_SHARD))
    with closing(aligning), ReadWriteThreads() as threads:
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


def encoded(batches: list[Batch], encoding: Encoding, workers: int, folder: Path) -> float:
    """Seconds for all batches to be encoded, and written as shards; the processes are there."""
    a_shard = ROWS_PER_SHARD // CONVERSATIONS_A_BATCH

    def finish(number: int, waited: list) -> None:
        around = ShardAround(f"{number}.parquet", "of a benchmark", number * ROWS_PER_SHARD, [], 0, [])
        encoding.rows([batch.result() for batch in waited]).write(folder / around.path, around)

    with closing(encoding), ReadWriteThreads(workers) as threads:
        for _ in range(2 * workers):
            batch = threads.write(partial(encoding.encode, *batches[0]))
            threads.write(partial(finish, 0, [batch]), [batch])
        threads.wait_for_writing()
        started = time.perf_counter()
        for number, start in enumerate(range(0, len(batches), a_shard)):
            some = batches[start : start + a_shard]
            waited = [threads.write(partial(encoding.encode, *batch)) for batch in some]
            threads.write(partial(finish, number, waited), waited)
        threads.wait_for_writing()
        return time.perf_counter() - started


@torch.inference_mode()
def launches() -> float:
    """Milliseconds for as many operations of no size."""
    number, started = torch.ones(1), time.perf_counter()
    for _ in range(LAUNCHES):
        number.add(1)
    return 1e3 * (time.perf_counter() - started)


def launches_beside(batches: list[Batch], encoding: Encoding) -> float:
    """The same, the mean over some seconds in which another thread has batches encoded."""
    ended = threading.Event()

    def encode() -> None:
        for batch in itertools.cycle(batches):
            encoding.encode(*batch)
            if ended.is_set():
                return

    encoding.encode(*batches[0])
    with closing(encoding), contextlib.ExitStack() as stack:
        beside = threading.Thread(target=encode)
        beside.start()
        stack.callback(beside.join)
        stack.callback(ended.set)
        return statistics.mean(launches() for _ in range(500))


def bench_launches(batches: list[Batch], rounds: int) -> None:
    ways: dict[str, Callable[[], float]] = {
        "alone": lambda: statistics.mean(launches() for _ in range(500)),
        "beside a thread that encodes": lambda: launches_beside(batches, EncodeHere()),
        "beside a process that encodes": lambda: launches_beside(batches, EncodeProcesses(1)),
    }
    times = in_turn(ways, rounds)
    print(f"\n{LAUNCHES} launches\n\n| | ms | of those alone | spread |\n| --- | --- | --- | --- |")
    for way, found in times.items():
        ratios = [mine / alone for mine, alone in zip(found, times["alone"], strict=True)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {way} | {statistics.median(found):.2f} | {statistics.median(ratios):.2f} | {spread} |")


def table(title: str, tokens: int, times: dict[str, list[float]]) -> None:
    """Tokens a second by where the work is done, and as a multiple of one process's."""
    print(f"\n{title}\n\n| in | tokens a second | of one process | spread |\n| --- | --- | --- | --- |")
    for where, found in times.items():
        ratios = [one / mine for one, mine in zip(times["one process"], found, strict=True)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {where} | {tokens / statistics.median(found):,.0f} | {statistics.median(ratios):.2f} | {spread} |")


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, take) in itertools.product(range(rounds), ways.items()):
        times[way].append(take())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="source rows (default: 4000)")
    parser.add_argument("--rounds", type=int, default=5, help="times each way is timed (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes beside one (default: 2)")
    options = parser.parse_args()
    many = options.workers
    with tempfile.TemporaryDirectory() as place:
        source = SourceConfig(dataset_id=str(many_rows(Path(place) / "rows.jsonl", options.rows)))
        reader = open_reader(source, load_tokenizer(str(MODEL)), InputLimits(49_152, None))
        ready: list[Aligned] = []
        shards_of(reader, AlignHere(reader), 1, ready.extend)
        aligned = {
            "this process": lambda: shards_of(reader, AlignHere(reader), 1, lambda _: None),
            "one process": lambda: shards_of(reader, AlignProcesses(reader, 1), 1, lambda _: None),
            f"{many} processes": lambda: shards_of(reader, AlignProcesses(reader, many), many, lambda _: None),
        }
        read = sum(len(one.input_ids) for one in ready)
        table("Rows in, aligned conversations out", read, in_turn(aligned, options.rounds))
        groups = [ready[i : i + CONVERSATIONS_A_BATCH] for i in range(0, len(ready), CONVERSATIONS_A_BATCH)]
        rng = np.random.default_rng(0)
        batches = [(group, distributions(sum(len(one.positions) for one in group), rng)) for group in groups]
        written = {
            "this process": lambda: encoded(batches, EncodeHere(), 1, Path(place)),
            "one process": lambda: encoded(batches, EncodeProcesses(1), 1, Path(place)),
            f"{many} processes": lambda: encoded(batches, EncodeProcesses(many), many, Path(place)),
        }
        extracted = sum(len(one.positions) for one in ready)
        table("Distributions in, shards out", extracted, in_turn(written, options.rounds))
        bench_launches(batches, options.rounds)


if __name__ == "__main__":
    main()
