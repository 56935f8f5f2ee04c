"""What fewer bits cost: distance from the unquantised model, rows that depend on their batch, bytes and time, on a CPU.

    python benchmarks/bench_quantization.py [--conversations 16] [--dtype float32]

The model is SmolLM2-135M, the data the English construction questions (demo/fetch.py). KL is of the unquantised model
in the same dtype from each, a conversation alone; the last line is bitsandbytes' default, which is refused.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import MODEL, prepare  # noqa: E402

from chat_logits.errors import ToolkitError  # noqa: E402
from chat_logits.model import loading, probe, quantization  # noqa: E402

OUTLIERS = "bitsandbytes-8bit, threshold 6"
WAYS = (None, *quantization.METHODS, OUTLIERS)


def load(way: str | None, dtype: str):
    if way == OUTLIERS:
        quantization.METHODS[way] = {**quantization.METHODS["bitsandbytes-8bit"], "llm_int8_threshold": 6.0}
    return loading.load_model(str(MODEL), dtype=dtype, quantization=way)


@torch.inference_mode()
def batch_error(model) -> tuple[float, float]:
    """The most that a row of the start-up check differs in a padded batch: of the row's spread, and of its limit."""
    conversations = probe._conversations(model, probe.SHORT)
    expected = probe._reference_rows(model, conversations.all)
    tolerance = probe._tolerance(model, conversations.all[0], expected)
    differences = probe.row_differences(probe._rows(model, conversations, "padded"), expected)
    limits = (probe.row_limits(expected, *each) for each in ((1.0, torch.float32), (tolerance, model.dtype)))
    return tuple((differences / each).max().item() for each in limits)


@torch.inference_mode()
def log_probs(model, alignments) -> torch.Tensor:
    """Of the extracted tokens' positions, a conversation at a time."""
    rows = [model(torch.from_numpy(a.input_ids)[None], use_cache=False).logits[0, a.positions - 1] for a in alignments]
    return torch.cat(rows).float().log_softmax(dim=1)


def verdict(model) -> str:
    try:
        sharing = probe.probe_model(model)
    except ToolkitError as error:
        return "refused: " + str(error).split(":")[1].split(",")[0].strip()
    return f"{sharing.batch}{', prefixes cached' if sharing.prefix else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16, help="how many (default: 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    options = parser.parse_args()
    ready = [aligned.alignment for aligned in prepare(options.conversations).reader.align(0, options.conversations)[0]]
    tokens = sum(len(alignment.positions) for alignment in ready)
    print(f"{options.dtype}, {len(ready)} conversations, {tokens} extracted tokens\n")
    names = ("quantization", "MiB", "loaded, s", "tokens/s", "KL, nats", "top-1 the same")
    print(f"| {' | '.join(names)} | in a batch: of the spread, of the limit | may share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    plain = None
    for way in WAYS:
        started = time.perf_counter()
        model = load(way, options.dtype)
        loaded = time.perf_counter() - started
        log_probs(model, ready[:1])
        started = time.perf_counter()
        found = log_probs(model, ready)
        speed = sum(len(a.input_ids) for a in ready) / (time.perf_counter() - started)
        plain = found if plain is None else plain
        kl = (plain.exp() * (plain - found)).sum(dim=1).double().mean().item()
        same = (plain.argmax(dim=1) == found.argmax(dim=1)).double().mean().item()
        size = sum(map(quantization.stored_bytes, model.parameters())) / 2**20
        of_spread, of_limit = batch_error(model)
        figures = f"{size:,.0f} | {loaded:.1f} | {speed:,.0f} | {kl:.2g} | {same:.1%} | {of_spread:.1e}, {of_limit:.2g}"
        print(f"| {way or 'none'} | {figures} | {verdict(model)} |", flush=True)


if __name__ == "__main__":
    main()
