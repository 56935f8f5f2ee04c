"""Two processes of torchrun on CPUs: the command in them, and weights that are sharded over them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from training.test_train_student import record, run, student  # noqa: F401

SCRIPT = """
import contextlib, json, os, signal, sys
from pathlib import Path
folder, paths, flags = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path[:0] = paths
import torch
import train_student
from torch.distributed.fsdp import fully_shard
from random_models import random_model
from chat_logits.training.student import StudentLoss, StudentTrainer, split_batch
from training.test_student import collate, examples, gradients

rank, step = int(os.environ["RANK"]), StudentTrainer.training_step

def stopped(self, *arguments, **options):
    if rank == 1 and self.state.global_step == 1:  # the other one gets no signal
        signal.raise_signal(signal.SIGTERM)
    return step(self, *arguments, **options)

def run(name, *switches):
    with open(folder / f"said-{name}-{len(switches)}-{rank}", "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            return train_student.main([*flags, "--output_dir", str(folder / name), *switches])

statuses = [run("whole")]
StudentTrainer.training_step = stopped
statuses.append(run("stopped"))
StudentTrainer.training_step = step
kept = [path.name for path in (folder / "stopped" / "checkpoints").iterdir()]
statuses.append(run("stopped", "--resume"))

rows, errors = examples(), {}
for model_type in ("llama", "gemma2"):
    alone, model = random_model(model_type), random_model(model_type)
    arguments, target = split_batch(collate(rows))
    right = gradients(alone, StudentLoss(alone)(alone, arguments, target))
    loss, mesh = StudentLoss(model), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    arguments, target = split_batch(collate(rows[rank::2]))
    loss(model, arguments, target).backward()
    for name, weights in model.named_parameters():
        found = 2 * weights.grad.full_tensor()  # of the mean over processes
        errors[f"{model_type} {name}"] = ((found - right[name]).norm() / right[name].norm()).item()
(folder / f"{rank}.json").write_text(json.dumps({"statuses": statuses, "kept": kept, "errors": errors}))
"""


@pytest.fixture(scope="module")
def two(quick_run, student, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of what both processes found, wrote and said."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    options = {"logit_dataset_id": quick_run, "student_id": student, "device": "cpu", "batch_tokens": 600}
    options |= {"held_out": 12, "max_steps": 3, "learning_rate": 1e-2}
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    paths = [str(REPO / part) for part in ("", "tests", "tests/support")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(folder / "script.py"), str(folder), json.dumps(paths), json.dumps(flags)]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def found(two: Path, rank: int) -> dict:
    return json.loads((two / f"{rank}.json").read_text())


def test_two_processes_train_the_student_of_one(two, run, tmp_path):  # noqa: F811
    assert run(max_steps=3, accumulate=2) == 0
    alone, together = record(tmp_path / "out"), record(two / "whole")
    assert [point["step"] for point in together] == [0, 1, 2, 3]
    for one, other in zip(alone, together, strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-5)
        assert other["positions"] == one["positions"]


def test_one_process_goes_on_where_two_ended_with_as_many_batches_a_step(two, run, tmp_path, capsys):  # noqa: F811
    """The held-out KL of one process that did all steps; with half as many, it would read other batches."""
    shutil.copytree(two / "whole", tmp_path / "of_two")
    assert run("of_two", "--resume", max_steps=5) == 2
    told = "error: --accumulate 1: times the number of processes, 1, it makes steps of 1, and the training has steps "
    assert told + "of 2 batches; resume with --accumulate 2, or start again" in capsys.readouterr().err
    assert run("of_two", "--resume", max_steps=5, accumulate=2) == 0
    assert run("alone", max_steps=3, accumulate=2) == 0
    assert run("alone", "--resume", max_steps=5, accumulate=2) == 0
    found, expected = ([point["kl"] for point in record(tmp_path / name)] for name in ("of_two", "alone"))
    assert len(found) == 6 and found == pytest.approx(expected, rel=1e-5)


def test_a_signal_to_one_stops_both_after_the_same_step(two):
    for rank in range(2):
        assert found(two, rank)["statuses"] == [0, 143, 0]
        assert found(two, rank)["kept"] == ["checkpoint-2"]
    assert [point["kl"] for point in record(two / "stopped")] == pytest.approx(
        [point["kl"] for point in record(two / "whole")], rel=1e-6
    )


def test_one_of_them_speaks(two):
    assert "held-out tokens" in (two / "said-whole-0-0").read_text()
    for name in ("whole-0", "stopped-0", "stopped-1"):
        assert (two / f"said-{name}-1").read_text() == ""


def test_sharded_weights_have_the_gradient_of_one_process(two):
    """FSDP2, with a head of its own and with one that is tied to the embedding."""
    for rank in range(2):
        errors = found(two, rank)["errors"]
        assert len({name.partition(" ")[0] for name in errors}) == 2
        assert max(errors.values()) < 1e-5
