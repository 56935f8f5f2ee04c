"""How fast examples are loaded: extracted tokens a second, from Arrow to packed batches of 32 conversations.

    python benchmarks/bench_loader.py [--dataset FOLDER] [--repeats 20] [--rounds 3]

Over 503 conversations, repeated: ``training_dataset`` in order and at random, with 1 and 2 workers, and streamed from
Parquet, where tokenizing is most of the work. Beside it the naive way, which aligns and decodes a row at a time as it
comes, and its ratio, as machines differ. Per core: by the CPU time of all processes; with workers, by the clock. The
model is a random one with SmolLM2's tokenizer, the data the English construction questions (demo/fetch.py).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from conftest import CONVERSATIONS, TEMPLATE, make_tiny_model  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import extract_logits  # noqa: E402
from chat_logits.analysis.opening import open_with_tokenizer  # noqa: E402
from chat_logits.data.render_process import render_process  # noqa: E402
from chat_logits.data.row_alignment import RowAligner  # noqa: E402
from chat_logits.storage.shard import SCHEMA  # noqa: E402
from chat_logits.training.collator import PackingCollator  # noqa: E402
from chat_logits.training.dataset import training_dataset  # noqa: E402
from logit_codec import decode_row  # noqa: E402

BATCH = 32
collate = PackingCollator()


def extracted(place: Path) -> Path:
    model, out = make_tiny_model(place / "model", vocab_size=49_152), place / "out"
    flags = ["--model_id", model, "--dataset_id", CONVERSATIONS, "--output_dir", out, "--chat_template", TEMPLATE]
    with redirect_stdout(StringIO()):
        assert extract_logits.main([*map(str, flags), "--device", "cpu"]) == 0
    return out


def naive(folder: Path, repeats: int) -> Iterator[dict]:
    """Batches of rows that are aligned and decoded alone, from an Arrow table in memory."""
    stored, tokenizer = open_with_tokenizer(str(folder))
    aligner, table = RowAligner(tokenizer, stored.manifest), pa.Table.from_pylist(list(stored.rows()), SCHEMA)
    for batch in orders(len(table), repeats, None):
        yield collate([naive_example(table.slice(i, 1).to_pylist()[0], aligner) for i in batch])


def naive_example(row: dict, aligner: RowAligner) -> dict:
    alignment, decoded = aligner.align(row), decode_row(row)
    positions, n = alignment.positions, row["num_tokens"]
    drawn = np.isfinite(decoded.sampled_log_probs)
    weights = np.concatenate(
        [np.zeros((n, 1)), np.exp(decoded.top_log_probs), drawn * (decoded.tail_mass / drawn.shape[1])[:, None]], axis=1
    )
    weights /= weights.sum(axis=1, keepdims=True)
    log_probs = np.concatenate([np.zeros((n, 1)), decoded.top_log_probs, decoded.sampled_log_probs], axis=1)
    told = -weights * np.where(weights > 0, log_probs, 0)
    tokens = zip(alignment.input_ids.tolist(), alignment.reasons, strict=True)
    labels = [token if reason is None else -100 for token, reason in tokens]
    return {
        "input_ids": alignment.input_ids,
        "labels": np.array(labels),
        "positions": positions,
        "target_ids": np.concatenate([np.zeros((n, 1), np.int32), decoded.top_ids, decoded.sampled_ids], axis=1),
        "target_weights": weights.astype(np.float32),
        "entropy": told.sum(axis=1).astype(np.float32),
        "tail_entropy": told[:, -drawn.shape[1] :].sum(axis=1).astype(np.float32),
        "num_sampled": drawn.shape[1],
    }


def orders(rows: int, repeats: int, seed: int | None) -> list[list[int]]:
    """Row numbers of each batch, in order or, with a seed, at random over all repeats."""
    numbers = np.tile(np.arange(rows), repeats)
    if seed is not None:
        np.random.default_rng(seed).shuffle(numbers)
    return [numbers[start : start + BATCH].tolist() for start in range(0, len(numbers), BATCH)]


def cpu_seconds() -> float:
    """Of this process and of the one that renders templates."""
    renderer = render_process()._process
    if renderer is None or not Path("/proc/self/stat").exists():
        return time.process_time()
    ticks = Path(f"/proc/{renderer.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return time.process_time() + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def rate(batches: Iterable[dict], clock) -> float:
    """Targets a second, the first batch, for which files are opened and workers begin, left out."""
    iterator = iter(batches)
    next(iterator)
    started = clock()
    tokens = sum(len(batch["predicting"]) for batch in iterator)
    return tokens / (clock() - started)


def streamed(stream: Iterable[dict], epochs: int) -> Iterator[dict]:
    for _ in range(epochs):
        yield from DataLoader(stream, BATCH, collate_fn=collate)


def ways(folder: Path, repeats: int, place: str) -> dict:
    """Each way's batches and clock, by its name."""
    dataset = training_dataset(folder, cache_dir=place, end_of_turn="skip")
    stream = training_dataset(folder, streaming=True, end_of_turn="skip")
    in_order, shuffled = orders(len(dataset), repeats, None), orders(len(dataset), repeats, 0)

    def loader(batches: list[list[int]], workers: int = 0) -> DataLoader:
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)

    few = max(1, repeats // 5)
    return {
        "naive, a core": (lambda: naive(folder, few), cpu_seconds),
        "in order, a core": (lambda: loader(in_order), cpu_seconds),
        "at random, a core": (lambda: loader(shuffled), cpu_seconds),
        "streamed, a core": (lambda: streamed(stream, few), cpu_seconds),
        "at random, 1 worker": (lambda: loader(shuffled, 1), time.perf_counter),
        "at random, 2 workers": (lambda: loader(shuffled, 2), time.perf_counter),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a run's folder, in place of one that is made")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tested = ways(options.dataset or extracted(Path(place)), options.repeats, place)
        rates: dict[str, list[float]] = {name: [] for name in tested}
        for _ in range(options.rounds):
            for name, (make, clock) in tested.items():
                rates[name].append(rate(make(), clock))
    for name, found in rates.items():
        ratio = statistics.median(one / base for one, base in zip(found, rates["naive, a core"], strict=True))
        print(f"{name:>20}: {statistics.median(found):9,.0f} tokens/s, {ratio:5.1f} of the naive way's")


if __name__ == "__main__":
    main()
