"""What extraction costs on a GPU, beside what the card could do at best: a table for RESULTS.md, within eight minutes.

    python benchmarks/bench_gpu.py TOKENIZER_FOLDER [--shapes 0.5B,8B] [--conversations 10000]

Random weights in real shapes and random words as conversations: speed and agreement need no trained model, and nothing
is downloaded. TOKENIZER_FOLDER has tokenizer.json, tokenizer_config.json and chat_template.jinja. Without a GPU a small
shape runs in place of them.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

from chat_logits.analysis import verification  # noqa: E402
from chat_logits.extraction import run as extraction_run  # noqa: E402
from chat_logits.extraction import run_description, shard_computer  # noqa: E402
from chat_logits.extraction.config import ExtractConfig  # noqa: E402
from chat_logits.extraction.folder import RunFolder  # noqa: E402
from chat_logits.extraction.shard_computer import ShardComputer  # noqa: E402
from chat_logits.model import loading, selection  # noqa: E402
from chat_logits.model.batch_plan import Budget, plan_batches  # noqa: E402
from chat_logits.model.batching import Batches, Sharing  # noqa: E402
from chat_logits.model.head import use_head_dtype  # noqa: E402
from chat_logits.model.memory import choose_budget, peak_memory  # noqa: E402
from chat_logits.model.probe import probe_model  # noqa: E402
from chat_logits.model.teacher import ATTENTION, nothing_packed  # noqa: E402
from chat_logits.storage.dataset import open_dataset  # noqa: E402
from chat_logits.storage.disk import DiskWatch  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPE = "bfloat16"
GIB = 2**30
SHAPES = {  # of Qwen2.5-0.5B, Llama-3.1-8B, and of nothing, for a CPU
    "0.5B": {"layers": 24, "hidden": 896, "intermediate": 4864, "heads": 14, "kv": 2, "vocab": 151_936, "tied": True},
    "8B": {"layers": 32, "hidden": 4096, "intermediate": 14_336, "heads": 32, "kv": 8, "vocab": 128_256, "tied": False},
    "small": {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv": 2, "vocab": 60_000, "tied": True},
}
WORDS = """the of and to in is that for it was on are as with they be at one have this from or had by hot but some what
there we can out other were all your when up use word how said an each she""".split()  # noqa: SIM905
KERNELS = [(256, 4), (256, 2), (512, 2), (512, 1)]  # other sizes of selection's kernels: entries a block, warps a row
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
START = time.monotonic()


def tell(*cells: object) -> None:
    """A row of the table, as it comes, with the seconds since the start in front."""
    print(f"| {time.monotonic() - START:.0f} | " + " | ".join(map(str, cells)) + " |", flush=True)


# --- models and conversations ---


def make_model(folder: Path, name: str, tokenizer: Path, keep_weights: bool):
    """A random model; its folder has weights only where commands are to load them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, DTYPE))
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    (model if keep_weights else config).save_pretrained(folder)
    for part in TOKENIZER_FILES:
        shutil.copy(tokenizer / part, folder)
    use_head_dtype(model, None)
    return model


def make_data(path: Path, rows: int) -> Path:
    """Conversations of 30 to some thousand words, the answer twice as long as the question."""
    rng = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(rng.choices(WORDS, k=5 + int(rng.lognormvariate(mean, 0.7))))

    with path.open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"prompt": text(4.5), "completion": text(5.2)}) + "\n")
    return path


@dataclass
class Bench:
    """A shape's model, loaded, and the conversations it is timed on."""

    folder: Path
    data: Path
    model: Any
    sharing: Sharing

    def open(self, conversations: int, **options):
        named: dict[str, Any] = {
            "model_id": str(self.folder),
            "dataset_id": str(self.data),
            "output_dir": "unused",
            "dtype": DTYPE,
        }
        return run_description.open_run(ExtractConfig(**named, max_samples=conversations, **options))

    def extract(self, opened, folder: Path) -> "Clock":
        """The command's run, loading aside, into the folder."""
        with RunFolder(folder) as run_folder:
            watch = DiskWatch(run_folder.path, opened.reader.num_rows)
            here = ShardComputer(opened, DEVICE, folder, model=self.model, sharing=self.sharing)
            run = extraction_run.Run(opened, run_folder, here, None, watch, time.monotonic())
            run.begin_or_resume(None)
            with mock.patch.object(shard_computer, "run_shards", Clock()) as clock:
                run.compute_missing()
            return clock


class Clock:
    """Of the shards: from the first batch to the last results on the host, and to the last file, in seconds."""

    def __init__(self):
        self._run_shards, self._encode = shard_computer.run_shards, shard_computer.encode
        self.results = self.files = 0.0

    def __call__(self, *arguments):
        started = time.perf_counter()

        def encode(encoding, members, pending):
            pending.wait()
            self.results = time.perf_counter() - started
            return self._encode(encoding, members, pending)

        with mock.patch.object(shard_computer, "encode", encode):
            self.files = seconds(lambda: self._run_shards(*arguments))


def seconds(way: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# --- what the card could do ---


def measure_card() -> tuple[float, float]:
    """Bytes a second of a copy, read and written; floating-point operations a second of a 16-bit product."""
    size = 8192 if CUDA else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30 // 4 if CUDA else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source))
    product = median(lambda: torch.mm(a, b))
    bandwidth, flops = 2 * source.nbytes / copy, 2 * size**3 / product
    tell("card", f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 products {flops / 1e12:.0f} TFLOP/s")
    return bandwidth, flops


def median(way: Callable[[], object], times: int = 10) -> float:
    way(), way()
    return statistics.median(seconds(way) for _ in range(times))


@contextmanager
def using(kernel: tuple[int, int] | None) -> Iterator[None]:
    """Selection's kernels with another block size and number of warps a row; as they are for None."""
    if kernel is None:
        yield
        return
    from chat_logits.model import selection_kernel  # Triton has no build for some platforms

    block, warps = kernel
    with mock.patch.multiple(selection_kernel, BLOCK=block, warps_for=lambda _: warps):
        yield


@torch.inference_mode()
def measure_parts(bench: Bench, bandwidth: float, kernels: Sequence[tuple[int, int] | None]) -> None:
    """lm_head and selection alone, for random and for peaked logits, with these sizes of its kernels."""
    head = bench.model.get_output_embeddings()
    rows = 4096 if CUDA else 64
    vocabulary, hidden = head.weight.shape
    states = torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    tokens = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    uniforms = torch.rand(rows, device=DEVICE, dtype=torch.float64)
    settings = selection.SelectionSettings(64, 0.98, 16)
    own = median(lambda: torch.nn.functional.linear(states, head.weight))
    tell("head", f"{rows} rows: {1e3 * own:.2f} ms in bfloat16, {1e3 * median(lambda: head(states)):.2f} ms as it is")
    for name, scale in (("flat", 1.0), ("peaked", 8.0)):  # all 64 entries of the nucleus are kept, and about 15
        logits = torch.randn(rows, vocabulary, device=DEVICE) * scale
        for given in (logits, logits.bfloat16()):
            needed = given.nbytes / bandwidth
            kind = str(given.dtype).removeprefix("torch.")
            for kernel in kernels:
                with using(kernel):
                    took = median(partial(selection.select, given, tokens, uniforms, settings))
                blocks = f", blocks of {kernel[0]}, {kernel[1]} warps" if kernel else ""
                tell("selection", f"{rows} rows, {name}, {kind}{blocks}: {1e3 * took:.2f} ms")
            tell("selection", f"one reading: {1e3 * needed:.2f} ms")


def bare_batches(ready: list, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Padded token ids of batches of like length, and the row and place of each hidden state that the lm_head gets."""
    lengths = [len(aligned.input_ids) for aligned in ready]
    batches = []
    for batch in plan_batches(lengths, [0] * len(ready), Budget(tokens, 1)):
        ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : lengths[index]] = torch.from_numpy(ready[index].input_ids)
        rows = np.repeat(np.arange(len(batch)), [len(ready[index].positions) for index in batch])
        places = np.concatenate([ready[index].positions - 1 for index in batch])
        made = (ids, torch.from_numpy(rows), torch.from_numpy(places))
        batches.append(tuple(part.pin_memory() if CUDA else part for part in made))
    return batches


@torch.inference_mode()
def bare_forward(model, batches: list) -> None:
    """Decoder over all tokens, lm_head on the answers' rows; nothing kept, and the host never waits."""
    for batch in batches:
        ids, rows, places = (part.to(DEVICE, non_blocking=True) for part in batch)
        with nothing_packed():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[rows, places]
        for piece in hidden.split(4096):
            model.lm_head(piece)


def measure_bare(bench: Bench, name: str, ready: list, tokens: int) -> float:
    """Seconds of the fastest pass: two with the attention kernels that PyTorch chooses, two with the extraction's."""
    batches = bare_batches(ready, tokens)
    read = sum(len(aligned.input_ids) for aligned in ready)
    found = {}
    for kernels, context in {"PyTorch's choice": nullcontext, "as extracted": lambda: sdpa_kernel(ATTENTION)}.items():
        with context():
            bare_forward(bench.model, batches[:4])
            found[kernels] = min(seconds(lambda: bare_forward(bench.model, batches)) for _ in range(2))
        tell(name, f"bare forward, attention: {kernels}", f"{read / found[kernels]:,.0f} tokens/s")
    return min(found.values())


# --- a shape ---


def bench_shape(bench: Bench, name: str, place: Path, conversations: int, flops: float) -> None:
    opened = bench.open(conversations)
    ready, _ = opened.reader.align(0, conversations)
    read, extracted = sum(len(a.input_ids) for a in ready), sum(len(a.positions) for a in ready)
    tell(name, f"{conversations} conversations, {read:,} tokens, {extracted:,} of them extracted")
    budget = choose_budget(bench.model, None, None)
    tell(name, f"batches of {budget.tokens:,} tokens, {budget.logit_rows:,} logit rows")
    bare = measure_bare(bench, name, ready, budget.tokens)
    decoder, head = bench.model.model.layers, bench.model.lm_head
    work = 2 * read * sum(weights.numel() for weights in decoder.parameters()) + 2 * extracted * head.weight.numel()
    tell(name, "bare forward, the faster", f"{work / bare / flops:.2f} of the card's products")
    ways: dict[str, dict] = {"extraction": {}}
    if CUDA:
        ways["extraction, 256 rows a shard"] = {"rows_per_shard": 256}
    else:  # beside an accelerator, where it takes more of them, so short a prefix is not cached
        ways |= {"extraction, no prefix cache": {"prefix_cache": False}, "two workers": {"num_cpu_workers": 2}}
    bench.extract(bench.open(min(conversations, 256)), place / f"{name}-warm")
    for way, options in ways.items():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if CUDA else 0
        clock = bench.extract(bench.open(conversations, **options), place / f"{name}-{way}")
        for end, took in (("last results", clock.results), ("last file", clock.files)):
            tell(name, f"{way}, to the {end}", f"{read / took:,.0f} tokens/s", f"{bare / took:.2f} of the bare forward")
        if CUDA:
            peak, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_reserved()
            longest = max(len(aligned.input_ids) for aligned in ready)
            formula = peak_memory(bench.model, budget, longest, budget.logit_rows, options.get("prefix_cache", True))
            tell(name, way, f"peak {peak / GIB:.2f} GiB, formula {formula / GIB:.2f}, reserved {reserved / GIB:.2f}")
    bench_model_thread(bench, name, opened, ready, read, bare)


def bench_model_thread(bench: Bench, name: str, opened, ready: list, read: int, bare: float) -> None:
    """The batches alone, their results awaited and dropped: what is left of the time is the host's."""
    manifest = run_description.describe_with_model(opened, bench.model, **_budget(bench.model))

    def go() -> None:
        waiting: deque = deque()
        for start in range(0, len(ready), manifest.rows_per_shard):
            for _, pending in batches.compute(ready[start : start + manifest.rows_per_shard]):
                waiting.append(pending)
                if len(waiting) > 2:
                    waiting.popleft().wait()

    batches = Batches(bench.model, manifest, bench.sharing)
    took = seconds(go)
    tell(
        name, "batches alone, nothing encoded", f"{read / took:,.0f} tokens/s", f"{bare / took:.2f} of the bare forward"
    )


def bench_compiled(bench: Bench, name: str, conversations: int) -> None:
    """The batches again, each decoder layer compiled for any shape; the first pass compiles."""
    opened = bench.open(conversations)
    ready, _ = opened.reader.align(0, conversations)
    read = sum(len(aligned.input_ids) for aligned in ready)
    batches = bare_batches(ready, choose_budget(bench.model, None, None).tokens)
    with sdpa_kernel(ATTENTION):
        bare = min(seconds(lambda: bare_forward(bench.model, batches)) for _ in range(2))
    for layer in bench.model.model.layers:
        layer.compile(dynamic=True)
    for _ in range(3):
        bench_model_thread(bench, f"{name}, layers compiled", opened, ready, read, bare)


def _budget(model) -> dict:
    budget = choose_budget(model, None, None)
    return {"batch_tokens": budget.tokens, "batch_logit_rows": budget.logit_rows, "prefix_cache": False}


def verify(bench: Bench, name: str, folder: Path) -> None:
    dataset = open_dataset(str(folder))
    tokenizer = bench.open(1).reader.aligner.tokenizer
    result = verification.check_rows(dataset, bench.model, tokenizer, verification.spread(dataset.num_rows, 16))
    figures = ", ".join(f"{key} {value:.2g}" for key, value in result.figures.items())
    tell(name, "--verify, 16 conversations", "holds" if result.holds else "; ".join(result.causes)[:300], figures)


@torch.inference_mode()
def agreement(bench: Bench, name: str, dtype: str) -> None:
    """Target tokens' log-probabilities in batches against a conversation at a time, of the same model."""
    model = loading.load_model(str(bench.folder), dtype=dtype, device=DEVICE)
    opened = bench.open(64)
    ready, _ = opened.reader.align(0, 64)
    manifest = run_description.describe_with_model(opened, model, **_budget(model))
    errors = []
    for members, pending in Batches(model, manifest, bench.sharing).compute(ready):
        assert pending
        found, start = pending.wait().token_log_probs, 0
        for aligned in members:
            logits = model(torch.from_numpy(aligned.input_ids)[None].to(DEVICE)).logits[0, aligned.positions - 1]
            tokens = torch.from_numpy(aligned.input_ids[aligned.positions]).to(DEVICE)
            alone = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu().numpy()
            errors.append(np.abs(found[start : start + len(alone)] - alone))
            start += len(alone)
    error = np.concatenate(errors)
    tell(name, f"{dtype}, against one at a time", f"at most {error.max():.2g} nats, {error.mean():.2g} in the mean")


# --- the command, stopped and short of memory ---


def command(bench: Bench, folder: Path, *options: object) -> list[str]:
    named = ["--model_id", bench.folder, "--dataset_id", bench.data, "--output_dir", folder, "--device", DEVICE]
    return [sys.executable, str(REPO / "extract_logits.py"), *map(str, (*named, *options))]


def stopped_and_resumed(bench: Bench, name: str, folder: Path, conversations: int) -> None:
    options = ("--max_samples", conversations, "--rows_per_shard", max(1, conversations // 32))
    first = subprocess.Popen(command(bench, folder, *options), stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("data/*/*.parquet")) and first.poll() is None:
        time.sleep(0.05)
    asked = time.monotonic()
    first.send_signal(signal.SIGTERM)
    first.communicate()
    stopped, done = time.monotonic() - asked, len(list(folder.glob("data/*/*.parquet")))
    again = subprocess.run(command(bench, folder, *options), capture_output=True, text=True)
    rows = open_dataset(str(folder)).num_rows if again.returncode == 0 else again.stderr[-300:]
    tell(name, f"SIGTERM: status {first.returncode} after {stopped:.2f} s, {done} shards", f"resumed: {rows} rows")


def short_of_memory(bench: Bench, name: str, folder: Path) -> None:
    """Batches that the card has no room for beside what this process holds."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - 6 * GIB), dtype=torch.uint8, device=DEVICE)
    options = ("--max_samples", 512, "--batch_tokens", 131_072, "--logit_memory", 20_000)
    done = subprocess.run(command(bench, folder, *options), capture_output=True, text=True)
    smaller = [line.strip() for line in done.stderr.splitlines() if "Out of memory" in line]
    rows = open_dataset(str(folder)).num_rows if done.returncode == 0 else done.stderr[-300:]
    tell(name, f"6 GiB free of {held.nbytes / GIB:.0f}", f"status {done.returncode}, {rows} rows", smaller[-1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder with " + ", ".join(TOKENIZER_FILES))
    parser.add_argument(
        "--shapes", default="0.5B,8B" if CUDA else "small", help="which (default: both; small on a CPU)"
    )
    parser.add_argument("--conversations", type=int, default=10_000 if CUDA else 24, help="of the first shape")
    parser.add_argument("--kernels", action="store_true", help="selection with other sizes of its kernels, too (GPU)")
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{card}, torch {torch.__version__}\n\n| s | what | | |\n| --- | --- | --- | --- |")
    bandwidth, flops = measure_card()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        data, first = make_data(place / "data.jsonl", options.conversations), None
        for number, name in enumerate(options.shapes.split(",")):
            model = make_model(place / name, name, options.tokenizer, number == 0)
            bench = Bench(place / name, data, model, probe_model(model))
            first = first or bench
            tell(name, "model loaded", bench.sharing)
            measure_parts(bench, bandwidth, [None, *KERNELS] if options.kernels and CUDA else [None])
            bench_shape(bench, name, place, options.conversations // (10 if number else 1), flops)
            verify(bench, name, place / f"{name}-extraction")
            del bench, model
            if CUDA:
                torch.cuda.empty_cache()
        assert first
        name = options.shapes.split(",")[0]
        for dtype in ("float32", DTYPE):
            agreement(first, name, dtype)
        stopped_and_resumed(first, name, place / "stopped", min(512, options.conversations))
        if CUDA:
            short_of_memory(first, name, place / "short")
        bench_compiled(first, name, max(1, options.conversations // 3))


if __name__ == "__main__":
    main()
