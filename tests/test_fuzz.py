"""Thousands of damaged datasets: each is read right or refused by name."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPO, TEMPLATE, run_command
from fuzz_reader import KINDS, SECONDS

CASES, SEEDS = 1500, range(2)


@pytest.fixture(scope="module")
def small_dataset(small_model, tmp_path_factory):
    """Two shards of 20 rows, of which some are skipped; the second has two row groups."""
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [{"question": f"{i}?", "answer": f"It is {i}, {'or so ' * (i % 5)}." if i % 7 else ""} for i in range(40)]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command(
        "extract_logits.py",
        *("--model_id", small_model, "--dataset_id", source, "--chat_template", TEMPLATE, "--rows_per_shard", 20),
        *("--output_dir", folder / "out", "--top_k", 8, "--num_sampled", 4, "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_is_named_or_does_no_harm(small_dataset, seed):
    command = [sys.executable, REPO / "tests" / "support" / "fuzz_reader.py", small_dataset, seed, CASES]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=SECONDS * 90)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FUZZ ")]
    found = json.loads(line.removeprefix("FUZZ "))
    print(json.dumps(found["outcomes"], indent=1), found["grown"])
    assert not found["number"], "\n".join(found["wrong"])
    assert found["grown"] < 200 * 2**20
    assert sum(count for name, count in found["outcomes"].items() if "resume" not in name) == CASES
    kinds = {name.split(":")[0] for name in found["outcomes"]}
    assert kinds == {*KINDS, "resume"}
