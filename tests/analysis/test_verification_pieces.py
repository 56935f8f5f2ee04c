"""``verify`` in pieces of few rows says what it says of all logits at once, and never has more of them than a piece."""

import numpy as np
import pytest
import runs
import torch
from random_models import ARCHITECTURES, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import extract_logits
from chat_logits.analysis import reference_output
from chat_logits.analysis.row_check import check_row
from chat_logits.analysis.verification import check_rows, load_recorded_model
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.model.loading import load_model
from chat_logits.model.reference import Outputs
from chat_logits.storage.dataset import open_dataset

ROWS = [0, 3, 40]
BOTH = ["float32", "bfloat16"]
PIECES = [1, 7]
# Two matrix products of other shapes may differ by roundings of the largest logits, of some tens of nats.
CLOSE = {"float32": 2e-5, "bfloat16": 2e-4}


@pytest.fixture(scope="module", params=BOTH)
def run(request, quick_model, calm_source, tmp_path_factory):
    """A run's dataset, its model in the run's dtype, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = runs.flags_for(quick_model, calm_source, folder / "out")
    assert extract_logits.main([*flags, "--dtype", request.param, "--max_samples", "60"]) == 0
    dataset = open_dataset(str(folder / "out"))
    return dataset, load_recorded_model(dataset), load_tokenizer(str(quick_model))


@pytest.fixture
def in_pieces(monkeypatch):
    """Have ``verify`` take so many rows of logits at once."""

    def of(rows: int, vocabulary: int = 4096) -> None:
        monkeypatch.setattr(reference_output, "PIECE_BYTES", rows * vocabulary * 4)

    return of


def checked(dataset, model, tokenizer, change=None):
    """``check_row`` of each of ROWS after ``change(row)``."""
    aligner = RowAligner(tokenizer, dataset.manifest)
    for index in ROWS:
        row = dataset.read_row(index)
        alignment = aligner.align(row)
        if change:
            change(row)
        yield check_row(index, row, alignment, model, dataset.manifest)


def assert_alike(found, expected, dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tolerance == pytest.approx(other.tolerance, abs=CLOSE[dtype])
        assert [fault.column for fault in one.faults] == [fault.column for fault in other.faults]
        for fault, as_whole in zip(one.faults, other.faults, strict=True):
            np.testing.assert_array_equal(fault.wrong, as_whole.wrong)
        assert np.array_equal(one.in_order, other.in_order) and one.shift == other.shift
        for name, errors in other.errors.items():
            np.testing.assert_allclose(one.errors[name], errors, atol=CLOSE[dtype], rtol=1e-4)


@pytest.mark.parametrize("rows", PIECES)
def test_pieces_say_of_a_right_row_what_the_whole_says(run, in_pieces, rows):
    dataset, model, tokenizer = run
    dtype = dataset.manifest.dtype
    whole, checks = check_rows(dataset, model, tokenizer, ROWS), list(checked(dataset, model, tokenizer))
    in_pieces(rows)
    assert_alike(checked(dataset, model, tokenizer), checks, dtype)
    found = check_rows(dataset, model, tokenizer, ROWS)
    assert whole.holds and found.holds and found.num_tokens == whole.num_tokens
    assert found.figures == pytest.approx(whole.figures, abs=CLOSE[dtype], rel=1e-4)
    for name, expected in whole.shifts.items():
        assert found.shifts[name] == pytest.approx(expected, abs=CLOSE[dtype], rel=1e-4)


def exchange_codes(row) -> None:
    codes = np.frombuffer(row["top_logits_quantized"], np.uint8).reshape(row["num_tokens"], -1)
    row["top_logits_quantized"] = np.roll(codes, 1, axis=0).tobytes()


def exchange_draws(row) -> None:
    row["sampled_indices_low"] = np.roll(row["sampled_indices_low"], 16).tolist()


def add_a_nat(row) -> None:
    row["token_log_probs"][-1] += 1


def shift_all(row) -> None:
    for name in ("top_indices_low", "sampled_indices_low"):
        row[name] = np.roll(row[name], len(row[name]) // row["num_tokens"]).tolist()
    for name in ("logsumexp", "token_log_probs"):
        row[name] = np.roll(row[name], 1).tolist()
    exchange_codes(row)


@pytest.mark.parametrize("rows", PIECES)
@pytest.mark.parametrize("damage", [exchange_codes, exchange_draws, add_a_nat, shift_all])
def test_pieces_say_of_a_wrong_row_what_the_whole_says(run, in_pieces, damage, rows):
    dataset, model, tokenizer = run
    whole = list(checked(dataset, model, tokenizer, damage))
    assert any(check.faults for check in whole)
    in_pieces(rows)
    assert_alike(checked(dataset, model, tokenizer, damage), whole, dataset.manifest.dtype)


class WidestLogits(TorchDispatchMode):
    """The bytes of the largest tensor (…, V) that torch made within, as float32, but for the head's (H, V)."""

    def __init__(self, head: torch.Tensor):
        super().__init__()
        (self.vocabulary, hidden), self.bytes = head.shape, 0
        self.head_shape = (hidden, self.vocabulary)

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            shape = tuple(getattr(tensor, "shape", ()))
            if shape[-1:] == (self.vocabulary,) and shape != self.head_shape:
                self.bytes = max(self.bytes, tensor.numel() * 4)
        return made


def test_no_more_logits_are_there_than_a_piece_has(run, in_pieces):
    dataset, model, tokenizer = run
    most = {}
    for rows in (1000, 7):
        in_pieces(rows)
        with WidestLogits(model.lm_head.weight) as seen:
            checks = list(checked(dataset, model, tokenizer))
        most[rows] = seen.bytes
    assert most[7] <= 7 * 4096 * 4  # each number counted as float32
    assert most[1000] > 4096 * 4 * max(len(check.in_order) for check in checks) > 10 * most[7]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_are_the_models_own_whatever_it_does_behind_its_head(family):
    """Soft caps, scales: each row of a piece against the forward pass of the whole."""
    model, ids = random_model(family), np.random.default_rng(0).integers(0, 1000, 40)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0]
    for most in (40, 9, 1):
        outputs = Outputs(model, ids, most)
        for at in np.split(np.arange(40)[::-1].copy(), range(most, 40, most)):
            torch.testing.assert_close(outputs.rows(at), expected[at], atol=2e-5, rtol=1e-5)


def test_layers_on_disk_give_the_same_rows_in_pieces(tmp_path):
    random_model("gemma2").save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 1000, 30)
    spread = load_model(str(tmp_path), device_map="auto", max_memory={"cpu": 0})
    found, expected = (Outputs(model, ids, most) for model, most in ((spread, 8), (load_model(str(tmp_path)), 30)))
    for at in np.split(np.arange(30), range(8, 30, 8)):
        torch.testing.assert_close(found.rows(at), expected.rows(at), atol=2e-5, rtol=1e-5)
