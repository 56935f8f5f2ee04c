"""Whether start-up grows with the dataset: one table of seconds and memory, each figure from a process of its own.

    python benchmarks/bench_scale.py [--rows 10000 1000000 10000000]

The sources are Parquet files of short chat rows, in a temporary folder that is deleted in the end, with the caches.
A measurement is a function of the source's folder and its rows, which returns {what: seconds}; ``MEASURED`` lists them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

FILE_ROWS, GROUP_ROWS = 250_000, 125_000
READ_ROWS = 256
MIB = 2**20


# --- sources ---


def make_source(folder: Path, rows: int) -> None:
    """Files of 250,000 rows in two row groups. Half of a row does not compress, so that sizes are those of texts."""
    import pyarrow.parquet as pq

    folder.mkdir()
    files = range(0, rows, FILE_ROWS)
    for number, first in enumerate(files):
        table = chat_table(first, min(FILE_ROWS, rows - first))
        path = folder / f"train-{number:05d}-of-{len(files):05d}.parquet"
        pq.write_table(table, path, row_group_size=GROUP_ROWS)


def chat_table(first: int, rows: int):
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    drawn = np.random.default_rng(first).integers(0, 2**63, (4, rows))
    noise = [pa.array(column).cast(pa.string()) for column in drawn]
    numbers = pa.array(range(first, first + rows)).cast(pa.string())
    question = pc.binary_join_element_wise("What comes after ", numbers, ", and how is it written in words?", "")
    answer = pc.binary_join_element_wise("After it comes its successor: add one, read it out, and note", *noise, " ")
    return pa.table({"question": question, "answer": answer})


# --- measurements, each in a process of its own ---


def timed(what: Callable, *arguments):
    begun = time.perf_counter()
    result = what(*arguments)
    return result, time.perf_counter() - begun


def read_places(source, rows: int, opening: float) -> dict[str, float]:
    """Seconds until the source is open, and for rows at its beginning, middle and end, each read for the first time."""
    seconds = {"open": opening}
    for place, first in (("first", 0), ("middle", rows // 2), ("last", rows - READ_ROWS)):
        found, seconds[place] = timed(source.read, first, first + READ_ROWS)
        assert [row["question"].split()[3] for row in found] == [f"{i}," for i in range(first, first + READ_ROWS)]
    return seconds


def streamed(folder: str, rows: int) -> dict[str, float]:
    from chat_logits.data.source import open_source

    source, opening = timed(lambda: open_source(folder, streaming=True))
    assert source.num_rows == rows
    return read_places(source, rows, opening)


def from_cache(folder: str, rows: int) -> dict[str, float]:
    from chat_logits.data.source import open_source

    source, opening = timed(open_source, folder)
    assert source.num_rows == rows
    return read_places(source, rows, opening)


MEASURED = {
    "streamed, first time": streamed,
    "streamed": streamed,
    "Arrow, first time": from_cache,
    "Arrow": from_cache,
}


def measure(name: str, folder: str, rows: int) -> dict:
    """Seconds; MiB at the peak (files mapped into memory among them), what of it came after the imports that a run has
    in any case, and what of that is the process's own at the end, not a file's.

    The peak is VmHWM, as ``ru_maxrss`` begins with that of the process which started this one.
    """
    import datasets
    import torch.utils.data

    from chat_logits.data import source as source_dataset

    _ = source_dataset, torch.utils.data
    datasets.disable_progress_bars()
    before, before_own = resident("VmRSS"), resident("RssAnon")
    seconds = MEASURED[name](folder, rows)
    peak = resident("VmHWM")
    return {"seconds": seconds, "peak": peak, "grown": peak - before, "own": resident("RssAnon") - before_own}


def resident(kind: str) -> float:
    """MiB of this process in memory."""
    return int(re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


# --- table ---


def in_own_process(name: str, folder: Path, rows: int, home: Path) -> dict:
    command = [sys.executable, __file__, "--measure", name, str(folder), str(rows)]
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench_source(folder: Path, rows: int, home: Path) -> None:
    from chat_logits.data.hashing import GRAIN

    _, making = timed(make_source, folder, rows)
    size = sum(file.stat().st_size for file in folder.iterdir()) / MIB
    print(f"\n### {rows:,} rows: {len(list(folder.iterdir()))} files, {size:,.0f} MiB, made in {making:.0f} s\n")
    print(f"| | opened, s | {READ_ROWS} rows at the beginning, s | middle | end | peak, MiB | after imports | own |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    time.sleep(GRAIN)  # files that were changed just now are hashed each time
    for name in MEASURED:
        found = in_own_process(name, folder, rows, home)
        seconds = " | ".join(f"{value:.3f}" for value in found["seconds"].values())
        memory = " | ".join(f"{found[key]:.0f}" for key in ("peak", "grown", "own"))
        print(f"| {name} | {seconds} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [10_000, 1_000_000, 10_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help=f"rows of each source (default: {sizes})")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "FOLDER", "ROWS"), help="one measurement, as JSON")
    options = parser.parse_args()
    if options.measure:
        name, folder, rows = options.measure
        print(json.dumps(measure(name, folder, int(rows))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        for rows in options.rows:
            bench_source(Path(temporary) / str(rows), rows, Path(temporary) / "home")


if __name__ == "__main__":
    main()
