"""Packed and padded batches: against examples one at a time, on models of several families."""

import numpy as np
import pytest
import torch
from random_models import random_model
from transformers import AutoConfig, AutoModelForCausalLM

from chat_logits.errors import UsageError
from chat_logits.training.collator import PackingCollator, PaddingCollator, model_inputs, refuse_packing
from chat_logits.training.loss import sparse_kd_loss

LENGTHS, VOCAB, WIDTH = (5, 17, 1, 9, 12), 1000, 7
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "cohere")


def example(length: int, rng: np.random.Generator) -> dict:
    """Random ids and targets of an example, all but its first tokens and some others taught."""
    positions = np.flatnonzero(rng.random(length) < 0.6)
    positions = positions[positions > 0]
    input_ids = rng.integers(1, VOCAB, length)
    labels = np.full(length, -100)
    labels[positions] = input_ids[positions]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "positions": positions,
        "target_ids": rng.integers(0, VOCAB, (len(positions), WIDTH)).astype(np.int32),
        "target_weights": rng.dirichlet(np.ones(WIDTH), len(positions)).astype(np.float32),
        "entropy": rng.random(len(positions)).astype(np.float32),
        "tail_entropy": rng.random(len(positions)).astype(np.float32),
        "num_sampled": int(rng.integers(1, 4)),
        "source_index": 0,
    }


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    rng = np.random.default_rng(0)
    return [example(length, rng) for length in LENGTHS]


def with_gradients(model, loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.item(), [weights.grad.clone() for weights in model.parameters()]


def batch_loss(model, batch: dict) -> torch.Tensor:
    """The loss of a collator's batch, of the logits that the model computes for it."""
    logits = model(**model_inputs(batch)).logits
    assert logits.shape[1] == len(batch["logits_to_keep"])
    predicted = logits.flatten(0, 1)[batch["predicting"]]
    return sparse_kd_loss(predicted, batch["target_ids"], batch["target_weights"], batch["entropy"])


def loss_one_at_a_time(model, examples: list[dict]) -> torch.Tensor:
    """The same, of all logits of each example alone."""
    total = torch.zeros(())
    for one in examples:
        logits = model(input_ids=torch.tensor(one["input_ids"])[None]).logits[0]
        target = [torch.tensor(one[name]) for name in ("target_ids", "target_weights", "entropy")]
        total = total + sparse_kd_loss(logits[one["positions"] - 1], *target, reduction="sum")
    return total / sum(len(one["positions"]) for one in examples)


# mistral and the gemmas have windows of 6 tokens, the gemmas a soft cap.
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("gemma2", "eager"), *((name, way) for name in FAMILIES if name != "gemma2" for way in ("sdpa", "eager"))],
)
def test_packed_padded_and_one_at_a_time_are_the_same(model_type, attention, examples):
    """Loss and the gradients of all weights, with a cache in the model's config; dropout is none."""
    model = random_model(model_type)
    model.set_attn_implementation(attention)
    model.config.use_cache = True
    model.train()
    expected, gradients = with_gradients(model, loss_one_at_a_time(model, examples))
    for collator in (PackingCollator(), PaddingCollator(pad_token_id=3)):
        loss, found = with_gradients(model, batch_loss(model, collator(examples)))
        assert loss == pytest.approx(expected, abs=1e-4)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_packed_batch_by_hand():
    rng = np.random.default_rng(1)
    parts = [
        {**example(3, rng), "input_ids": np.array([7, 8, 9]), "labels": np.array([-100, 8, 9]), "positions": [1, 2]},
        {**example(2, rng), "input_ids": np.array([5, 6]), "labels": np.array([-100, 6]), "positions": [1]},
    ]
    for part in parts:
        n = len(part["positions"])
        part |= {"target_ids": np.full((n, 2), n), "target_weights": np.full((n, 2), 0.5), "num_sampled": 10 * n}
        part |= {"entropy": np.full(n, 0.5), "tail_entropy": np.full(n, 0.25 * n)}
    packed, padded = PackingCollator()(parts), PaddingCollator(pad_token_id=1)(parts)
    assert packed["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[-100, 8, 9, -100, 6]]
    assert (packed["logits_to_keep"].tolist(), packed["predicting"].tolist()) == ([0, 1, 3], [0, 1, 2])
    assert padded["input_ids"].tolist() == [[7, 8, 9], [5, 6, 1]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[-100, 8, 9], [-100, 6, -100]]
    assert (padded["logits_to_keep"].tolist(), padded["predicting"].tolist()) == ([0, 1], [0, 1, 2])
    for batch in (packed, padded):
        assert batch["target_ids"].tolist() == [[2, 2], [2, 2], [1, 1]]
        assert (batch["num_sampled"].tolist(), batch["tail_entropy"].tolist()) == ([20, 20, 10], [0.5, 0.5, 0.25])


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
TOGETHER = {
    "mamba": SMALL,  # a state along the row
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # positions of the row
    "recurrent_gemma": {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
}


@pytest.mark.parametrize("model_type", TOGETHER)
def test_models_that_packed_examples_would_meet_in_are_refused(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TOGETHER[model_type]))
    with pytest.raises(UsageError, match=f"{type(model).__name__} does not keep packed conversations apart"):
        refuse_packing(model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_that_keep_them_apart_are_not(model_type):
    model = random_model(model_type).train()
    refuse_packing(model)
    refuse_packing(model.bfloat16())
    assert model.training
