"""A student's steps by stored distributions: its forward pass with the loss in it, accumulated and on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, REPO
from datasets import Dataset
from random_models import ARCHITECTURES, random_model
from transformers import TrainingArguments

from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import UsageError
from chat_logits.training.collator import PackingCollator
from chat_logits.training.loss import sparse_kd_loss
from chat_logits.training.student import StudentLoss, StudentTrainer, split_batch

WIDTH, VOCABULARY = 5, 1000
EVALUATED = 7  # of the 8 examples: of two processes' last batches of two, one place is filled with the first example
FIGURES = ("loss", "kl", "kl_tail", "agreement", "eval_loss", "eval_kl", "eval_error", "eval_kl_tail", "eval_agreement")


def examples(count: int = 8) -> list[dict]:
    """Token ids of 6 to 13 tokens, and targets at some of them."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        length = 6 + number
        positions = torch.arange(2, length, 1 + number % 2)
        weights = torch.rand(len(positions), WIDTH, generator=rng)
        found.append(
            {
                "input_ids": torch.randint(0, VOCABULARY, (length,), generator=rng),
                "positions": positions,
                "ids": torch.randint(0, VOCABULARY, (len(positions), WIDTH), generator=rng),
                "weights": weights / weights.sum(1, keepdim=True),
                "entropy": torch.rand(len(positions), generator=rng),
                "tail_entropy": torch.rand(len(positions), generator=rng),
                "num_sampled": 1 + number % 3,
            }
        )
    return found


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Padded at the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        length, at = len(row["input_ids"]), row["positions"]
        ids[i, :length], mask[i, :length], labels[i, at] = row["input_ids"], 1, row["input_ids"][at]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "logits_to_keep": torch.arange(1, longest),  # and one column that is left out
        "predicting": torch.cat([i * (longest - 1) + row["positions"] - 2 for i, row in enumerate(rows)]),
        "target_ids": torch.cat([row["ids"] for row in rows]),
        "target_weights": torch.cat([row["weights"] for row in rows]),
        **{name: torch.cat([row[name] for row in rows]) for name in ("entropy", "tail_entropy")},
        "num_sampled": torch.cat([torch.full_like(row["positions"], row["num_sampled"]) for row in rows]),
    }


def one_at_a_time(model) -> torch.Tensor:
    """The sum of the loss over the logits of all examples, each alone."""
    losses = []
    for row in examples():
        logits = model(row["input_ids"][None]).logits[0, row["positions"] - 1]
        losses.append(sparse_kd_loss(logits, row["ids"], row["weights"], row["entropy"], reduction="sum"))
    return torch.stack(losses).sum()


def divergences_one_at_a_time(model) -> list[torch.Tensor]:
    """Of each example's positions, (n, 3) float64: forward KL, its last entries' part, whether first tokens agree."""
    found = []
    for row in examples():
        with torch.no_grad():
            log_probs = model(row["input_ids"][None]).logits[0, row["positions"] - 1].double().log_softmax(-1)
        entries = -row["weights"] * log_probs.gather(1, row["ids"])
        tail = entries[:, -row["num_sampled"] :].sum(1) - row["tail_entropy"]
        agrees = log_probs.argmax(1) == row["ids"][:, 1]
        found.append(torch.stack([entries.sum(1) - row["entropy"], tail, agrees], 1))
    return found


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_the_forward_pass_ends_in_the_loss_of_its_logits(model_type):
    model = random_model(model_type)
    expected = one_at_a_time(model)
    right = gradients(model, expected)
    arguments, target = split_batch(collate(examples()))
    assert set(arguments) == {"input_ids", "attention_mask"}
    loss = StudentLoss(model)(model, arguments, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, found in gradients(model, loss).items():
        torch.testing.assert_close(found, right[name], rtol=1e-4, atol=1e-4 * right[name].abs().max().item())
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, VOCABULARY)  # nothing is left behind


def test_ids_that_only_the_teacher_has_are_left_out_and_told_once(caplog):
    """As of Qwen2.5, whose larger models have 128 rows more than the smaller ones, and no token for them."""
    model, batch, seen = random_model("llama"), collate(examples()), 900
    rows = [row | {"weights": row["weights"] * (row["ids"] < seen)} for row in examples()]
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight[:seen].detach().clone())
    head.out_features = seen
    losses = []
    for row in rows:
        hidden = model.model(row["input_ids"][None]).last_hidden_state[0, row["positions"] - 1]
        log_probs = (hidden @ head.weight.T).double().log_softmax(-1)
        entries = row["weights"] * log_probs.gather(1, row["ids"].clamp(max=seen - 1))
        losses.append(-entries.sum() - row["entropy"].sum())
    loss = StudentLoss(model)
    for _ in range(2):
        found = loss(model, *split_batch(batch))
        assert found.item() == pytest.approx(torch.stack(losses).sum().item(), rel=1e-5)
    lost = 1 - sum(row["weights"].sum() for row in rows) / batch["target_weights"].sum()
    (told,) = caplog.messages
    assert "has 900 token ids" in told and f"weight is {lost:.2g}" in told and 0.05 < lost < 0.2


def test_a_batch_without_targets_is_refused():
    with pytest.raises(
        UsageError,
        match=r"a batch without logits_to_keep, predicting, target_ids, target_weights, entropy, tail_entropy, num_s",
    ):
        split_batch({"input_ids": torch.zeros(1, 3), "labels": torch.zeros(1, 3)})


def trained(
    folder: Path,
    batch_size: int,
    accumulate: int,
    trainer_class=StudentTrainer,
    arguments_class=TrainingArguments,
    model_type: str = "llama",
    bf16: bool = False,  # which TRL takes otherwise
) -> dict[str, torch.Tensor]:
    """The weights after one step of plain gradient descent, what the step logged, and these weights' evaluation."""
    model = random_model(model_type).train()
    options = arguments_class(
        output_dir=str(folder),
        use_cpu=True,
        bf16=bf16,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    known = {} if trainer_class is StudentTrainer else {"processing_class": load_tokenizer(str(MODEL))}
    rows = examples() if trainer_class is StudentTrainer else Dataset.from_list(examples()).with_format("torch")
    data = {"train_dataset": rows, "eval_dataset": [rows[i] for i in range(EVALUATED)], "data_collator": collate}
    trainer = trainer_class(model, options, **data, **known)
    trainer.train()
    figures = trainer.state.log_history[0] | trainer.evaluate()
    return {name: torch.tensor(figures[name]) for name in FIGURES} | model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By one batch of all examples."""
    return trained(tmp_path_factory.mktemp("whole"), 8, 1)


def assert_same_step(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    for name, weights in whole.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-5)


def test_a_step_is_that_of_the_mean_over_all_positions(whole):
    model = random_model("llama").train()
    positions = sum(len(row["positions"]) for row in examples())
    mean = one_at_a_time(model) / positions
    step = gradients(model, mean)
    assert whole["loss"].item() == pytest.approx(mean.item(), rel=1e-5)
    expected = torch.cat(divergences_one_at_a_time(model)).mean(0).tolist()
    logged = [whole[name].item() for name in ("kl", "kl_tail", "agreement")]
    assert logged == pytest.approx(expected, rel=1e-5)
    for name, weights in model.named_parameters():
        torch.testing.assert_close(whole[name], weights.detach() - step[name], rtol=1e-4, atol=1e-5)


def test_batches_that_are_accumulated_are_one(whole, tmp_path):
    """Of different numbers of positions; what is logged is of all of them."""
    assert_same_step(trained(tmp_path, 2, 4), whole)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}), ("cohere", {"logit_scale": 0.8333})],
)
def test_a_student_with_a_tail_takes_its_step_in_bfloat16(monkeypatch, tmp_path, model_type, options):
    """That of float32, but for bfloat16's rounding in all layers."""
    monkeypatch.setitem(ARCHITECTURES, model_type, options)
    wide, narrow = (trained(tmp_path, 8, 1, model_type=model_type, bf16=bf16) for bf16 in (False, True))
    assert narrow["kl"].item() == pytest.approx(wide["kl"].item(), rel=0.02)
    head, before = "lm_head.weight", random_model(model_type).lm_head.weight.detach()
    step = wide[head] - before
    assert (narrow[head] - wide[head]).norm() < 0.05 * step.norm()


def packed(rows: list[dict]) -> dict[str, torch.Tensor]:
    names = {"labels": "input_ids", "target_ids": "ids", "target_weights": "weights"}
    return PackingCollator()([row | {name: row[known] for name, known in names.items()} for row in rows])


@pytest.mark.parametrize(("batch_size", "made"), [(2, collate), (4, packed)])
def test_an_evaluation_is_the_mean_over_all_positions(tmp_path, batch_size, made):
    """Of nine conversations, so that the last batch is smaller; nothing is predicted in the first one."""
    model, rows = random_model("llama"), examples()
    parts = ("positions", "ids", "weights", "entropy", "tail_entropy")
    rows.insert(0, rows[5] | {name: rows[5][name][:0] for name in parts})
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=batch_size)
    found = StudentTrainer(model, options, eval_dataset=rows, data_collator=made).evaluate(metric_key_prefix="own")
    one_by_one = divergences_one_at_a_time(model)
    expected = torch.cat(one_by_one).mean(0)
    kl = [found[f"own_{name}"] for name in ("loss", "kl", "kl_tail", "agreement")]
    assert kl == pytest.approx([expected[0].item(), *expected.tolist()], rel=1e-6)
    spread = sum((each[:, 0] - expected[0]).sum() ** 2 for each in one_by_one) * 8 / 7
    assert found["own_error"] == pytest.approx(spread.sqrt().item() / len(torch.cat(one_by_one)), rel=1e-4)


@pytest.mark.parametrize("cards", [2, 8])
def test_one_process_on_several_cards_is_refused(tmp_path, cards):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments._n_gpu = cards  # what transformers finds where there are so many
    with pytest.raises(UsageError, match=rf"{cards} GPUs.*`torchrun --nproc_per_node {cards} .*CUDA_VISIBLE_DEVICES=0"):
        StudentTrainer(random_model("llama"), arguments, train_dataset=examples(), data_collator=collate)


def test_trls_trainer_takes_the_same_step(whole, tmp_path):
    from trl import SFTConfig

    from chat_logits.training.sft import StudentSFTTrainer

    assert_same_step(trained(tmp_path, 2, 4, StudentSFTTrainer, SFTConfig), whole)


TWO = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from training.test_student import trained
found = trained(sys.argv[1], 2, 2)
torch.save(found, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


def test_two_processes_are_one(whole, tmp_path):
    paths = [str(REPO / part) for part in ("", "tests", "tests/support")]
    (tmp_path / "two.py").write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launcher, tmp_path / "two.py", tmp_path, *paths], stderr=subprocess.PIPE, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        assert_same_step(torch.load(tmp_path / f"{rank}.pt"), whole)
