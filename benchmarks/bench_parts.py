"""Selection of a vocabulary that is split over processes, against one process: CPU time, and the bytes that they send.

    python benchmarks/bench_parts.py [--vocabulary 151936] [--rows 128] [--rounds 8] [--parts 2 4]

Random logits, K = 64, S = 16, p = 0.98, processes on gloo. Ratios are of the medians of a process' CPU seconds to those
of ``select`` on the same logits in the first process, in the same rounds. Bytes are what the kernel counts of the
processes' writes, gloo's own beside the messages (/proc, so on Linux alone).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as processes  # noqa: E402

from chat_logits.model.selection import SelectionSettings, select  # noqa: E402
from chat_logits.model.selection_parts import select_in_parts  # noqa: E402

SETTINGS = SelectionSettings(top_k=64, top_p=0.98, num_sampled=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    print("| processes | CPU of one of them, of a single one | bytes sent a position, all together | the most by one |")
    print("| --- | --- | --- | --- |")
    for parts in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (parts, folder, given.vocabulary, given.rows, given.rounds)
            processes.spawn(measure, arguments, nprocs=parts)
            lines = [Path(folder, str(rank)).read_text().split() for rank in range(parts)]
        seconds, sent = [float(line[0]) for line in lines], [float(line[1]) for line in lines]
        ratios = ", ".join(f"{each / float(lines[0][2]):.2f}" for each in seconds)
        print(f"| {parts} | {ratios} | {sum(sent):.0f} | {max(sent):.0f} |")


def measure(rank: int, parts: int, folder: str, vocabulary: int, rows: int, rounds: int) -> None:
    """A process' medians, in a file by its rank: CPU seconds, bytes a row, and in the first ``select``'s seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=parts)
    width, found = -(-vocabulary // parts), []
    for number in range(rounds + 1):  # the first is not counted
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(rows, vocabulary, generator=generator) * 3
        tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
        uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
        own = logits[:, rank * width : (rank + 1) * width].clone()
        dist.barrier()
        written, seconds = written_bytes(), time.process_time()
        select_in_parts(own, rank * width, vocabulary, tokens, uniforms, SETTINGS, None)
        seconds, written = time.process_time() - seconds, written_bytes() - written
        dist.barrier()
        alone = time.process_time()
        if rank == 0:
            select(logits, tokens, uniforms, SETTINGS)
        found.append((seconds, written / rows, time.process_time() - alone))
    medians = [statistics.median(column) for column in zip(*found[1:], strict=True)]
    Path(folder, str(rank)).write_text(" ".join(map(str, medians)))
    dist.destroy_process_group()


def written_bytes() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["wchar"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
