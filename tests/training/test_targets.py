"""Targets of stored rows: weights by hand, against the codec's reading of single positions, and over many draws against
the whole distribution."""

import numpy as np
import pytest
import torch
from conftest import TEMPLATE

from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.alignment import Aligner, Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import skipped_token_ids
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model.selection import PendingDistributions, SelectionSettings, select
from chat_logits.training.loss import sparse_kd_loss
from chat_logits.training.targets import Targets, row_targets
from logit_codec import CODE_PROBS, dequantize_all_logits, draw_uniforms, encode_rows, pack_indices, row_entries

LN = np.log


def row_of(top: list[list[tuple]], sampled: list[list[tuple]]) -> dict:
    """A stored row of positions with these (id, code) entries."""
    row = {"num_tokens": len(top)}
    for kind, positions in (("top", top), ("sampled", sampled)):
        entries = [entry for position in positions for entry in position]
        low, high = pack_indices([token_id for token_id, _ in entries])
        codes = bytes(code for _, code in entries)
        row |= {f"{kind}_logits_quantized": codes, f"{kind}_indices_low": low.tolist(), f"{kind}_indices_high": high}
    return row


def aligned(*input_ids: int, ends: tuple[int, ...] = (), prompt: int = 1) -> Alignment:
    """A conversation of these ids, all extracted behind the prompt but the ends."""
    reasons = ["prompt" if i < prompt else "special token" if i in ends else None for i in range(len(input_ids))]
    return Alignment(np.array(input_ids), reasons, 0, ends)


# Code 255 is p = 1, 170 is sin(π/3)^6 = 27/64, and 85 is sin(π/6)^6 = 1/64.


def test_weights_by_hand():
    """27/64 + 1/64 leave 36/64: 18/64 for each of the two draws, which are one id."""
    row = row_of([[(200_000, 170), (5, 85), (0, 0)]], [[(7, 85), (7, 85)]])
    targets = row_targets(row, aligned(1, 5))
    assert targets.positions.tolist() == [1]
    assert targets.token_ids.tolist() == [[0, 200_000, 5, 0, 7, 7]]
    assert (targets.weights * 64).tolist() == [[0, 27, 1, 0, 18, 18]]
    expected = -(27 * LN(27 / 64) + 1 * LN(1 / 64) + 36 * LN(1 / 64)) / 64
    assert targets.entropy.tolist() == [pytest.approx(expected, rel=1e-6)]
    assert targets.tail_entropy.tolist() == [pytest.approx(36 / 64 * LN(64), rel=1e-6)]
    dtypes = [array.dtype for array in vars(targets).values()]
    assert dtypes == [np.int64, np.int32, np.float32, np.float32, np.float32]


def test_the_target_tokens_own_share_by_hand():
    """A quarter for the target token, 5, beside its 1/64 in the nucleus; three quarters of all else and of entropy."""
    row = row_of([[(9, 170), (5, 85)]], [[(7, 85), (8, 85)]])
    soft, mixed = row_targets(row, aligned(1, 5)), row_targets(row, aligned(1, 5), hard_weight=0.25)
    assert mixed.token_ids.tolist() == [[5, 9, 5, 7, 8]]
    assert (mixed.weights * 256).tolist() == [[64, 81, 3, 54, 54]]
    assert mixed.entropy[0] == pytest.approx(0.75 * soft.entropy[0])
    assert mixed.tail_entropy[0] == pytest.approx(0.75 * soft.tail_entropy[0])
    hard = row_targets(row, aligned(1, 5), hard_weight=1)
    assert (hard.weights.tolist(), hard.entropy.tolist()) == ([[1, 0, 0, 0, 0]], [0])


TOTALS = {
    "a token that is certain": ([(9, 255), (0, 0)], [(7, 1), (8, 1)], [1, 0, 0, 0], 0),
    "no draw was left": ([(9, 170), (5, 85)], [(0, 0), (0, 0)], [27 / 28, 1 / 28, 0, 0], None),
    "codes that add up to more than 1": ([(9, 170), (5, 170), (3, 170)], [(7, 85)], [1 / 3, 1 / 3, 1 / 3, 0], LN(3)),
    "no draws are stored": ([(9, 170), (5, 85)], [], [27 / 28, 1 / 28], None),
}


@pytest.mark.parametrize(("top", "sampled", "weights", "entropy"), TOTALS.values(), ids=TOTALS)
def test_weights_total_1(top, sampled, weights, entropy):
    targets = row_targets(row_of([top], [sampled]), aligned(1, 5), allow_biased=True)
    np.testing.assert_allclose(targets.weights, [[0, *weights]], rtol=1e-6)
    present = [weight for weight in weights if weight]
    entropy = -sum(weight * LN(weight) for weight in present) if entropy is None else entropy
    assert targets.entropy[0] == pytest.approx(entropy, abs=1e-6)
    assert targets.tail_entropy[0] == 0  # in none of these has a draw any weight


@pytest.fixture(scope="module")
def run_rows(quick_run) -> list[tuple[dict, Alignment]]:
    """The rows of a run, and their alignments."""
    dataset, tokenizer = open_with_tokenizer(str(quick_run))
    aligner = RowAligner(tokenizer, dataset.manifest)
    return [(row, aligner.align(row)) for row in dataset.rows()]


def test_each_position_is_what_the_codec_reads_there(run_rows):
    """Weights by id, repeated ones added up, and the entropy of these."""
    for row, alignment in run_rows[:8]:
        targets = row_targets(row, alignment, end_of_turn="skip")
        assert targets.positions.tolist() == alignment.positions.tolist()
        np.testing.assert_allclose(targets.weights.sum(axis=1), 1, atol=1e-6)
        for i in range(row["num_tokens"]):
            read = dequantize_all_logits(row, i)
            expected = dict(zip(read.token_ids.tolist(), read.weights.tolist(), strict=True))
            found: dict = {}
            for token_id, weight in zip(targets.token_ids[i].tolist(), targets.weights[i].tolist(), strict=True):
                found[token_id] = found.get(token_id, 0) + weight
            assert {k: v for k, v in found.items() if v} == pytest.approx(
                {k: v for k, v in expected.items() if v}, rel=1e-5, abs=1e-7
            )
            assert targets.entropy[i] == pytest.approx(-(read.weights * read.log_probs).sum(), rel=1e-5)


def test_rows_as_arrays_give_the_same(run_rows):
    row, alignment = run_rows[0]
    arrays = dict(row)
    for name, value in row.items():
        if name.endswith(("quantized", "high")):
            arrays[name] = np.frombuffer(value, np.uint8)
        elif name.endswith("low"):
            arrays[name] = np.array(value, np.uint16)
    for one, other in zip(
        vars(row_targets(row, alignment)).values(), vars(row_targets(arrays, alignment)).values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


# --- ends of turns ---


@pytest.fixture
def two_turns(smollm2):
    """A conversation of two turns with SmolLM2's tokenizer, and a row for it."""
    tokenizer = smollm2[1]
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"), tokenizer.special_tokens_map, {})
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]

    def make(keep_end_of_turn: bool) -> tuple[dict, Alignment]:
        skipped = skipped_token_ids(tokenizer)
        alignment = Aligner(tokenizer, template, skipped, keep_end_of_turn=keep_end_of_turn).align(messages)
        n = len(alignment.positions)
        return row_of([[(9, 170), (5, 85)]] * n, [[(7, 85), (8, 85)]] * n), alignment

    return make, tokenizer


def taught(targets: Targets, alignment: Alignment, tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens(alignment.input_ids[targets.positions].tolist())


def test_ends_of_turns_are_taught_as_they_are(two_turns):
    make, tokenizer = two_turns
    row, alignment = make(False)
    hard, skipped = (row_targets(row, alignment, end_of_turn=how) for how in ("hard", "skip"))
    assert taught(hard, alignment, tokenizer) == ["Hello", "!", "<|im_end|>", "4", "<|im_end|>"]
    assert taught(skipped, alignment, tokenizer) == ["Hello", "!", "4"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends, others = [2, 4], [0, 1, 3]
    assert hard.token_ids[ends].tolist() == [[end, 0, 0, 0, 0]] * 2
    assert hard.weights[ends].tolist() == [[1, 0, 0, 0, 0]] * 2
    assert hard.entropy[ends].tolist() == hard.tail_entropy[ends].tolist() == [0, 0]
    for name, array in vars(skipped).items():
        np.testing.assert_array_equal(getattr(hard, name)[others], array)


@pytest.mark.parametrize("how", ["hard", "skip"])
def test_ends_of_turns_that_were_extracted_have_their_own_distribution(two_turns, how):
    make, tokenizer = two_turns
    row, alignment = make(True)
    targets = row_targets(row, alignment, end_of_turn=how)
    assert taught(targets, alignment, tokenizer) == ["Hello", "!", "<|im_end|>", "4", "<|im_end|>"]
    assert targets.token_ids.tolist() == [[0, 9, 5, 7, 8]] * 5


# --- over the draws ---

UNIFORMS, DIRECTIONS = 4_000, 20


@pytest.fixture(scope="module")
def real_logits(smollm2, real_alignments) -> torch.Tensor:
    """The teacher's logits at three positions of a real answer, (3, 49152) float32."""
    alignment = real_alignments[0]
    with torch.inference_mode():
        logits = smollm2[0](torch.from_numpy(alignment.input_ids)[None]).logits[0]
    return logits[alignment.positions[[0, 10, 40]] - 1].clone()


def stored_many_times(logits: torch.Tensor, settings: SelectionSettings) -> dict:
    """A row of one position's distribution as the toolkit selects and encodes it, once for each of the uniforms."""
    uniforms = torch.from_numpy(draw_uniforms(0, 0, UNIFORMS))
    tokens = torch.zeros(500, dtype=torch.long)
    parts = [select(logits.repeat(500, 1), tokens, some, settings) for some in uniforms.split(500)]
    (row,) = encode_rows(PendingDistributions(parts).wait(), [UNIFORMS], np.zeros(UNIFORMS))
    return row


def expected_target(probabilities: torch.Tensor, row: dict) -> torch.Tensor:
    """What the weights mean: the nucleus' codes, and what they leave spread over the tail as the teacher has it."""
    ids, codes = (entries[0] for entries in row_entries(row, "top"))
    kept = torch.from_numpy(ids[codes != 0]).long()
    nucleus = torch.from_numpy(CODE_PROBS[codes[codes != 0]])
    tail = probabilities.index_fill(0, kept, 0)
    return (tail * (1 - nucleus.sum()) / tail.sum()).index_copy(0, kept, nucleus)


@pytest.mark.parametrize("position", range(3))
def test_the_mean_gradient_over_the_draws_is_the_exact_one(real_logits, position):
    """In 20 random directions, within 4 standard errors of 4,000 uniforms. Exact but for the codes' rounding, which is
    the same whatever is drawn: at most 2.5% of the teacher's distribution."""
    teacher = real_logits[position]
    row = stored_many_times(teacher, SelectionSettings(top_k=64, top_p=0.98, num_sampled=16))
    targets = row_targets(row, aligned(*range(UNIFORMS + 1)))
    generator = torch.Generator().manual_seed(position)
    student = (0.8 * teacher + torch.randn(teacher.shape, generator=generator)).requires_grad_()
    ids, weights = torch.from_numpy(targets.token_ids), torch.from_numpy(targets.weights)
    # The loss is linear in the target: the mean of the gradients is the gradient of the mean target.
    sparse_kd_loss(student[None], ids.reshape(1, -1), weights.reshape(1, -1) / UNIFORMS).backward()
    probabilities = teacher.double().softmax(dim=0)
    meant = expected_target(probabilities, row)
    exact = student.detach().double().softmax(dim=0) - meant
    directions = torch.randn(DIRECTIONS, len(teacher), generator=generator, dtype=torch.float64)
    of_each = torch.stack([(weights * direction[ids.long()]).sum(dim=1) for direction in directions])
    standard_errors = of_each.std(dim=1) / UNIFORMS**0.5
    assert ((directions @ (student.grad.double() - exact)).abs() < 4 * standard_errors).all()
    assert (meant - probabilities).norm() < 0.025 * probabilities.norm()
    entropy = -(meant * probabilities.log()).sum().item()
    assert targets.entropy.mean() == pytest.approx(entropy, abs=0.02)


# --- what is refused ---

ROW = ([[(9, 170), (5, 85)]], [[(7, 85), (8, 85)]])


def test_rows_without_draws_are_refused_with_what_they_cost():
    row = row_of(ROW[0], [[]])
    with pytest.raises(UsageError, match=r"`num_sampled` 0.* 0\.145 nats .* 0\.002 .* or give `allow_biased`\.$"):
        row_targets(row, aligned(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_weight": 1.5}, "hard_weight 1.5: expected 0 to 1"),
        ({"hard_weight": float("nan")}, "hard_weight nan: expected 0 to 1"),
        ({"end_of_turn": "soft"}, "end_of_turn 'soft': expected one of hard, skip"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        row_targets(row_of(*ROW), aligned(1, 5), **options)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ToolkitError, match="2 aligned positions for a row of 1 extracted tokens"):
        row_targets(row_of(*ROW), aligned(1, 5, 6))
    with pytest.raises(ToolkitError, match="a position without any entry"):
        row_targets(row_of([[(0, 0)]], [[(0, 0)]]), aligned(1, 5))
