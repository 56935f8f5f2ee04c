"""The benchmark for a GPU, small and on the CPU: time on a card is short, so that it is right before one is at hand."""

import os
import re
import subprocess
import sys

import pytest
from conftest import MODEL, REPO


@pytest.mark.slow
def test_the_benchmark_goes_through_and_its_figures_hold():
    command = [sys.executable, str(REPO / "benchmarks" / "bench_gpu.py"), str(MODEL), "--conversations", "8"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout
    errors = dict(re.findall(r"(\w+), against one at a time \| at most (\S+) nats", table))
    assert float(errors["float32"]) < 1e-5 < float(errors["bfloat16"]) < 0.01
    assert re.search(r"--verify, 16 conversations \| holds \|", table)
    assert re.search(r"SIGTERM: status 143 after \S+ s, \d shards \| resumed: 8 rows \|", table)
    assert len(re.findall(r"of the bare forward", table)) == 2 * 3 + 1 + 3  # to results and files; alone; compiled
