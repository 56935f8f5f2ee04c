"""The check at start-up: it lets right models pass, finds what conversations may not share, and stops at faults."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODEL
from test_teacher_model import plain_logits, request
from transformers import AutoConfig, AutoModelForCausalLM

from chat_logits.analysis.reference_output import Output
from chat_logits.data.alignment import Alignment
from chat_logits.data.reader import Aligned
from chat_logits.errors import ToolkitError
from chat_logits.model.batching import Batches, Sharing
from chat_logits.model.loading import load_model
from chat_logits.model.probe import NOTHING, named_windows, probe_model, row_differences, row_limits
from chat_logits.model.teacher import Request, Teacher

MASKS = {"-1e4": -1e4, "finfo.min": torch.finfo(torch.bfloat16).min, "-inf": -torch.inf}
TINY = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
BOTH = [torch.float32, torch.bfloat16]


def tiny(model_type: str, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class MaskedHead(torch.nn.Linear):
    """An lm_head with half of its entries masked."""

    mask = -1e4

    def forward(self, hidden):
        return super().forward(hidden).masked_fill(torch.arange(self.out_features) % 2 == 1, self.mask)


def with_mask(model, mask: float):
    head = MaskedHead(32, 1000, bias=False)
    head.weight, head.mask = model.lm_head.weight, mask
    model.lm_head = head
    return model


def conversations(lengths: list[int], shared: int = 0, behind: int = 3) -> list[Aligned]:
    """Conversations of these lengths, whose rows begin behind a shared prefix and end before the last tokens."""
    random = np.random.default_rng(5)
    beginning = random.integers(0, 1000, shared)
    texts = [np.concatenate([beginning, random.integers(0, 1000, length - shared)]) for length in lengths]
    positions = [np.arange(shared + 1, length - behind) for length in lengths]
    return [Aligned(i, [], Alignment(ids, []), at) for i, (ids, at) in enumerate(zip(texts, positions, strict=True))]


def compute(model, ready: list[Aligned], sharing: Sharing, tokens: int = 1000) -> list[list[int]]:
    """The batches, as source indices. Each conversation's logsumexps are those of its reference forward pass."""
    settings = SimpleNamespace(top_k=8, top_p=0.98, num_sampled=4, seed=0, prefix_cache=True)
    settings.batch_tokens, settings.batch_logit_rows = tokens, 1000
    found = []
    for members, pending in Batches(model, settings, sharing).compute(ready):
        found.append([aligned.source_index for aligned in members])
        requests = [request(aligned.input_ids, aligned.positions) for aligned in members]
        expected = plain_logits(model, requests).double().logsumexp(-1).numpy()
        np.testing.assert_allclose(pending.wait().logsumexp, expected, atol=1e-4)
    assert sorted(i for batch in found for i in batch) == list(range(len(ready)))
    return found


# --- what rows are compared by ---


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_entries_are_in_neither_difference_nor_limit(mask):
    """The numbers are those of the rows without the masked entries."""
    random = np.random.default_rng(0)
    expected, noise = (torch.tensor(random.normal(0, size, (5, 400)), dtype=torch.float32) for size in (3, 0.1))
    found = expected + noise
    plain = noise[:, ::2].double().square().mean(dim=1).sqrt().float()
    spread = expected[:, ::2].double().std(dim=1, correction=0).float()
    largest = expected[:, ::2].abs().amax(dim=1)
    for rows in (expected, found):
        rows[:, 1::2] = mask + rows[:, 1::2] * 50  # masks are often added to what the model says
    torch.testing.assert_close(row_differences(found, expected), plain)
    limits = row_limits(expected, 0.01, torch.bfloat16)
    torch.testing.assert_close(limits, 0.01 * spread + 2**-7 * largest)


def test_a_mask_that_is_missing_in_one_of_two_rows_is_a_difference():
    expected = torch.zeros(1, 100)
    expected[0, 3] = -torch.inf
    assert row_differences(torch.zeros(1, 100), expected).item() == pytest.approx(NOTHING / 10)
    assert row_differences(torch.full((1, 100), torch.nan), expected).isnan().all()
    assert row_differences(torch.zeros(1, 99), expected).isinf().all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_stored_numbers_may_differ_by_does_not_grow_with_a_mask(dtype, mask):
    """The tolerance of ``--verify``, for a model and for the same model with half of its entries masked."""
    ids = np.random.default_rng(0).integers(0, 1000, 30)
    plain = Output(tiny("llama", dtype), ids)
    masked = Output(with_mask(tiny("llama", dtype), mask), ids)
    is_mask = np.arange(1000) % 2 == 1
    assert np.array_equal(masked.logits[:, ~is_mask], plain.logits[:, ~is_mask])
    assert plain.tolerance / 2 < masked.tolerance <= plain.tolerance


# --- faults ---


def shift_by_one(monkeypatch):
    """Rows of the position before."""
    row_logits = Teacher.row_logits

    def before(self, requests):
        return row_logits(self, [Request(r.input_ids, r.positions - 1, r.uniforms) for r in requests])

    monkeypatch.setattr(Teacher, "row_logits", before)


def leave_out_the_tail(monkeypatch):
    """What the model does to its logits behind its lm_head is not done, as where one multiplies by hand."""

    def bare(self, requests, pick):
        kept = []
        inputs = torch.from_numpy(np.stack([np.pad(r.input_ids, (0, 99 - len(r.input_ids))) for r in requests]))
        with self._head_inputs(lambda hidden: (kept.append(pick(hidden)), hidden[:1, :1])[1]):
            self.model(input_ids=inputs, use_cache=False)
        return self.model.lm_head(kept[0])

    monkeypatch.setattr(Teacher, "_forward", torch.inference_mode()(bare))
    by_hand = torch.inference_mode()(lambda self, rows: self.model.lm_head(rows.unsqueeze(0)))
    monkeypatch.setattr(Teacher, "_dummy_forward", by_hand)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_a_shift_by_one_stops_the_run_whatever_is_masked(monkeypatch, dtype, mask):
    model = tiny("llama", dtype)
    if mask:
        with_mask(model, MASKS[mask])
    found = probe_model(model)
    assert found.batch == "padded" and found.prefix and 0 < found.limit < 0.5
    shift_by_one(monkeypatch)
    with pytest.raises(ToolkitError, match="differ from the reference forward pass by"):
        probe_model(model)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("model_type", "tail"), [("gemma2", {"final_logit_softcapping": 5.0}), ("granite", {"logits_scaling": 1.5})]
)
def test_a_tail_left_out_stops_the_run(monkeypatch, dtype, model_type, tail):
    model = tiny(model_type, dtype, head_dim=8, **tail)
    assert probe_model(model).batch == "padded"
    leave_out_the_tail(monkeypatch)
    with pytest.raises(ToolkitError, match="differ from the reference forward pass by"):
        probe_model(model)


def pad_on_the_left(model):
    """The same, but for padding: before its conversation, unmasked and with positions counted from it."""
    forward = model.forward

    def wrong(*args, **kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None and len(ids) > 1:
            padding = (ids.flip(1).cumsum(1) == 0).sum(1).tolist()
            kwargs["input_ids"] = torch.stack([row.roll(n) for row, n in zip(ids, padding, strict=True)])
        return forward(*args, **kwargs)

    model.forward = wrong
    return model


@pytest.mark.parametrize("dtype", BOTH)
def test_a_model_that_is_wrong_about_padding_gets_batches_of_one_length(dtype):
    model = pad_on_the_left(tiny("llama", dtype))
    sharing = probe_model(model)
    assert sharing.batch == "equal" and not sharing.prefix
    if dtype == torch.float32:
        found = compute(model, conversations([30, 40, 30, 35, 40]), sharing)
        assert found[0] == [1, 4] and sorted(found[1:]) == [[0, 2], [3]]


def test_a_model_that_is_wrong_about_batches_gets_conversations_alone():
    model = tiny("llama")
    forward = model.forward

    def wrong(*args, **kwargs):
        if len(kwargs.get("input_ids", ())) > 1:
            kwargs["input_ids"] = kwargs["input_ids"].roll(1, dims=0)  # each gets another's
        return forward(*args, **kwargs)

    model.forward = wrong
    sharing = probe_model(model)
    assert sharing.batch == "alone" and not sharing.prefix
    assert sorted(compute(model, conversations([30, 30, 35]), sharing)) == [[0], [1], [2]]


@pytest.mark.parametrize("layers", [2, 24])
def test_roundings_of_a_deep_random_model_do_not_stop_it(layers):
    """In bfloat16, where the same rows in another batch differ; a shift stays far beyond what is allowed."""
    model = tiny("llama", torch.bfloat16, num_hidden_layers=layers, hidden_size=64)
    sharing = probe_model(model)
    assert sharing.batch == "padded" and sharing.prefix
    conversation = request(np.random.default_rng(0).integers(0, 1000, 40), np.arange(1, 40))
    rows = plain_logits(model, [conversation]).float()
    assert row_differences(rows[1:], rows[:-1]).median() > 2 * sharing.limit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smollm2_in_16_bits_shares_batches_and_prefixes_and_its_shift_does_not_pass(monkeypatch, dtype):
    """Whichever CPU it is on: some round the same rows alike in any batch, though not in another order of a sum."""
    model = load_model(str(MODEL), dtype=dtype)
    sharing = probe_model(model)
    assert sharing.batch == "padded" and sharing.prefix and sharing.limit < 2
    shift_by_one(monkeypatch)
    with pytest.raises(ToolkitError, match="differ from the reference forward pass by"):
        probe_model(model)


def test_a_model_that_sees_ahead_is_refused():
    config = AutoConfig.for_model("bert", **TINY, is_decoder=False)
    with pytest.raises(ToolkitError, match="so the model is not causal"):
        probe_model(AutoModelForCausalLM.from_config(config).eval())


def test_too_little_memory_for_the_check_itself_says_what_else_to_use():
    model = tiny("llama")

    def too_large(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.layers[0].mlp.forward = too_large
    with pytest.raises(
        ToolkitError, match=r"^model check: out of memory .* several \(`tensor_parallel`, `device_map`\)$"
    ):
        probe_model(model)


def test_logits_that_are_not_finite_stop_the_run():
    model = tiny("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ToolkitError, match="logits are not finite"):
        probe_model(model)


# --- lengths ---


@pytest.mark.parametrize("window", [24, 100])
def test_a_cache_that_forgets_beyond_a_window_is_found(window):
    """Moshi's own: wrong behind a prefix longer than its window, by nats."""
    model = tiny("moshi", num_key_value_heads=4, sliding_window=window, max_position_embeddings=512, ffn_dim=64)
    assert named_windows(model.config) == [window]
    sharing = probe_model(model)
    assert sharing == Sharing("padded", False, None, sharing.limit)
    compute(model, conversations([window + 30, window + 40], shared=window + 9), sharing)


def test_a_window_that_was_not_passed_is_a_limit_to_sharing():
    model = tiny("mistral", sliding_window=300, max_position_embeddings=512)
    sharing = probe_model(model)
    assert sharing == Sharing("padded", True, 300, sharing.limit)
    batches = compute(model, conversations([310, 290, 280, 305], shared=20), sharing, tokens=2000)
    assert sorted(batches) == [[0], [1, 2], [3]]


def test_conversations_of_a_model_that_looks_at_the_length_are_read_whole():
    """The same tokens' logits differ with how many stand behind them, from 64 tokens on."""
    sizes = {"num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    sizes |= experts | {"mlp_layer_types": ["moe"] * 2}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "sliding_window": 8}
    layers = ["compressed_sparse_attention", "heavily_compressed_attention"]
    model = tiny("deepseek_v4", **sizes, **index, layer_types=layers, max_position_embeddings=512)
    assert {16, 64} <= set(named_windows(model.config))  # 16 entries, each of 4 tokens
    assert probe_model(model).batch == "equal"
    compute(model, conversations([100, 100, 80, 120], behind=40), probe_model(model))


def test_logits_of_minus_infinity_are_computed():
    """They are of the format: such a target token has the log-probability -inf, alone as in a batch."""
    model = with_mask(tiny("llama"), -torch.inf)
    compute(model, conversations([30, 40], shared=10), probe_model(model))


# --- the first batch of a run ---


@pytest.mark.parametrize("shared", [0, 10])
def test_the_first_batch_is_held_against_conversations_alone(monkeypatch, shared):
    """What goes wrong only after the check at start-up: here, every batch of several gets other tokens."""
    model = tiny("llama")
    sharing = probe_model(model)
    forward = Teacher._forward

    def wrong(self, requests, pick):
        if len(requests) > 1:
            requests = [Request(np.roll(r.input_ids, -1), r.positions, r.uniforms) for r in requests]
        return forward(self, requests, pick)

    monkeypatch.setattr(Teacher, "_forward", wrong)
    with pytest.raises(ToolkitError, match=r"first batch: log-probabilities of source row 1 differ .* by \d.* nats"):
        compute(model, conversations([60, 70], shared=shared), sharing)
