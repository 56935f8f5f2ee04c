"""One table of what extraction costs, as ratios within one run.

    python benchmarks/bench.py [--conversations 503] [--rounds 3]

The model is SmolLM2-135M in float32, the data the English construction questions (demo/fetch.py). Each round times
every way once, in turn, so that a machine that slows down slows all of them; the table gives medians and the spread.
"""

import argparse
import functools
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import logit_codec  # noqa: E402
from chat_logits.extraction import run as extraction_run  # noqa: E402
from chat_logits.extraction import run_description  # noqa: E402
from chat_logits.extraction.config import ExtractConfig  # noqa: E402
from chat_logits.extraction.folder import RunFolder  # noqa: E402
from chat_logits.extraction.shard_computer import ShardComputer  # noqa: E402
from chat_logits.model import loading, teacher  # noqa: E402
from chat_logits.model import selection as token_selection  # noqa: E402
from chat_logits.model.memory import MIB, choose_budget, peak_memory  # noqa: E402
from chat_logits.model.probe import probe_model  # noqa: E402
from chat_logits.storage.disk import DiskWatch  # noqa: E402
from chat_logits.storage.shard import SCHEMA  # noqa: E402

MODEL = REPO / ".cache" / "smollm2-135m-instruct"
DATA = REPO / ".cache" / "zaragoza" / "faq-en-sharegpt.jsonl"
LONG_SYSTEM = "You are a careful adviser on Swedish building law who answers in plain words. " * 21  # 300 tokens
SETTINGS = {"K=64 S=16 p=0.98": (64, 16, 0.98), "K=32 S=8 p=0.95": (32, 8, 0.95), "K=128 S=32 p=0.99": (128, 32, 0.99)}


def prepare(conversations: int, system_prompt: str | None = None):
    """The first conversations, opened as the command opens them."""
    named: dict[str, Any] = {
        "model_id": MODEL,
        "dataset_id": DATA,
        "output_dir": "unused",
        "system_prompt": system_prompt,
    }
    return run_description.open_run(ExtractConfig(**named, max_samples=conversations))


# --- ways to do it ---


@torch.inference_mode()
def plain_loop(model, ready) -> None:
    """The same results as anybody would first get them: a conversation at a time, full logits, top K, draws."""
    for aligned in ready:
        log_probs = model(torch.from_numpy(aligned.input_ids)[None]).logits[0].log_softmax(-1)[aligned.positions - 1]
        top = log_probs.topk(64)
        torch.multinomial(log_probs.exp().scatter(1, top.indices, 0), 16, replacement=True)


@torch.inference_mode()
def bare_forward(model, ready) -> None:
    """The decoder on batches of eight of like length, the vocabulary matrix on response positions; nothing kept."""
    ordered = sorted(ready, key=lambda aligned: -len(aligned.input_ids))
    for start in range(0, len(ordered), 8):
        batch = ordered[start : start + 8]
        ids = torch.zeros(len(batch), len(batch[0].input_ids), dtype=torch.long)
        for row, aligned in zip(ids, batch, strict=True):
            row[: len(aligned.input_ids)] = torch.from_numpy(aligned.input_ids)
        mask = torch.stack([torch.arange(ids.shape[1]) < len(aligned.input_ids) for aligned in batch])
        hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        model.lm_head(torch.cat([hidden[i, aligned.positions - 1] for i, aligned in enumerate(batch)]))


probed = functools.cache(probe_model)  # the check at start-up, some thirty short passes, goes with loading


def extraction(model, opened, prefix_cache: bool) -> int:
    """The command's run, model loading aside, into a temporary folder; gives the bytes written."""
    with tempfile.TemporaryDirectory() as place, RunFolder(Path(place) / "run") as folder:
        watch = DiskWatch(folder.path, opened.reader.num_rows)
        here = ShardComputer(opened, model.device, folder.path, model=model)
        here.sharing = replace(probed(model), prefix=prefix_cache)
        run = extraction_run.Run(opened, folder, here, None, watch, time.monotonic())
        run.begin_or_resume(None)
        run.compute_missing()
        return sum(entry.num_bytes for entry in folder.entries.values())


def seconds(way, *arguments) -> float:
    start = time.perf_counter()
    way(*arguments)
    return time.perf_counter() - start


class SelectionClock:
    """Adds up the time spent in selection while it is in place."""

    def __init__(self):
        self.seconds, self._select = 0.0, token_selection.select

    def __call__(self, *arguments):
        start = time.perf_counter()
        try:
            return self._select(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


# --- tables ---


def bench_extraction(model, conversations: int, rounds: int, system_prompt: str | None) -> None:
    opened = prepare(conversations, system_prompt)
    ready, _ = opened.reader.align(0, conversations)
    tokens = sum(len(aligned.input_ids) for aligned in ready)
    times: dict[str, list[float]] = {}
    share = []
    for _ in range(rounds):
        times.setdefault("bare forward", []).append(seconds(bare_forward, model, ready))
        if not system_prompt:
            times.setdefault("plain loop", []).append(seconds(plain_loop, model, ready))
            with mock.patch.object(teacher, "select", SelectionClock()) as clock:
                times.setdefault("extraction", []).append(seconds(extraction, model, opened, False))
            share.append(clock.seconds / times["extraction"][-1])
        cached = seconds(extraction, model, opened, True)
        times.setdefault("extraction, shared prefixes once", []).append(cached)
    title = "with a system prompt of 300 tokens" if system_prompt else "as they are"
    print(f"\n### {len(ready)} conversations {title}, {tokens:,} tokens, {rounds} rounds\n")
    print("| way | tokens a second | of the bare forward | spread |\n| --- | --- | --- | --- |")
    for name, found in times.items():
        ratios = [bare / mine for bare, mine in zip(times["bare forward"], found, strict=True)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {name} | {tokens / statistics.median(found):,.0f} | {statistics.median(ratios):.2f} | {spread} |")
    if share:
        print(f"\nSelection takes {100 * statistics.median(share):.1f}% of the extraction's time.")


@torch.inference_mode()
def bench_wide_selection(model) -> None:
    """Selection against the decoder and head of a model of SmolLM2's size with 151,936 rows."""
    rows, hidden = 256, model.config.hidden_size
    head = torch.randn(151_936, hidden) * 0.05
    states, ids = torch.randn(rows, hidden), torch.randint(0, 49_000, (4, 110))
    tokens, uniforms = torch.zeros(rows, dtype=torch.long), torch.rand(rows, dtype=torch.float64)
    settings = token_selection.SelectionSettings(64, 0.98, 16)
    logits = torch.empty(rows, len(head))
    decoder = statistics.median(seconds(lambda: model.model(input_ids=ids, use_cache=False)) for _ in range(5))
    matrix = statistics.median(seconds(lambda: torch.mm(states, head.T, out=logits)) for _ in range(5))
    found = []
    for _ in range(5):
        torch.mm(states, head.T, out=logits)
        found.append(seconds(token_selection.select, logits, tokens, uniforms, settings))
    share = statistics.median(found) / (statistics.median(found) + decoder + matrix)
    print(f"With a vocabulary of 151,936 rows, {rows} of 440 tokens extracted, it takes {100 * share:.1f}%.")


def bench_memory(conversations: int) -> None:
    """Peak memory over the model's own, in a process that does nothing else, against the formula."""
    command = [sys.executable, __file__, "--conversations", str(conversations), "--memory"]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(model, conversations: int) -> None:
    opened = prepare(conversations)
    ready, _ = opened.reader.align(0, conversations)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    extraction(model, opened, True)
    # Not ru_maxrss: a process begins with its parent's.
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 - before
    budget = choose_budget(model, None, None)
    longest = max(len(aligned.input_ids) for aligned in ready)
    formula = peak_memory(model, budget, longest, budget.logit_rows, True)
    print(
        f"\nPeak memory over the model's own: {peak / MIB:,.0f} MiB; the formula says at most {formula / MIB:,.0f} MiB."
    )


def true_log_probs(model, reader, conversations: int) -> tuple[np.ndarray, list[int]]:
    """Float64 log-probabilities (n, V) of real positions, and the rows' lengths."""
    ready, _ = reader.align(0, conversations)
    with torch.inference_mode():
        found = [
            model(torch.from_numpy(a.input_ids)[None]).logits[0, a.positions - 1].double().log_softmax(-1)
            for a in ready
        ]
    return torch.cat(found).numpy(), [len(a.positions) for a in ready]


def kl(truth: np.ndarray, decoded: np.ndarray) -> float:
    """Mean KL over the nucleus and one bucket for the rest (FORMAT.md's measure), nats; probabilities (n, K)."""
    p = np.column_stack([truth, np.maximum(1 - truth.sum(1), 1e-300)])
    q = np.column_stack([decoded, np.maximum(1 - decoded.sum(1), 1e-9)])
    q /= q.sum(1, keepdims=True)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0)
    return float(terms.sum(1).mean())


def plain_codings(log_probs: np.ndarray) -> dict[str, np.ndarray]:
    """The same log-probabilities through other stores: linear uint8 over 32 nats, bfloat16, float16."""
    tensor = torch.from_numpy(log_probs)
    return {
        "uint8, linear over 32 nats": -32 * np.round(np.clip(-log_probs / 32, 0, 1) * 255) / 255,
        "bfloat16": tensor.bfloat16().double().numpy(),
        "float16": tensor.half().double().numpy(),
    }


def bytes_a_token(columns: dict, positions: int, folder: str) -> float:
    """A plain Parquet file of the columns, Zstandard, per position."""
    path = Path(folder) / "plain.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    return path.stat().st_size / positions


def bench_codec(model, conversations: int) -> None:
    opened = prepare(conversations)
    truth, lengths = true_log_probs(model, opened.reader, conversations)
    print(f"\n### Size and loss on {len(truth):,} positions\n")
    print("| settings | coding | bytes a token | mean KL, nats |\n| --- | --- | --- | --- |")
    for name, (top_k, num_sampled, top_p) in SETTINGS.items():
        changed = {"top_k": top_k, "num_sampled": num_sampled, "top_p": top_p}
        described = replace(opened.described, **changed)
        opened = replace(opened, config=replace(opened.config, **changed), described=described)
        stored_bytes = extraction(model, opened, True)
        top_ids = np.argsort(-truth, axis=1)[:, :top_k]
        kept_log_probs = np.take_along_axis(truth, top_ids, 1)
        kept = logit_codec.nucleus_cut(np.exp(kept_log_probs), top_p)
        probabilities = np.exp(kept_log_probs) * kept
        codes = logit_codec.carried_codes(probabilities, kept)
        size, loss = stored_bytes / len(truth), kl(probabilities, logit_codec.CODE_PROBS[codes])
        print(f"| {name} | **this format** | **{size:.0f}** | **{loss:.1e}** |")
        entries = kept.sum() + len(truth) * num_sampled
        ids = np.resize(top_ids[kept], entries).astype(np.int32)
        for coding, decoded in plain_codings(kept_log_probs).items():
            width = np.uint8 if coding.startswith("uint8") else np.float16
            values = np.resize(kept_log_probs[kept], entries)
            values = np.clip(-values * 8, 0, 255).astype(width) if width is np.uint8 else values.astype(width)
            with tempfile.TemporaryDirectory() as folder:
                stored = bytes_a_token({"ids": ids, "values": values}, len(truth), folder)
            print(f"| {name} | {coding}, int32 ids | {stored:.0f} | {kl(probabilities, np.exp(decoded) * kept):.1e} |")
    bench_codec_speed(truth, lengths)


def bench_codec_speed(truth: np.ndarray, lengths: list[int]) -> None:
    """Encoding and decoding on one core, K = 64 and S = 16."""
    n = len(truth)
    top_ids = np.argsort(-truth, axis=1)[:, :64]
    probabilities = np.exp(np.take_along_axis(truth, top_ids, 1))
    kept = logit_codec.nucleus_cut(probabilities, 0.98)
    tail = np.sort(np.random.default_rng(0).integers(0, truth.shape[1], (n, 16)), axis=1)
    found = logit_codec.Distributions(
        np.where(kept, top_ids, -1), probabilities * kept, tail, np.full((n, 16), 1e-4), np.zeros(n), np.zeros(n)
    )
    encode = statistics.median(seconds(logit_codec.encode_rows, found, lengths, found.top_ids[:, 0]) for _ in range(5))
    rows = [
        {**row, "messages": [], "source_index": i, "alignment_checksum": 0}
        for i, row in enumerate(logit_codec.encode_rows(found, lengths, found.top_ids[:, 0]))
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = {
        name: table[name].to_numpy() if name.endswith("low") else table[name].to_pylist() for name in table.schema.names
    }
    arrow_rows = [{name: values[i] for name, values in columns.items()} for i in range(len(table))]
    decode = statistics.median(seconds(lambda: [logit_codec.decode_row(row) for row in arrow_rows]) for _ in range(5))
    loaded = max(table.to_pylist(), key=lambda row: row["num_tokens"])
    times = [seconds(logit_codec.dequantize_all_logits, loaded, i) for i in range(loaded["num_tokens"])]
    print(f"\nEncoding {n / encode:,.0f} and decoding {n / decode:,.0f} tokens a second on one core; one position of a")
    print(f"loaded row of {loaded['num_tokens']} tokens in {1e6 * statistics.median(times):.0f} µs.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=503, help="how many (default: all 503)")
    parser.add_argument("--rounds", type=int, default=3, help="times each way is timed (default: 3)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory alone (default: off)")
    options = parser.parse_args()
    model = loading.load_model(str(MODEL))
    seconds(bare_forward, model, prepare(8).reader.align(0, 8)[0])  # warm, and the weights read from the disk
    if options.memory:
        measure_memory(model, options.conversations)
        return
    bench_extraction(model, options.conversations, options.rounds, None)
    bench_wide_selection(model)
    bench_memory(min(96, options.conversations))
    bench_extraction(model, min(96, options.conversations), options.rounds, LONG_SYSTEM)
    bench_codec(model, min(32, options.conversations))


if __name__ == "__main__":
    main()
