"""The command: a student of a tiny teacher comes closer to it, is stopped and goes on, and is saved for its users."""

import errno
import json
import re
import shutil
import signal
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK_VOCABULARY, REPO, make_tiny_model
from runs import flags_for
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import extract_logits
import train_student
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.shard_list import read_shard_list, shards_text
from chat_logits.training import run as training_run
from chat_logits.training.config import TrainConfig
from chat_logits.training.loss import sparse_kd_loss
from chat_logits.training.packs import plan_packs
from chat_logits.training.record import Checkpoint, Student, TaughtRows, TrainingResult, go_on, locked_folder
from chat_logits.training.run import train
from chat_logits.training.stopping import explained_failures
from chat_logits.training.student import StudentTrainer
from chat_logits.training.targets import row_targets
from logit_codec import decode_row


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
        target = row_targets(row, aligned, end_of_turn="skip")
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
    assert "only to train further (--resume with a larger --max_steps)." in told.err
    assert f"{points[-1]['kl']:.4f}" in told.out and f"on {points[0]['positions']:,} held-out tokens" in told.out
    dataset, _ = open_with_tokenizer(str(quick_run))
    sources = [row["source_index"] for row in dataset.rows()]
    chosen = np.random.default_rng(0).permutation(len(sources))[:12]
    held_out = {sources[i] for i in chosen}
    for folder, point in ((student, points[0]), (tmp_path / "out", points[-1])):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert point["kl"] == pytest.approx(written_out_kl(quick_run, model, held_out), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.5}, {"end_of_turn": "skip"}])
def test_a_student_that_is_the_teacher_is_not_away_from_it(run, quick_model, tmp_path, options):
    """Whatever it is trained on: held-out figures are of the teacher's distributions, so a step of nothing leaves the
    draws' chance and the codes' rounding. With ends of turns as certain, KL was 0.056 and agreement 99.5%."""
    assert run(student_id=quick_model, max_steps=1, learning_rate=1e-30, **options) == 0
    for point in record(tmp_path / "out"):
        assert abs(point["kl"]) < 1e-3 and point["agreement"] == 1.0


def test_without_draws_the_distance_is_to_the_renormalised_nucleus_and_is_called_so(
    run, quick_model, calm_source, tmp_path, capsys
):
    """KL(p/P‖p) = −log P of a student that is the teacher, whose nucleus has the probability P."""
    flags = flags_for(quick_model, calm_source, tmp_path / "rows")
    assert extract_logits.main([*flags, "--max_samples", "20", "--top_k", "8", "--num_sampled", "0"]) == 0
    options = {"logit_dataset_id": tmp_path / "rows", "student_id": quick_model, "learning_rate": 1e-30}
    capsys.readouterr()
    assert run("out", "--allow_biased", max_steps=1, held_out=16, **options) == 0
    dataset, _ = open_with_tokenizer(str(tmp_path / "rows"))
    assert dataset.num_rows == 17
    left = np.random.default_rng(0).permutation(17)[16]
    surprise = [
        -np.log(np.exp(decode_row(row).top_log_probs).sum(axis=1)) for i, row in enumerate(dataset.rows()) if i != left
    ]
    before = record(tmp_path / "out")[0]
    assert before["kl"] == pytest.approx(np.concatenate(surprise).mean(), rel=0.01)
    assert "Forward KL to the teacher's nucleus, renormalised on " in capsys.readouterr().out
    page = (tmp_path / "out" / "training.html").read_text(encoding="utf-8")
    assert "<h2>Forward KL to the teacher&#39;s nucleus, renormalised, nats a token</h2>" in page


def test_a_student_with_fewer_rows_than_its_teacher_learns_what_it_has_tokens_for(
    run, quick_model, calm_source, tmp_path, capsys
):
    teacher, small = (
        make_tiny_model(tmp_path / str(rows), vocab_size=rows, seed=2) for rows in (QUICK_VOCABULARY + 128, 4000)
    )
    for folder in (teacher, small):
        shutil.copy(quick_model / "tokenizer.json", folder / "tokenizer.json")
    flags = flags_for(teacher, calm_source, tmp_path / "rows")
    assert extract_logits.main([*flags, "--max_samples", "60"]) == 0
    options = {"logit_dataset_id": tmp_path / "rows", "max_steps": 3, "held_out": 6}
    assert run(student_id=small, **options) == 2
    told = capsys.readouterr().err
    assert re.search(
        r"error: --student_id .*: it has 4,000 token ids, and a conversation has the token 4,0\d\d\.", told
    )
    assert run(**options) == 0
    told = capsys.readouterr().err
    assert "The student has 4,096 of the teacher's 4,224 token ids; no conversation has the others" in told
    assert re.search(r"The student has 4,096 token ids, and the teacher's go up to 4,[12]\d\d: .* weight is 0.0", told)
    points = record(tmp_path / "out")
    assert points[-1]["kl"] < points[0]["kl"]


def test_without_accelerate_the_command_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (needed,) = extras["train"]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert run() == 1
    assert capsys.readouterr().err == (
        f"error: training needs accelerate, which is not installed: pip install '{needed.split(',')[0]}'\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_page_shows_what_was_measured_and_fetches_nothing(run, student, tmp_path):
    assert run(max_steps=3) == 0
    page = (tmp_path / "out" / "training.html").read_text(encoding="utf-8")
    points = record(tmp_path / "out")
    for point in points:
        assert f"<title>step {point['step']}: {point['kl']:.4f} ± {point['error']:.4f}</title>" in page
        assert f"<title>step {point['step']}: {point['agreement']:.1%}</title>" in page
    (held_out,) = re.findall(r'<polyline class="held_out" points="([^"]*)"', page)[:1]
    heights = [float(pair.split(",")[1]) for pair in held_out.split()]
    zero, one = (heights[i] for i in (0, -1))
    (bottom,) = re.findall(r'<path class="grid" d="M46 ([\d.]+)H', page)[:1]
    assert (float(bottom) - one) / (float(bottom) - zero) == pytest.approx(points[-1]["kl"] / points[0]["kl"], abs=0.01)
    option = '<td data-title="Option"><bdi>learning_rate</bdi></td>'
    assert str(student) in page and f'{option}<td data-title="Value"><bdi>0.01</bdi></td>' in page
    assert not re.findall(r"https?://|<script|url\(", page)


def test_a_finished_student_goes_on_for_more_steps(run, tmp_path, capsys):
    assert run(max_steps=3, measure_every=1) == 0
    first = record(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert run("out", "--resume", max_steps=6, measure_every=2) == 0
    points = record(tmp_path / "out")
    assert points[: len(first)] == first and [point["step"] for point in points] == [0, 1, 2, 3, 4, 6]
    assert points[-1]["kl"] < points[3]["kl"]
    whole = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in whole["trained_on"]] == [1, 2, 3, 4, 5, 6]
    assert run("out", "--resume", max_steps=4) == 2
    assert "--max_steps 4: the checkpoint has taken 6; expected as many or more" in capsys.readouterr().err


def test_other_rows_than_before_are_not_gone_on_with(run, quick_run, other_run, tmp_path, capsys):
    """Neither another extraction's nor more of the same; the same in another place are."""
    begun = shutil.copytree(quick_run, tmp_path / "begun")
    listed = read_shard_list(begun / "shards.json", "begun").entries
    (begun / "shards.json").write_text(shards_text(listed[:-1], is_finished=False), encoding="utf-8")
    assert run(logit_dataset_id=begun, max_steps=1) == 0
    before = (tmp_path / "out" / "training.json").read_text()
    assert run("out", "--resume", logit_dataset_id=other_run, max_steps=2) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: --logit_dataset_id {other_run}: not the rows that this training began with: ")
    prints = [open_dataset(str(folder)).manifest.fingerprint[:10] for folder in (begun, other_run)]
    assert all(f"extraction {one} of " in told for one in prints) and "157 rows before, 53 now" in told
    assert run("out", "--resume", logit_dataset_id=quick_run, max_steps=2) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "began with: 157 rows before, 160 now. Resume with those, or start again in another folder." in told
    assert (tmp_path / "out" / "training.json").read_text() == before
    shutil.move(begun, tmp_path / "moved")
    assert run("out", "--resume", logit_dataset_id=tmp_path / "moved", max_steps=2) == 0
    assert [point["step"] for point in record(tmp_path / "out")] == [0, 1, 2]


def test_an_adapter_goes_on_with_the_student_that_it_began_with(run, student, quick_model, tmp_path, capsys):
    """Not with another of its shape; the same in another place is accepted, whatever else lies there."""
    assert run(lora_rank=2, max_steps=1) == 0
    before = (tmp_path / "out" / "training.json").read_text()
    assert run("out", "--resume", student_id=quick_model, lora_rank=2, max_steps=2) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"error: --student_id {quick_model}: not the student that this training began with: {student}"
    )
    assert f"before, {quick_model} at " in told and "Resume with that one, or start again in another folder." in told
    assert (tmp_path / "out" / "training.json").read_text() == before
    moved = shutil.copytree(student, tmp_path / "moved")
    (moved / "README.md").write_text("A note.")
    shutil.move(tmp_path / "out", moved / "out")
    assert run("moved/out", "--resume", student_id=moved, lora_rank=2, max_steps=2) == 0
    assert [point["step"] for point in record(moved / "out")] == [0, 1, 2]
    (config,) = moved.glob("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.01}))
    assert run("moved/out", "--resume", student_id=moved, lora_rank=2, max_steps=3) == 2


def test_another_commit_of_the_same_repository_is_told_with_the_one_to_give(tmp_path):
    options = {"student_id": "any", "output_dir": str(tmp_path)}
    first = TaughtRows(teacher="user/teacher", fingerprint="a" * 64, num_rows=5, revision="b" * 40, num_sampled=16)
    student = Student("any", "d" * 40)

    def begun(rows, student=student, place="user/rows") -> TrainingResult:
        return TrainingResult(TrainConfig(logit_dataset_id=place, **options), rows, student)

    begun(first).write()
    checkpoint, later = Checkpoint(tmp_path, 1), replace(first, revision="c" * 40)
    with pytest.raises(
        UsageError, match=r"revision bbbbbbbbbb before, cccccccccc now. Resume with `revision` b{40}, or"
    ):
        go_on(begun(later), checkpoint)
    with pytest.raises(
        UsageError, match=r"any at dddddddddd before, any at eeeeeeeeee now. Resume with `student_revision` d{40}, or"
    ):
        go_on(begun(first, Student("any", "e" * 40)), checkpoint)
    go_on(begun(later, place="user/copy"), checkpoint)
    go_on(begun(replace(first, revision=None), Student("user/mirror", "d" * 40)), checkpoint)


@pytest.mark.parametrize(
    ("processes", "accumulate", "again"),
    [(2, 3, None), (1, 6, None), (2, 1, "`accumulate` 3,"), (4, 1, "a number of processes that divides 6,")],
)
def test_steps_of_other_batches_are_not_gone_on_with(tmp_path, processes, accumulate, again):
    """A training in three processes, each with two batches a step."""
    rows = TaughtRows(teacher="user/teacher", fingerprint="a" * 64, num_rows=5, revision=None, num_sampled=16)
    options = {"logit_dataset_id": "user/rows", "student_id": "any", "output_dir": str(tmp_path)}
    before, now = (
        TrainingResult(TrainConfig(**options, accumulate=batches), rows, Student("any", "d" * 40), processes=count)
        for count, batches in ((3, 2), (processes, accumulate))
    )
    before.write()
    expected = nullcontext() if again is None else pytest.raises(UsageError, match=f"of 6 batches; resume with {again}")
    with expected:
        go_on(now, Checkpoint(tmp_path, 1))


def test_a_student_that_was_trained_and_not_saved_is_saved_by_resuming(run, tmp_path):
    assert run(max_steps=3) == 0
    expected, points = weights_of(tmp_path / "out"), record(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.copytree(
        tmp_path / "out" / "checkpoints" / "checkpoint-3", tmp_path / "out" / "checkpoints" / "checkpoint-9"
    )
    (tmp_path / "out" / "checkpoints" / "checkpoint-9" / "trainer_state.json").unlink()  # which was not written whole
    assert run("out", "--resume", max_steps=3) == 0
    assert record(tmp_path / "out") == points
    for name, weights in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=0)


def test_a_single_step_teaches_at_the_whole_rate(run, student, tmp_path):
    """AdamW's first update is the rate for every weight that has a gradient, whatever its size."""
    assert run(max_steps=1, learning_rate=1e-3) == 0
    before, after = weights_of(student), weights_of(tmp_path / "out")
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert moved == pytest.approx(1e-3, rel=0.01)


def test_rates_rise_then_fall_along_the_cosine_and_none_is_zero(run, tmp_path):
    """100 steps, three of them of warm-up, by what transformers logs."""
    assert run("gentle", max_steps=100, save_every=100, measure_every=100, held_out=1, learning_rate=1e-4) == 0
    state = json.loads((tmp_path / "gentle" / "checkpoints" / "checkpoint-100" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] / 1e-4 for entry in state["log_history"] if "learning_rate" in entry]
    cosine = [0.5 * (1 + np.cos(np.pi * step / 97)) for step in range(97)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *cosine], abs=1e-9)


@pytest.mark.parametrize("switches", [(), ("--resume",)])
def test_a_training_that_ended_before_its_first_checkpoint_begins_anew_by_the_same_command(
    run, tmp_path, monkeypatch, capsys, switches
):
    step, calls = StudentTrainer.training_step, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the machine is gone")
        return step(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(StudentTrainer, "training_step", failing)
        assert run(save_every=500) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"training.json", "checkpoints"}
    capsys.readouterr()
    if switches:
        assert run("out", *switches) == 1
        assert re.search(r"no checkpoint in .*; leave it out to start again", capsys.readouterr().err)
    assert run() == 0
    assert run("undisturbed") == 0
    for name, weights in weights_of(tmp_path / "undisturbed").items():
        torch.testing.assert_close(weights_of(tmp_path / "out")[name], weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kept",
    [
        {"checkpoints/checkpoint-100/model.safetensors": "of value"},
        {"checkpoints/best.pt": "of value"},
        {"training.json": '{"lr": 1}'},
        {"training.json": '{"is_finished": true}', "checkpoints/note": ""},
        {"checkpoints": "a file"},
    ],
)
def test_what_a_training_has_not_left_itself_is_not_trained_over(run, tmp_path, capsys, kept):
    for name, content in kept.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(content)
    assert run() == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    for name, content in kept.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_a_folder_that_was_filled_meanwhile_is_not_trained_over(quick_run, student, tmp_path):
    """One config, trained with twice."""
    options = {"logit_dataset_id": str(quick_run), "student_id": str(student), "output_dir": str(tmp_path / "out")}
    config = TrainConfig(**options, device="cpu", max_steps=1, held_out=12)
    train(config)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds files"):
        train(config)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_gone_on_with_the_rates_are_those_of_the_options_now(run, tmp_path):
    """Of 8 steps 4 more are made, at a tenth of the rate: by the cosine of 12 steps, from the 9th on."""
    assert run(learning_rate=1e-3) == 0
    assert run("out", "--resume", max_steps=12, learning_rate=1e-4) == 0
    state = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-12" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    expected = [1e-4 * 0.5 * (1 + np.cos(np.pi * step / 12)) for step in range(8, 12)]
    assert [rates[step] for step in range(9, 13)] == pytest.approx(expected, abs=1e-12)


def test_two_trainings_do_not_write_into_one_folder(run, tmp_path, capsys):
    assert run() == 0
    with locked_folder(tmp_path / "out"):
        assert run("out", "--resume", max_steps=12) == 2
    with locked_folder(tmp_path / "begun"):
        assert run("begun") == 2
    assert capsys.readouterr().err.count("another process is training into this folder") == 2
    assert run("out", "--resume", max_steps=12) == 0 and run("begun") == 0


def test_of_a_single_held_out_conversation_no_error_is_told(run, tmp_path, capsys):
    """None is known: neither table, page nor record has one, and the record is JSON to strict readers."""
    assert run(held_out=1) == 0 and run("out", "--resume", held_out=1, max_steps=10) == 0

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    record = json.loads((tmp_path / "out" / "training.json").read_text(), parse_constant=refuse)
    assert [point["step"] for point in record["held_out"]] == list(range(11))
    assert {point["error"] for point in record["held_out"]} == {None}
    page, told = (tmp_path / "out" / "training.html").read_text(), capsys.readouterr()
    assert not [text for text in (page, told.out, told.err) if re.search(r"\bnan\b", text)]


def test_all_measurements_are_of_the_same_arithmetic(run, tmp_path):
    """In bfloat16 a step that moves nothing has the measurement before it, to the last digit; float32 has another."""
    options = {"max_steps": 1, "learning_rate": 1e-30}
    assert run(dtype="bfloat16", **options) == 0 and run("wide", dtype="float32", **options) == 0
    before, after = record(tmp_path / "out")
    assert {**before, "step": 1} == after
    wide = record(tmp_path / "wide")[0]["kl"]
    assert before["kl"] != wide and before["kl"] == pytest.approx(wide, rel=0.02)


def test_processes_on_gpus_wait_days_for_the_first_to_align_and_not_for_steps(tmp_path):
    """Where transformers' limit is half an hour; on CPUs it sets none, and gloo's own is left."""
    config = TrainConfig(logit_dataset_id="any", student_id="any", output_dir=str(tmp_path / "out"), device="cpu")
    patience = training_run._arguments(config).ddp_timeout_delta
    assert patience >= timedelta(days=2)
    alone = {"init_method": f"file://{tmp_path / 'group'}", "rank": 0, "world_size": 1, "timeout": patience}
    torch.distributed.init_process_group("gloo", **alone)
    try:
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout == patience
        training_run._lose_patience()
        assert group.options._timeout == timedelta(minutes=30)
    finally:
        torch.distributed.destroy_process_group()


def test_several_cards_of_one_process_are_refused_before_any_row_is_read(tmp_path, monkeypatch):
    arguments_of = training_run._arguments

    def with_two_cards(config):
        arguments = arguments_of(config)
        arguments._n_gpu = 2  # what transformers finds where there are so many
        return arguments

    monkeypatch.setattr(training_run, "_arguments", with_two_cards)
    config = TrainConfig(logit_dataset_id="/no/such", student_id="/no/such", output_dir=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="one process has 2 GPUs: expected one GPU a process"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_other_conversations_than_before_are_not_held_out(run, capsys):
    assert run(max_steps=1) == 0
    assert run("out", "--resume", max_steps=2, seed=1) == 2
    assert "--seed: 1, and the training has the default; resume with the same" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_training_without_a_checkpoint(run, tmp_path, monkeypatch, capsys):
    step = StudentTrainer.training_step

    def damaged(self, model, *arguments, **options):
        if self.state.global_step == 2:
            model.get_input_embeddings().weight.data.fill_(float("nan"))
        return step(self, model, *arguments, **options)

    monkeypatch.setattr(StudentTrainer, "training_step", damaged)
    assert run(save_every=1) == 1
    told = capsys.readouterr().err
    assert "error: step 3: the loss is nan: training has diverged. Start again with a smaller --learning_rate" in told
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "error: out of memory with --batch_tokens 600",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: the disk of "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "error: the disk of "),
        (OSError(errno.EFBIG, "File too large"), "error: a file reached the limit on file sizes (ulimit -f)"),
        (SafetensorError("I/O error: File too large (os error 27)"), "error: a file reached the limit on file sizes"),
    ],
)
def test_what_runs_out_is_told(run, monkeypatch, capsys, failure, told):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(StudentTrainer, "training_step", fail)
    assert run() == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(told) and "last complete checkpoint" not in said


def test_of_a_full_disk_a_training_goes_on_from_its_last_complete_checkpoint(tmp_path):
    config = TrainConfig(logit_dataset_id="rows", student_id="student", output_dir=str(tmp_path))
    for step, file, told in ((2, "model.safetensors", "starts again"), (1, "trainer_state.json", "continues from the")):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / file).touch()
        expected = pytest.raises(ToolkitError, match=f"is full. Make room; the same command .*{told}")
        with expected, explained_failures(config, longest=600):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def with_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/base"}))


def without_weights_of_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (without_tokenizer, 1, "tokenizer of "),
        (with_adapter, 2, "an adapter on "),
        (
            partial(change_config, quantization_config={"quant_method": "gptq", "bits": 4}),
            2,
            "its weights are quantized (gptq)",
        ),
        (partial(change_config, model_type="vit"), 2, "a vit, which transformers has no causal language model for"),
        (without_weights_of_a_layer, 1, "its checkpoint is not whole: 1 tensors are missing"),
    ],
)
def test_a_student_that_cannot_be_trained_is_refused(run, student, tmp_path, capsys, change, status, told):
    shutil.copytree(student, tmp_path / "changed")
    change(tmp_path / "changed")
    assert run(student_id=tmp_path / "changed") == status
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert "The same command with --resume continues." in capsys.readouterr().err
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


def test_frozen_embeddings_stay_and_the_layers_learn(run, student, tmp_path):
    assert run("out", "--freeze_embeddings") == 0
    before, after = weights_of(student), weights_of(tmp_path / "out")
    same = {name for name, weights in before.items() if torch.equal(weights, after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    points = record(tmp_path / "out")
    assert points[-1]["kl"] < 0.9 * points[0]["kl"]


@pytest.mark.parametrize(
    ("changes", "switches", "status", "told"),
    [
        ({"held_out": 1000}, (), 2, "--held_out 1000: the dataset has 160 conversations; expected fewer"),
        ({"hard_weight": 2}, (), 2, "--hard_weight 2.0: expected 0 to 1"),
        ({}, ("--resume",), 1, "--resume: no checkpoint in"),
        ({"output_dir": None}, (), 2, "required: --output_dir"),
        ({"student_id": "/no/such"}, (), 2, "model /no/such: "),
        ({"student_id": "model.gguf"}, (), 2, "--student_id model.gguf: a GGUF file"),
        ({"logit_dataset_id": "/no/such"}, (), 2, "/no/such: no such folder"),
    ],
)
def test_wrong_use_is_told_in_a_line(run, capsys, changes, switches, status, told):
    assert run("out", *switches, **changes) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {told}")


def test_the_students_own_folder_is_not_trained_into(run, student, capsys):
    for switches in ((), ("--resume",)):
        assert run("out", *switches, output_dir=student) == 2
        assert "the folder of the student itself, which stays as it is" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_trained_into(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert run() == 2
    told = capsys.readouterr().err
    assert "expected a new or an empty folder, or --resume to continue there" in told
    assert "Importing torch" not in told  # it is refused before anything that takes time


def test_a_config_is_made_without_a_look_at_the_disk(student, tmp_path):
    """The folder may be filled, or emptied, before it is trained with; ``train`` is who looks."""
    (tmp_path / "mine.txt").write_text("")
    for place in (student, tmp_path, tmp_path / "mine.txt"):
        config = TrainConfig(logit_dataset_id="any", student_id=str(student), output_dir=str(place), device="cpu")
        with pytest.raises(UsageError, match=f"`output_dir` {place}: "):
            train(config)


def test_packs_have_each_conversation_once_and_no_more_tokens_than_allowed():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 400, 500).tolist(), 1500]
    packs = plan_packs(lengths, 1000, seed=3)
    assert sorted(number for pack in packs for number in pack) == list(range(501))
    assert all(sum(lengths[i] for i in pack) <= 1000 or pack == [500] for pack in packs)
    assert sum(lengths) / 1000 / len(packs) > 0.9
    assert plan_packs(lengths, 1000, seed=3) == packs != plan_packs(lengths, 1000, seed=4)
    padded = plan_packs(lengths, 1000, seed=3, is_padded=True)
    assert sorted(number for pack in padded for number in pack) == list(range(501))
    assert all(len(pack) * max(lengths[i] for i in pack) <= 1000 or pack == [500] for pack in padded)
    assert sum(lengths) > 0.9 * sum(len(pack) * max(lengths[i] for i in pack) for pack in padded)
