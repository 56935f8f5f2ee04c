"""What rendering in a process of its own costs: the summary of 503 conversations, with it and without.

    python benchmarks/bench_rendering.py [--rounds 7]

A downloaded dataset's template is rendered where time and memory are limited. Each round summarizes the same dataset
both ways in turn; with it, that process begins anew. The model is a random one with SmolLM2's tokenizer, the data the
English construction questions (demo/fetch.py).
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from conftest import CONVERSATIONS, TEMPLATE, make_tiny_model  # noqa: E402

import extract_logits  # noqa: E402
from chat_logits.data import render_process, rendering, templates  # noqa: E402
from explore_logits import execute_summary  # noqa: E402


class Here:
    """Renders in this process."""

    render = staticmethod(rendering.render)

    @staticmethod
    def render_together(text: str, conversations: list, *arguments) -> list:
        return [rendering.render(text, conversation, *arguments) for conversation in conversations]


def seconds(dataset: Path, renders) -> float:
    render_process.render_process().close()
    with mock.patch.object(templates, "render_process", renders):
        started = time.perf_counter()
        execute_summary(str(dataset), quiet=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place, redirect_stderr(StringIO()):
        model, out = make_tiny_model(Path(place) / "model", vocab_size=49_152), Path(place) / "out"
        flags = ["--model_id", model, "--dataset_id", CONVERSATIONS, "--output_dir", out, "--chat_template", TEMPLATE]
        with redirect_stdout(StringIO()):
            assert extract_logits.main([*map(str, flags), "--device", "cpu"]) == 0
        ways = {"apart": render_process.render_process, "here": Here}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, renders in ways.items():
                times[name].append(seconds(out, renders))
    ratios = [apart / here for apart, here in zip(times["apart"], times["here"], strict=True)]
    for name, taken in times.items():
        print(f"{name:>6}: {statistics.median(taken):.2f} s")
    print(f" ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
