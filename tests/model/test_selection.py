"""Selection in both its ways, plain torch and the Triton kernels (in its interpreter), against the plain reference."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO
from selection_reference import assert_is_reference, exact_log_probs
from triton.runtime.interpreter import InterpreterBuilder

import logit_codec
from chat_logits.model import selection, selection_kernel
from chat_logits.model.selection import PendingDistributions, SelectionSettings

WAYS = {"torch": selection.select, "kernel": selection_kernel.select}


@pytest.fixture(params=WAYS)
def select(request):
    """``select(logits, uniforms, K, p, S, tokens)`` for logits (n, V), an array or a tensor."""

    def run(logits, uniforms, top_k, top_p, num_sampled, tokens=None) -> logit_codec.Distributions:
        logits = torch.as_tensor(logits).clone()
        tokens = torch.zeros(len(logits), dtype=torch.long) if tokens is None else torch.as_tensor(tokens)
        uniforms = torch.tensor(uniforms, dtype=torch.float64)
        settings = SelectionSettings(top_k, top_p, num_sampled)
        return PendingDistributions([WAYS[request.param](logits, tokens, uniforms, settings)]).wait()

    run.way = request.param
    return run


@pytest.mark.parametrize(
    "vocabulary, rows", [(3, 9), (127, 6), (128, 6), (129, 6), (1000, 6), (50_257, 2), (262_145, 1)]
)
@pytest.mark.parametrize("top_p", [0.5, 0.98, 1.0])
def test_selection_is_the_reference(select, vocabulary, rows, top_p):
    rows *= 6 if select.way == "torch" else 1
    rng = np.random.default_rng(vocabulary)
    logits, uniforms = rng.normal(0, 4, (rows, vocabulary)).astype(np.float32), rng.random(rows)
    tokens = rng.integers(0, vocabulary, rows)
    found = select(logits, uniforms, min(16, vocabulary), top_p, 8, tokens)
    assert_is_reference(found, logits, uniforms, min(16, vocabulary), top_p, 8)
    right = np.take_along_axis(exact_log_probs(logits), tokens[:, None], 1)[:, 0]
    np.testing.assert_allclose(found.token_log_probs, right, atol=2e-6)


@pytest.mark.parametrize("top_k, num_sampled", [(1, 0), (1, 1), (300, 3)])
def test_any_k_and_any_number_of_draws(select, top_k, num_sampled):
    """Up to the whole vocabulary, after which there is nothing to draw."""
    rng = np.random.default_rng(1)
    logits, uniforms = rng.normal(0, 2, (2, 300)).astype(np.float32), rng.random(2)
    found = select(logits, uniforms, top_k, 1.0, num_sampled)
    assert_is_reference(found, logits, uniforms, top_k, 1.0, num_sampled)
    assert found.sampled_ids.shape == (2, num_sampled)
    assert (found.sampled_ids == -1).all() == (top_k == 300 or num_sampled == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied", "partly -inf"])
def test_every_kind_of_logits_in_every_dtype(select, dtype, kind):
    """With 16 bits, and in flat and tied rows, probabilities are equal in droves: then any order will do."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 700, generator=generator)
    if kind == "peaked":
        logits[:, 300] += 30
    if kind == "flat":
        logits = logits * 0 + 1.5
    if kind == "tied":
        logits = logits.round()
    if kind == "partly -inf":
        logits[:, 5:640] = -torch.inf
    logits, uniforms = logits.to(dtype), np.random.default_rng(2).random(4)
    found = select(logits, uniforms, 12, 0.9, 6)
    assert_is_reference(found, logits, uniforms, 12, 0.9, 6, ties=True)
    if select.way == "kernel":  # which takes the lowest id first, as the reference does
        assert_is_reference(found, logits, uniforms, 12, 0.9, 6)


def test_logsumexp_is_within_two_millionths(select):
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (64 if select.way == "torch" else 4, 151_936)).astype(np.float32)
    found = select(logits, np.zeros(len(logits)), 4, 0.9, 0).logsumexp
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    assert np.abs(found - exact).max() < 2e-6


def test_ids_that_cannot_be_stored_take_no_place(select):
    """Rows beyond 2**18 and logits of -inf count in logsumexp alone; what is then missing is absent."""
    logits = np.full((2, 2**18 + 64), -30, np.float32)
    logits[:, 2**18 + 5] = 9  # the most probable of all
    logits[:, 7], logits[:, 3] = 5, 4
    logits[1] = -np.inf
    logits[1, [2, 2**18 + 5]] = [1, 9]
    found = select(logits, [0.5, 0.5], 3, 1.0, 2)
    assert found.top_ids[0][:2].tolist() == [7, 3]
    np.testing.assert_allclose(found.top_probs[0][0], np.exp(5 - found.logsumexp[0]), rtol=1e-6)
    assert found.top_probs[0][0] < 0.02
    assert found.top_ids[1].tolist() == [2, -1, -1]
    assert found.sampled_ids[1].tolist() == [-1, -1]
    assert (found.sampled_ids[0] < 2**18).all() and (found.sampled_ids[0] >= 0).all()


def test_a_vocabulary_smaller_than_k_leaves_places_absent(select):
    found = select(np.zeros((1, 3), np.float32), [0.1], 5, 1.0, 2)
    assert sorted(found.top_ids[0][:3]) == [0, 1, 2] and found.top_ids[0][3:].tolist() == [-1, -1]
    assert found.sampled_ids.tolist() == [[-1, -1]]


def test_the_kernel_moves_at_most_six_bytes_a_logit(monkeypatch):
    """Counted from its loads and stores; a launch more or less does not depend on the number of rows."""
    moved, launches = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        found = load(self, pointers, mask, *rest)
        moved.append(mask.data.sum() * found.data.itemsize)
        return found

    def counting_store(self, pointers, value, mask, *rest):
        moved.append(mask.data.sum() * value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    for name in ("_block_sums", "_select_row"):
        kernel = getattr(selection_kernel, name)
        monkeypatch.setattr(selection_kernel, name, Counted(kernel, launches))
    logits, settings = torch.randn(2, 151_936), SelectionSettings(64, 0.98, 16)
    selection_kernel.select(logits, torch.zeros(2, dtype=torch.long), torch.full((2,), 0.5).double(), settings)
    assert 4 <= sum(moved) / logits.numel() <= 6
    assert len(launches) == 2


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_show_in_their_own_position(select, bad):
    logits = np.zeros((3, 8), np.float32)
    logits[1, 2] = bad
    found = select(logits, [0.5] * 3, 2, 0.9, 1)
    assert np.isfinite(found.logsumexp).tolist() == [True, False, True]
    alone = select(np.zeros((1, 8), np.float32), [0.5], 2, 0.9, 1)
    for name in ("top_ids", "top_probs", "sampled_ids", "logsumexp"):
        np.testing.assert_array_equal(getattr(found, name)[2], getattr(alone, name)[0])


def test_the_kernel_is_used_where_it_runs(caplog):
    """Here in the interpreter; in a process without it Triton finds nothing to build for, as without a compiler."""
    row = torch.device("cpu"), torch.bfloat16, 1000, SelectionSettings(4, 0.98, 2)
    assert selection.has_kernel(*row) and not caplog.messages
    code = "import torch; from chat_logits.model.selection import *; print(has_kernel(torch.device('cpu'), *{}))"
    code = code.format("(torch.bfloat16, 1000, SelectionSettings(4, 0.98, 2))")
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPO)}
    alone = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert alone.stdout == "False\n"
    (told,) = alone.stderr.splitlines()
    assert told.startswith("Selection is in plain torch, which is slower: Triton's kernel does not run on cpu (")


FOR_CARDS = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from chat_logits.model import selection_kernel
from chat_logits.model.selection_kernel import BLOCK, BLOCKS_A_PROGRAM

numbers = {"tokens": "*i64", "top_ids": "*i64", "sampled_ids": "*i64", "maxima": "*fp32", "sums": "*fp32"}
floats = ("uniforms", "top_probs", "sampled_probs", "logsumexp", "token_log_probs")
settings = {"top_p": 0.98, "top_k": 64, "num_sampled": 16, "padded_blocks": 2048, "block_size": BLOCK}
settings["blocks_a_program"] = BLOCKS_A_PROGRAM
for kernel in (selection_kernel._block_sums, selection_kernel._select_row):
    kinds = numbers | dict.fromkeys(floats, "*fp64") | {"logits": sys.argv[2]}
    signature = {p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in kernel.params}
    constants = {(kernel.arg_names.index(p.name),): settings[p.name] for p in kernel.params if p.is_constexpr}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
    print(made.name, len(made.asm["cubin"]) > 1000)
"""


@pytest.mark.parametrize(("capability", "dtype"), [(75, "*fp16"), (80, "*bf16"), (90, "*fp32"), (120, "*fp32")])
def test_the_kernels_can_be_built_for_cards(tmp_path, capability, dtype):
    """For a T4, an A100, an H100 and a GeForce of the 50 series, by Triton's compiler and NVIDIA's assembler."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPO), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FOR_CARDS, str(capability), dtype]
    built = subprocess.run(command, env=env, capture_output=True, text=True)
    assert built.stdout == "_block_sums True\n_select_row True\n", built.stderr
