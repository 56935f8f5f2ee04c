"""Small students taught from stored rows of a real model end as near to it as one that had its whole distribution.

A student is a linear map between the main directions of the teacher's own last hidden states and those of its
vocabulary matrix, too few of both to be the teacher. What it learns from are the command's rows, thinned by the
package; the whole distribution, and the distance on conversations that were kept out, are plain torch.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from chat_logits.analysis.thinning import Setting, thin_row
from chat_logits.data.row_alignment import RowAligner
from chat_logits.storage.dataset import open_dataset
from chat_logits.training.loss import fused_sparse_kd_loss
from chat_logits.training.targets import row_targets

INPUTS, OUTPUTS = 64, 32  # directions
HELD_OUT = 8  # conversations of 32
STEPS, BATCH, RATE = 40, 128, 0.01  # positions; of Adam
# K, S and p; None for the teacher's whole distribution
ARMS = {
    "oracle": None,
    "k64-draws": Setting(64, 16, 0.98),
    "k8-draws": Setting(8, 8, 0.9),
    "k8-renormalised": Setting(8, 0, 0.9),
}


class Classroom:
    """Of n positions: the student's inputs (n, INPUTS), the teacher's probabilities (n, V), and targets by arm."""

    def __init__(self, folder, model, tokenizer):
        stored = open_dataset(str(folder))
        rows = [stored.read_row(i) for i in range(stored.num_rows)]
        alignments = RowAligner(tokenizer, stored.manifest).align_all(rows)
        hidden = [last_hidden(model, alignment) for alignment in alignments]
        self.conversation = np.repeat(np.arange(len(rows)), [len(states) for states in hidden])
        states, head = torch.cat(hidden), model.get_output_embeddings().weight.detach()
        self.probs = (states @ head.T).softmax(-1)
        self.inputs, self.head = in_main_directions(states, INPUTS), in_main_directions(head, OUTPUTS)
        self.targets = {
            arm: joined([targets_of(*each, setting, stored.manifest) for each in zip(rows, alignments, strict=True)])
            for arm, setting in ARMS.items()
            if setting
        }

    def taught(self, arm: str, seed: int) -> float:
        """The held-out cross-entropy, nats, of a student of this arm: its KL and what no student changes."""
        generator = np.random.default_rng(seed)
        kept_out = generator.choice(self.conversation[-1] + 1, HELD_OUT, replace=False)
        is_held_out = np.isin(self.conversation, kept_out)
        student = torch.zeros(INPUTS, OUTPUTS, requires_grad=True)
        optimizer = torch.optim.Adam([student], RATE)
        for _ in range(STEPS):
            rows = torch.from_numpy(generator.choice(np.flatnonzero(~is_held_out), BATCH, replace=False))
            self.loss(arm, student, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return self.dense_loss(student, torch.from_numpy(np.flatnonzero(is_held_out))).item()

    def loss(self, arm: str, student: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if arm == "oracle":
            return self.dense_loss(student, rows)
        ids, weights = (values[rows] for values in self.targets[arm])
        return fused_sparse_kd_loss(self.inputs[rows] @ student, self.head, ids, weights)

    def dense_loss(self, student: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.inputs[rows] @ student @ self.head.T, self.probs[rows])


def in_main_directions(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Their parts along the ``count`` directions in which they are longest, (n, count)."""
    return rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -count:]


@torch.no_grad()
def last_hidden(model, alignment) -> torch.Tensor:
    states = model.model(torch.from_numpy(alignment.input_ids.astype(np.int64))[None]).last_hidden_state[0]
    return states[torch.from_numpy(alignment.positions) - 1]


def targets_of(row, alignment, setting, manifest):
    """Those of the thinned row, without ends of turns."""
    thinned = thin_row(row, setting, manifest)
    return row_targets(thinned, alignment, end_of_turn="skip", allow_biased=setting.num_sampled == 0)


def joined(targets: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights (n, M)."""
    return tuple(
        torch.from_numpy(np.concatenate([getattr(each, name) for each in targets])) for name in ("token_ids", "weights")
    )


@pytest.fixture(scope="module")
def losses(real_extraction, smollm2) -> dict[str, np.ndarray]:
    """By arm, the held-out cross-entropy, nats, with each of three seeds."""
    classroom = Classroom(real_extraction, *smollm2)
    return {arm: np.array([classroom.taught(arm, seed) for seed in range(3)]) for arm in ARMS}


def test_the_students_learn(losses):
    untaught = np.log(49_152)
    assert all((found < untaught - 4).all() for found in losses.values())


def test_draws_teach_as_the_whole_distribution_does(losses):
    assert (losses["k64-draws"] - losses["oracle"]).max() <= 0.003


def test_a_renormalised_nucleus_is_five_times_worse_than_one_with_draws(losses):
    with_draws, renormalised = (losses[arm] - losses["oracle"] for arm in ("k8-draws", "k8-renormalised"))
    assert (renormalised >= 5 * np.abs(with_draws)).all()
