"""What the process that gives out shards needs to begin a run of millions of rows, and to resume with it.

    python benchmarks/bench_resume.py [--rows 10000 10000000] [--shards 10000]

Each figure is from a process of its own: options, source, template and folder, up to the number of the first shard to
compute. The source is that of bench_scale.py, streamed. Finished shards hold one conversation each and skip the others
(none is computed here), so that 10,000 of them fit; ``--check_shards`` reads them nevertheless, for comparison.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from bench_scale import MIB, REPO, make_source, resident, timed

MODEL = REPO / ".cache" / "smollm2-135m-instruct"
ROWS_PER_SHARD = 256


def make_model(folder: Path) -> None:
    """A model of no size with SmolLM2's tokenizer: its loading is not what is measured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49_152, num_hidden_layers=1, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)


def config_for(place: Path, rows: int, **more):
    from chat_logits.extraction.config import ExtractConfig

    named: dict[str, Any] = {
        "model_id": place / "model",
        "dataset_id": place / str(rows),
        "output_dir": place / f"run-{rows}",
    }
    return ExtractConfig(**named, streaming=True, device="cpu", **more)


# --- each in a process of its own ---


def write_shards(place: Path, rows: int, count: int) -> dict:
    """Begin the run, and finish its first ``count`` shards; seconds for the books of each alone."""
    from tqdm import tqdm

    from chat_logits.extraction import run as extraction_run
    from chat_logits.extraction.folder import RunFolder
    from chat_logits.extraction.run_description import open_run
    from chat_logits.storage.shard import write_shard

    config = config_for(place, rows)
    books = 0.0
    with RunFolder(config.folder) as folder:
        opened = open_run(config)
        with extraction_run.choose_workers(config)(opened, folder) as here:
            folder.begin(here.describe())
            kept: list = []
            here.compute(iter([0]), folder.manifest, kept.append, tqdm)
        row = next(stored_rows(folder, kept[0]))
        for shard in range(count):
            first = shard * ROWS_PER_SHARD
            skipped = [{"row": i, "reason": "not for a benchmark"} for i in range(first + 1, first + ROWS_PER_SHARD)]
            stored = [{**row, "source_index": first}]
            entry = write_shard(folder.path, folder.manifest, shard, stored, skipped)
            books += timed(folder.add, entry)[1]
    return {"books a shard, ms": 1000 * books / count}


def stored_rows(folder, entry):
    from chat_logits.storage.shard_reading import read_shard_rows

    return read_shard_rows(
        folder.path / entry.path, entry.path, folder.manifest.fingerprint, ROWS_PER_SHARD, entry.num_rows
    )


def plan(place: Path, rows: int, *more: str) -> dict:
    """All that comes before the first shard is given out, in a folder as it is."""
    begun = time.perf_counter()
    import datasets  # noqa: F401 - these two are imported where they are used, which is within what is timed
    import transformers.models.auto  # noqa: F401

    from chat_logits.extraction import run as extraction_run
    from chat_logits.extraction.folder import RunFolder
    from chat_logits.extraction.shard_plan import missing_shards
    from chat_logits.storage.disk import DiskWatch

    imported, memory = time.perf_counter(), resident("VmHWM")
    config = config_for(place, rows, check_shards="check_shards" in more)
    with RunFolder(config.folder) as folder:
        opened, recorded = extraction_run.open_or_resume(config, folder, None, config)
        watch = DiskWatch(folder.path, opened.reader.num_rows)
        run = extraction_run.Run(opened, folder, cast(Any, None), None, watch, begun)
        if recorded:
            run.begin_or_resume(recorded)
        covered = {shard: entry.source_rows for shard, entry in run.finished.items()}
        first = next(missing_shards(covered, ROWS_PER_SHARD, opened.reader.num_rows))
        ready = time.perf_counter()
    return {
        "first shard": first,
        "import, s": imported - begun,
        "until the first shard, s": ready - imported,
        "peak, MiB": resident("VmHWM"),
        "after imports, MiB": resident("VmHWM") - memory,
    }


# --- table ---


def in_own_process(home: Path, what: str, *arguments) -> dict:
    command = [sys.executable, __file__, "--measure", what, *map(str, arguments)]
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench(place: Path, rows: int, shards: int) -> None:
    from chat_logits.data.hashing import GRAIN

    make_source(place / str(rows), rows)
    time.sleep(GRAIN)  # files that were changed just now are hashed each time
    ways = {"begin, the source hashed": (), "begin": ()}
    for name in ways:
        tell(name, rows, in_own_process(place / "home", "plan", place, rows))
    shards = min(shards, rows // ROWS_PER_SHARD - 1)
    books = in_own_process(place / "home", "write_shards", place, rows, shards)
    size = sum(file.stat().st_size for file in (place / f"run-{rows}").rglob("*.json")) / MIB
    tell(f"resume with {shards:,} shards", rows, in_own_process(place / "home", "plan", place, rows))
    checked = in_own_process(place / "home", "plan", place, rows, "check_shards")
    tell(
        f"the same, --check_shards ({size:.1f} MiB of lists; {books['books a shard, ms']:.2f} ms a shard)",
        rows,
        checked,
    )


def tell(name: str, rows: int, found: dict) -> None:
    figures = [found[key] for key in ("until the first shard, s", "peak, MiB", "after imports, MiB")]
    print(f"| {rows:,} | {name} | {figures[0]:.2f} | {figures[1]:.0f} | {figures[2]:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [10_000, 10_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help=f"rows of each source (default: {sizes})")
    parser.add_argument("--shards", type=int, default=10_000, help="finished shards to resume with (default: 10000)")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help="one measurement, as JSON")
    given = parser.parse_args()
    if given.measure:
        what, place, rows, *more = given.measure
        measured = (
            write_shards(Path(place), int(rows), int(*more))
            if what == "write_shards"
            else plan(Path(place), int(rows), *more)
        )
        print(json.dumps(measured))
        return
    print("| source rows | | until the first shard is given out, s | peak, MiB | after imports |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as temporary:
        make_model(Path(temporary) / "model")
        for rows in given.rows:
            bench(Path(temporary), rows, given.shards)


if __name__ == "__main__":
    main()
