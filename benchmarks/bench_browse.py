"""What browsing costs: the first list beside a bare page, sorting and searching, memory, a million rows, a Hub's bytes.

    python benchmarks/bench_browse.py [--rows 10000] [--million 1000000] [--rounds 5]

The rows are a tiny model's, repeated with other questions, in shards of 256; the command runs in a process
of its own. The million rows are numbers alone, in this process. The Hub is one on loopback. Needs Chromium.
"""

import argparse
import html
import http.client
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "support")]
os.environ["HF_HUB_DISABLE_XET"] = "1"

from loopback_hub import LoopbackHub  # noqa: E402
from many_rows import extracted_rows, numbers_alone, repeated  # noqa: E402

from chat_logits.browse.index import NUMBERS, Clock, Index  # noqa: E402
from chat_logits.browse.view import Range, View  # noqa: E402
from chat_logits.storage.footer import read_footer, row_group_sizes  # noqa: E402

DRAWN = "() => new Promise(resolve => requestAnimationFrame(() => setTimeout(() => resolve(performance.now()))))"
LOADS = 7  # of each page in a round
VIEWS = {
    "sort": "/view?sort=mean_nll&down=1",
    "sort by text": "/view?sort=question",
    "search": "/view?q=It+is+good",
    "filter and sort": "/view?mean_nll=8..10&sort=num_tokens&down=1&page=2",
    "condition": "/view?where=perplexity+%3E+3000+and+num_tokens+%3C+60",
}


@contextmanager
def browsing(folder: str, env: dict | None = None):
    """The command in a process of its own: its port and its process."""
    command = [sys.executable, str(REPO / "explore_logits.py"), folder, "--browse", "--no_open", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        yield int(re.search(r":(\d+)/", line)[1]), process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def asked(port: int, path: str):
    """An answer's text, and what the server says that DuckDB and the rest took, in milliseconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return text, [float(part) for part in re.findall(r"dur=([\d.]+)", answer.headers.get("server-timing", ""))]


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1000


def ready(port: int) -> None:
    """Wait until the messages have been read, and the summary, which would take the processor."""
    while "data-wait" in asked(port, "/view?q=a")[0] or 'data-wait aria-label="Where' in asked(port, "/losses")[0]:
        time.sleep(0.5)


def bare_page(page) -> str:
    """The lines of the list as a bare page."""
    rows = page.evaluate(
        "[...document.querySelectorAll('tr[data-row]')].map(r => [...r.cells].map(c => c.textContent.trim()))"
    )
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<!doctype html><meta charset=utf-8><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def first_list(port: int, rounds: int) -> None:
    """From the navigation to the drawn list, with the answer's way; the bare page comes from a server of files.

    In each round both are loaded ``LOADS`` times in turn: the rounds' medians say how much the machine's other work
    adds to them.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#view[data-lines=all]")
        (Path(folder) / "bare.html").write_text(bare_page(page), encoding="utf-8")
        files = subprocess.Popen(
            [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        bare = int(re.search(r"port (\d+)", files.stdout.readline())[1])
        places = {"list": f"http://127.0.0.1:{port}/", "bare": f"http://127.0.0.1:{bare}/bare.html"}
        medians = [[statistics.median(each) for each in _drawn(page, places)] for _ in range(rounds + 1)][1:]
        files.kill()
        browser.close()
    ratios = sorted(ours / theirs for ours, theirs in medians)
    ours, theirs = (statistics.median(column) for column in zip(*medians, strict=True))
    told = f"{statistics.median(ratios):.2f} times, median of {rounds} rounds ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"| first list: 50 lines drawn | {ours:.0f} ms; bare {theirs:.0f} ms | {told} |")


def _drawn(page, places: dict[str, str]):
    """Milliseconds of each load, of each place."""
    times = []
    for _ in range(LOADS):
        for address in places.values():
            page.goto(address, wait_until="commit")
            times.append(page.evaluate(DRAWN))
    return [times[i :: len(places)] for i in range(len(places))]


def ten_thousand(folder: Path, rounds: int) -> None:
    with browsing(str(folder)) as (port, process):
        ready(port)
        for name, path in VIEWS.items():
            spent = [asked(port, path)[1] for _ in range(rounds)]
            duckdb, own = (statistics.median(column) for column in zip(*spent, strict=True))
            print(f"| {name} | DuckDB {duckdb:.0f} ms, the rest {own:.0f} ms | first {sum(spent[0]):.0f} ms |")
        first_list(port, rounds)
        print(f"| memory of the server, the summary's pass included | {peak_mb(process.pid):.0f} MB | |")


def million(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index, table, start = Index(Path(folder)), numbers_alone(count), time.perf_counter()
        for first in range(0, count, 10_000):
            index.add_numbers(first, table.slice(first, 10_000))
        print(f"| {count:,} rows into the index | {time.perf_counter() - start:.1f} s | |")
        for view in (
            View(sort="mean_nll", down=True),
            View(ranges={"mean_nll": Range(2, 3)}, sort="top1_rate", page=9),
        ):
            start = time.perf_counter()
            index.totals(view, Clock())
            index.page(view, Clock())
            for name in ("mean_nll", "mean_entropy", "num_tokens"):
                index.histogram(name, view, Clock())
            print(f"| list and histograms of {view.query()} | {time.perf_counter() - start:.2f} s | |")
        index.close()


def from_hub(folder: Path) -> None:
    """The front page of a dataset on the Hub: which bytes of its shards are fetched."""
    shards = sorted(folder.glob("data/*/*.parquet"))
    footers = [read_footer(shard) for shard in shards]
    groups = [group for footer in footers for group in row_group_sizes(footer)]
    columns = sum(column.stored for group in groups for column in group.columns if column.name in NUMBERS)
    whole, of_footers = sum(shard.stat().st_size for shard in shards), sum(map(len, footers))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as home:
        hub.add_repo("dataset", "user/many", files=files)
        with browsing("user/many", hub.environment(home)) as (port, _):
            asked(port, "/")
            fetched = sum(request.sent for request in hub.requests if ".parquet" in request.path)
            asked(port, "/lines?rows=" + ",".join(map(str, range(50))))
            lines = sum(request.sent for request in hub.requests if ".parquet" in request.path) - fetched
    print(f"| front page of {len(shards)} shards, {whole:,} bytes, on a Hub | {fetched:,} bytes fetched | columns "
          f"{columns:,}, footers {of_footers:,} |")  # fmt: skip
    print(f"| questions, sparklines and tokens of the 50 rows in sight | {lines:,} bytes fetched | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="conversations (default: 10,000)")
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of numbers alone (default: 1,000,000)")
    parser.add_argument("--rounds", type=int, default=5, help="times each is done (default: 5)")
    options = parser.parse_args()
    print("| what | | |\n| --- | --- | --- |")
    million(options.million)
    with tempfile.TemporaryDirectory() as place:
        source, model = extracted_rows(Path(place))
        folder = repeated(source, Path(place) / "many", options.rows, model, rows_per_shard=256)
        ten_thousand(folder, options.rounds)
        from_hub(folder)


if __name__ == "__main__":
    main()
