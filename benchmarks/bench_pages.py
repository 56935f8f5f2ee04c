"""How long a page takes from its opening to its first interaction, beside the same text as a bare page.

    python benchmarks/bench_pages.py [--rounds 5]

Chromium opens the page of an answer of 1,000, 4,000 and 16,000 tokens from the disk, and the pointer is put on the
first token; the clock stops when its predictions are drawn. The model is a random one, the tokenizer SmolLM2's.
"""

import argparse
import html
import json
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "support")]

from conftest import TEMPLATE, make_tiny_model  # noqa: E402

import extract_logits  # noqa: E402
from explore_logits import execute_analysis  # noqa: E402

SENTENCE = "The quick brown fox jumps over the lazy dog, 1234 times; then it sleeps.\n"  # 23 tokens
LENGTHS = (1_000, 4_000, 16_000)
# Resolves when the token that the pointer is on has its panel, after the frame in which it is drawn.
FIRST_INTERACTION = """() => new Promise(resolve => {
    document.querySelector('.assistant [data-i]').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
})"""
DRAWN = "() => new Promise(resolve => requestAnimationFrame(() => setTimeout(() => resolve(performance.now()))))"


def analysed(folder: Path, model: Path, tokens: int):
    """The analysis of an answer of about so many tokens, and its text."""
    answer = SENTENCE * (tokens // 23)
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]
    source = folder / f"{tokens}.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    flags = ["--model_id", model, "--dataset_id", source, "--output_dir", folder / str(tokens)]
    with redirect_stdout(sys.stderr):
        assert extract_logits.main([*map(str, flags), "--chat_template", str(TEMPLATE)]) == 0
    return execute_analysis(str(folder / str(tokens)), quiet=True), answer


def milliseconds(browser, file: Path, script: str) -> float:
    """From the start of the navigation, by the page's own clock."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(file.as_uri())
    taken = page.evaluate(script)
    page.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each page is opened (default: 5)")
    rounds = parser.parse_args().rounds
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder, browser = Path(place), playwright.chromium.launch(executable_path=found)
        model = make_tiny_model(folder / "model", vocab_size=49_152, max_position_embeddings=32_768)
        print(
            "| tokens | page | made in | first interaction | bare text | ratio |\n| --- | --- | --- | --- | --- | --- |"
        )
        for tokens in LENGTHS:
            analysis, text = analysed(folder, model, tokens)
            start = time.perf_counter()
            page, bare = folder / "page.html", folder / "bare.html"
            page.write_text(analysis.to_html(), encoding="utf-8")
            made = time.perf_counter() - start
            bare.write_text(f"<!doctype html><meta charset=utf-8><pre>{html.escape(text)}</pre>", encoding="utf-8")
            times = [
                (milliseconds(browser, page, FIRST_INTERACTION), milliseconds(browser, bare, DRAWN))
                for _ in range(rounds)
            ]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            size = page.stat().st_size / 1e6
            print(
                f"| {analysis.totals.num_tokens:,} | {size:.1f} MB | {made:.2f} s | {ours:.0f} ms | {theirs:.0f} ms "
                f"| {ours / theirs:.1f} |"
            )


if __name__ == "__main__":
    main()
