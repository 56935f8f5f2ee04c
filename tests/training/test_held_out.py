"""A student's distance from stored distributions, against its logits one example at a time."""

import math

import pytest
import torch
from random_models import random_model
from training.test_student import collate, divergences_one_at_a_time, examples

from chat_logits.errors import UsageError
from chat_logits.training.held_out import held_out


def written_out(model) -> list[tuple[int, float, float, float]]:
    """Of each example: positions, the sums of forward KL and of its tail's part, and where first tokens agree."""
    return [(len(each), *each.sum(0).tolist()) for each in divergences_one_at_a_time(model)]


def packed(rows: list[dict]) -> dict:
    """One behind another."""
    starts = [sum(len(row["input_ids"]) for row in rows[:i]) for i in range(len(rows))]
    batch = collate(rows)
    columns = torch.cat([row["positions"] - 1 + start for row, start in zip(rows, starts, strict=True)])
    return {
        **{name: batch[name] for name in ("target_ids", "target_weights", "entropy", "tail_entropy", "num_sampled")},
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "logits_to_keep": columns,
        "predicting": torch.arange(len(columns)),
        "use_cache": False,
    }


@pytest.mark.parametrize(("batch_size", "made"), [(1, collate), (8, collate), (3, packed)])
def test_the_mean_is_over_positions_and_its_error_over_conversations(batch_size, made):
    model = random_model("gemma2")
    rows = written_out(model)
    model.train()
    found = held_out(model, [made(examples()[i : i + batch_size]) for i in range(0, 8, batch_size)])
    assert model.training
    assert (found.conversations, found.positions) == (8, sum(count for count, *_ in rows))
    mean = sum(kl for _, kl, _, _ in rows) / found.positions
    assert found.kl == pytest.approx(mean, rel=1e-5)
    assert found.kl_tail == pytest.approx(sum(tail for _, _, tail, _ in rows) / found.positions, rel=1e-5)
    assert found.agreement == pytest.approx(sum(agreeing for *_, agreeing in rows) / found.positions, rel=1e-12)
    variance = sum((kl - mean * count) ** 2 for count, kl, _, _ in rows) * 8 / 7
    assert found.error == pytest.approx(math.sqrt(variance) / found.positions, rel=1e-4)


def test_a_student_that_fails_on_a_batch_is_left_as_it_was():
    model = random_model("llama").train()
    with pytest.raises(UsageError, match="a batch without"):
        held_out(model, [collate(examples()[:1]), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])
    assert model.training


def test_one_conversation_has_no_error():
    assert math.isnan(held_out(random_model("llama"), [collate(examples()[:1])]).error)


def test_agreement_is_seen():
    """A target whose first nucleus entry is the student's own most probable token."""
    model, rows = random_model("llama"), examples()
    for row in rows:
        with torch.no_grad():
            row["ids"][:, 1] = model(row["input_ids"][None]).logits[0, row["positions"] - 1].argmax(1)
    assert held_out(model, [collate(rows)]).agreement == 1.0
    for row in rows:  # what ends a turn: the target token alone
        row["ids"][:, 0], row["weights"][:] = row["ids"][:, 1], 0
        row["ids"][:, 1:], row["weights"][:, 0] = 0, 1
    assert held_out(model, [collate(rows)]).agreement == 1.0
