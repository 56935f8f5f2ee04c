"""The model's side against reference forward passes of transformers and the codec's NumPy reference."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from random_models import ARCHITECTURES, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import logit_codec
from chat_logits.data.alignment import Alignment
from chat_logits.data.reader import Aligned
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model import devices, loading
from chat_logits.model import teacher as teacher_model
from chat_logits.model.batch_plan import shared_prefix
from chat_logits.model.batching import Batches
from chat_logits.model.probe import probe_model
from chat_logits.model.selection import SelectionSettings
from chat_logits.model.teacher import Teacher

DEFAULTS = SelectionSettings(top_k=64, top_p=0.98, num_sampled=16)


def request(ids, positions, seed=0) -> teacher_model.Request:
    positions = np.asarray(positions)
    return teacher_model.Request(np.asarray(ids), positions, logit_codec.draw_uniforms(seed, len(ids), len(positions)))


def random_requests(vocabulary: int, lengths: list[int]) -> list[teacher_model.Request]:
    rng = np.random.default_rng(1)
    return [
        request(rng.integers(0, vocabulary, length), np.sort(rng.choice(np.arange(1, length), length // 2, False)))
        for length in lengths
    ]


def plain_logits(model, requests) -> torch.Tensor:
    """The predicting rows of a reference forward pass of each conversation alone."""
    with torch.inference_mode():
        return torch.cat([model(torch.from_numpy(r.input_ids)[None]).logits[0][r.positions - 1] for r in requests])


def rows(model, requests, logit_rows: int = 1000, prefix=()) -> torch.Tensor:
    teacher = Teacher(model, logit_rows)
    teacher.hold_prefix(np.asarray(prefix, np.int64))
    pieces = list(teacher.row_logits(requests))
    assert all(len(piece) <= logit_rows for piece in pieces)
    return torch.cat(pieces)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("logit_rows", [1000, 7, 1])
def test_selected_rows_are_the_plain_forwards(model_type, logit_rows):
    """At once, and in pieces without the decoder again."""
    model = random_model(model_type)
    requests = random_requests(1000, [5, 20, 11])
    expected = plain_logits(model, requests)
    torch.testing.assert_close(rows(model, requests, logit_rows), expected, atol=2e-5, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to the host, for which it waits where a GPU computes."""

    count = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_host_waits_for_no_value_of_a_batch(model_type):
    model = random_model(model_type)
    for logit_rows in (1000, 7):
        with Reads() as reads:
            rows(model, random_requests(1000, [5, 20, 11]), logit_rows)
        assert reads.count == 0


def test_rows_of_several_texts_are_found_in_other_threads_and_afterwards():
    """Of a training that packs, in the process of an extraction."""
    from transformers import masking_utils

    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with teacher_model.nothing_packed(), ThreadPoolExecutor(1) as other:
        assert masking_utils.find_packed_sequence_indices(packed) is None
        found = other.submit(lambda: masking_utils.find_packed_sequence_indices(packed)).result()
    assert found.tolist() == [[0, 0, 0, 1, 1]] == masking_utils.find_packed_sequence_indices(packed).tolist()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_shared_prefix_gives_the_reference_rows(model_type):
    model = random_model(model_type)
    assert probe_model(model).prefix
    prefix = np.random.default_rng(4).integers(0, 1000, 9)
    requests = []
    for ending in random_requests(1000, [5, 20, 11]):
        requests.append(request(np.concatenate([prefix, ending.input_ids]), ending.positions + 9))
    expected = plain_logits(model, requests)
    for logit_rows in (1000, 7):
        found = rows(model, requests, logit_rows, prefix)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def longrope_model():
    """A tiny Phi 3 whose rotary frequencies are others for a batch that reaches past 64 tokens."""
    from transformers import AutoModelForCausalLM, Phi3Config

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10_000.0}
    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Phi3Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_conversations_on_both_sides_of_a_length_switch_stay_apart():
    """Through a shard's batches, with a shared prefix: each conversation as its own reference forward pass."""
    model = longrope_model()
    assert teacher_model.length_switch(model.config) == 64
    rng = np.random.default_rng(2)
    beginning = rng.integers(0, 1000, 12)
    ready = [
        Aligned(i, [], Alignment(ids, []), np.arange(20, length))
        for i, length in enumerate((50, 90, 40, 66, 64, 200))
        for ids in [np.concatenate([beginning, rng.integers(0, 1000, length - 12)])]
    ]
    settings = SimpleNamespace(top_k=8, top_p=0.98, num_sampled=4, seed=0, prefix_cache=True)
    settings.batch_tokens = settings.batch_logit_rows = 1000
    batches = Batches(model, settings, probe_model(model))
    seen = []
    for members, found in batches.compute(ready):
        seen += [aligned.source_index for aligned in members]
        requests = [request(aligned.input_ids, aligned.positions) for aligned in members]
        expected = plain_logits(model, requests).double().logsumexp(-1).numpy()
        np.testing.assert_allclose(found.wait().logsumexp, expected, atol=1e-4)
    assert sorted(seen) == list(range(6))


def test_pieces_do_not_run_the_decoder_again():
    model = random_model("llama")
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: lengths.append(tuple(args[0].shape[:2])))
    ids = np.random.default_rng(0).integers(0, 1000, 30)
    rows(model, [request(ids, np.arange(10, 25)), request(ids, np.arange(5, 20))], logit_rows=10)
    assert lengths == [(2, 24), (1, 1), (1, 1), (1, 1)]  # and nothing behind the last row is read


def test_a_model_without_a_plain_cache_goes_without_shared_prefixes():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    assert not probe_model(model).prefix
    requests = random_requests(1000, [5, 20, 11])
    torch.testing.assert_close(rows(model, requests, 7), plain_logits(model, requests), atol=2e-5, rtol=1e-5)


def test_the_probe_finds_a_cache_that_does_not_agree():
    """A model whose positions start again after a cached prefix."""
    model = random_model("llama")
    forward = model.model.forward

    def forgetful(*args, **kwargs):
        ids = kwargs["input_ids"]
        kwargs["position_ids"] = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
        return forward(*args, **kwargs)

    model.model.forward = forgetful
    assert not probe_model(model).prefix


def test_the_probe_stops_a_model_whose_rows_depend_on_their_neighbours():
    class Leaky(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden - hidden.mean(dim=1, keepdim=True))

    model = random_model("llama")
    leaky = Leaky(32, 1000, bias=False)
    leaky.weight = model.lm_head.weight
    model.lm_head = leaky
    with pytest.raises(ToolkitError, match="differ from the reference forward pass by"):
        probe_model(model)


def test_batches_and_orders_give_the_same_rows(smollm2, real_alignments):
    """One by one; all together; and reversed, in pieces, after a shared prefix: the same but for last bits."""
    model, _ = smollm2
    requests = [
        teacher_model.Request(a.input_ids, a.positions, logit_codec.draw_uniforms(0, i, len(a.positions)))
        for i, a in enumerate(real_alignments[:8])
    ]
    alone = [Teacher(model, 1000).distributions([r], DEFAULTS).wait() for r in requests]
    prefix = shared_prefix([r.input_ids for r in requests], [int(r.positions[0]) - 1 for r in requests])
    assert len(prefix) > 20
    nothing = np.zeros(0, np.int64)
    for order, logit_rows, shared in ((range(8), 10_000, nothing), (range(7, -1, -1), 100, prefix)):
        order, teacher = list(order), Teacher(model, logit_rows)
        teacher.hold_prefix(shared)
        together = teacher.distributions([requests[i] for i in order], DEFAULTS).wait()
        sizes = np.cumsum([len(requests[i].positions) for i in order])[:-1]
        parts = {name: dict(zip(order, np.split(array, sizes), strict=True)) for name, array in vars(together).items()}
        compare(requests, alone, parts, model)


def compare(requests, alone, parts, model) -> None:
    positions = nuclei = draws = 0
    divergences = []
    for i, single in enumerate(alone):
        many = logit_codec.Distributions(**{name: split[i] for name, split in parts.items()})
        positions += len(single.logsumexp)
        others = (single.top_ids != many.top_ids).any(axis=1)
        nuclei += others.sum()
        if others.any():
            check_other_nuclei(single, many, np.flatnonzero(others), plain_logits(model, [requests[i]]))
        moved = single.sampled_ids != many.sampled_ids
        draws += moved.sum()
        if moved.any():
            check_moved_draws(requests[i], single, many, moved, plain_logits(model, [requests[i]]))
        divergences.append(divergence(single, many))
    assert nuclei <= 0.01 * positions  # each with its reason; how many there are depends on the machine's kernels
    assert draws <= 0.05 * positions * 16
    assert np.concatenate(divergences).mean() <= 5e-5


def check_other_nuclei(single, many, rows, logits) -> None:
    """A nucleus may differ only in tokens that are as good as tied, or where its end is as good as at top_p."""
    for row in rows:
        one, other = (found.top_ids[row][found.top_ids[row] >= 0] for found in (single, many))
        shorter = min(len(one), len(other))
        ties = logits[row][one[:shorter]] - logits[row][other[:shorter]]
        assert ties.abs().max() < 1e-4
        if len(one) != len(other):
            held = torch.softmax(logits[row].double(), dim=0)[one[:shorter]].sum()
            assert abs(held - DEFAULTS.top_p) < 1e-5


def check_moved_draws(request, single, many, moved, logits) -> None:
    """A draw may move only to a neighbour, and only if its threshold lies within 1e-5 of the running total."""
    probabilities = torch.softmax(logits.double(), dim=1).numpy()
    for row, column in np.argwhere(moved):
        if set(single.top_ids[row]) != set(many.top_ids[row]):
            continue  # another nucleus, another tail
        tail = probabilities[row].copy()
        tail[single.top_ids[row][single.top_ids[row] >= 0]] = 0
        running = np.cumsum(tail)
        threshold = (request.uniforms[row] + column) / 16 * running[-1]
        low, high = sorted((single.sampled_ids[row, column], many.sampled_ids[row, column]))
        assert not tail[low + 1 : high].any() or running[high - 1] - running[low] < 1e-5
        assert abs(running[low] - threshold) < 1e-5


def divergence(single, many) -> np.ndarray:
    """KL between the decodings of two writers, over the nucleus and one bucket for the rest, nats."""
    rows = [logit_codec.encode_rows(d, [len(d.logsumexp)], d.top_ids[:, 0])[0] for d in (single, many)]
    one, other = (logit_codec.decode_row(row) for row in rows)
    found = []
    for i in range(len(one.logsumexp)):
        p = dict(zip(one.top_ids[i].tolist(), np.exp(one.top_log_probs[i]), strict=True))
        q = dict(zip(other.top_ids[i].tolist(), np.exp(other.top_log_probs[i]), strict=True))
        shared = [token for token in p if p[token] > 0 and q.get(token, 0) > 0]
        a = np.array([p[t] for t in shared])
        b = np.array([q[t] for t in shared])
        a, b = np.append(a, max(1 - a.sum(), 1e-9)), np.append(b, max(1 - b.sum(), 1e-9))
        a, b = a / a.sum(), b / b.sum()
        found.append((a * np.log(a / b)).sum())
    return np.array(found)


def test_a_device_that_is_not_there_is_named():
    for name in ("cuda:7", "warp"):
        with pytest.raises(UsageError, match=rf"`device` {name}: .*Available: cpu"):
            devices.choose_device(name)


def test_a_missing_model_is_explained(tmp_path):
    with pytest.raises(ToolkitError, match=r"model .*nothing-here"):
        loading.load_model(str(tmp_path / "nothing-here"))


def test_bfloat16_runs_and_stays_near_float32(tmp_path):
    folder = make_tiny_model(tmp_path, vocab_size=49_152)
    half, full = (loading.load_model(str(folder), dtype=dtype) for dtype in ("bfloat16", "auto"))
    probe_model(half)
    requests = random_requests(49_152, [30])
    settings = SelectionSettings(top_k=8, top_p=0.98, num_sampled=4)
    found, expected = (Teacher(model, 100).distributions(requests, settings).wait() for model in (half, full))
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert np.abs(found.logsumexp - expected.logsumexp).max() < 0.5
    assert np.abs(found.token_log_probs - expected.token_log_probs).mean() < 0.2
