"""The command: a student of a tiny teacher comes closer to it, is stopped and goes on, and is saved for its users."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK_VOCABULARY, make_tiny_model
from transformers import AutoModelForCausalLM

import train_student
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.alignment import RowAligner
from chat_logits.training.loss import sparse_kd_loss
from chat_logits.training.packs import plan_packs
from chat_logits.training.student import StudentTrainer
from chat_logits.training.targets import row_targets


@pytest.fixture(scope="module")
def student(quick_model, tmp_path_factory) -> Path:
    """The teacher's shape and tokenizer, other weights."""
    folder = make_tiny_model(tmp_path_factory.mktemp("student"), vocab_size=QUICK_VOCABULARY, seed=1)
    shutil.copy(quick_model / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture
def run(quick_run, student, tmp_path):
    """The command's exit status; options in place of others."""

    def train(out: str = "out", *switches: str, **changes) -> int:
        options = {
            "logit_dataset_id": quick_run,
            "student_id": student,
            "output_dir": tmp_path / out,
            "device": "cpu",
            "batch_tokens": 600,
            "held_out": 12,
            "max_steps": 8,
            "learning_rate": 1e-2,
            **changes,
        }
        words = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        return train_student.main([*words, *switches])

    return train


def record(folder: Path) -> list[dict]:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))["held_out"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def written_out_kl(dataset_id: Path, model, source_rows: set[int]) -> float:
    """Mean forward KL over stored rows, from the model's logits, a conversation at a time."""
    dataset, tokenizer = open_with_tokenizer(str(dataset_id))
    aligner, total, count = RowAligner(tokenizer, dataset.manifest), 0.0, 0
    for row in dataset.rows():
        if row["source_index"] not in source_rows:
            continue
        aligned = aligner.align(row)
        target = row_targets(row, aligned)
        with torch.no_grad():
            logits = model(torch.from_numpy(aligned.input_ids)[None]).logits[0, target.positions - 1]
        parts = (torch.from_numpy(part) for part in (target.token_ids, target.weights, target.entropy))
        total += sparse_kd_loss(logits, *parts, reduction="sum").item()
        count += len(target.positions)
    return total / count


def test_a_student_comes_closer_and_is_saved_as_it_was_measured(run, quick_run, student, tmp_path, capsys):
    assert run() == 0
    points = record(tmp_path / "out")
    assert [point["step"] for point in points] == list(range(9))
    assert points[-1]["kl"] < 0.8 * points[0]["kl"]
    told = capsys.readouterr()
    assert f"{points[-1]['kl']:.4f}" in told.out and f"on {points[0]['positions']:,} held-out tokens" in told.out
    dataset, _ = open_with_tokenizer(str(quick_run))
    sources = [row["source_index"] for row in dataset.rows()]
    chosen = np.random.default_rng(0).permutation(len(sources))[:12]
    held_out = {sources[i] for i in chosen}
    for folder, point in ((student, points[0]), (tmp_path / "out", points[-1])):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert point["kl"] == pytest.approx(written_out_kl(quick_run, model, held_out), rel=1e-4)


def test_stopped_within_an_epoch_it_goes_on_to_the_same_student(run, tmp_path, monkeypatch, capsys):
    assert run("whole") == 0
    step = StudentTrainer.training_step

    def stopped(self, *arguments, **options):
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "training_step", stopped)
        assert run("stopped") == 143
    assert "The same command goes on with --resume." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert run("stopped", "--resume") == 0
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")
    whole = weights_of(tmp_path / "whole")
    for name, weights in weights_of(tmp_path / "stopped").items():
        torch.testing.assert_close(weights, whole[name], rtol=0, atol=1e-6)


def test_an_adapter_alone_is_trained_and_saved(run, tmp_path):
    assert run(lora_rank=4, learning_rate=None, max_steps=2) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    points = record(tmp_path / "out")
    assert points[0]["kl"] != points[-1]["kl"]


@pytest.mark.parametrize(
    ("changes", "switches", "status", "told"),
    [
        ({"held_out": 1000}, (), 2, "--held_out 1000: the dataset has 160 conversations; expected fewer"),
        ({"hard_weight": 2}, (), 2, "--hard_weight 2.0: expected 0 to 1"),
        ({}, ("--resume",), 1, "--resume: no checkpoint in"),
        ({"output_dir": None}, (), 2, "required: --output_dir"),
    ],
)
def test_wrong_use_is_told_in_a_line(run, capsys, changes, switches, status, told):
    assert run("out", *switches, **changes) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {told}")


def test_a_folder_with_something_in_it_is_not_trained_into(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert run() == 2
    assert "not empty; go on there with --resume, or name another" in capsys.readouterr().err


def test_packs_have_each_conversation_once_and_no_more_tokens_than_allowed():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 400, 500).tolist(), 1500]
    packs = plan_packs(lengths, 1000, seed=3)
    assert sorted(number for pack in packs for number in pack) == list(range(501))
    assert all(sum(lengths[i] for i in pack) <= 1000 or pack == [500] for pack in packs)
    assert sum(lengths) / 1000 / len(packs) > 0.9
    assert plan_packs(lengths, 1000, seed=3) == packs != plan_packs(lengths, 1000, seed=4)
