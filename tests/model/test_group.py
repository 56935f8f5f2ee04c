"""A model that several processes compute in parts gives what one process gives, for every family that has a plan."""

import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import in_group
import numpy as np
import pytest
import torch
from model_types import EXPERTS, LATENT, SIZES, TYPES, conversations
from safetensors.torch import load_file

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction import processes
from chat_logits.extraction.processes import started_group
from chat_logits.model import loading
from chat_logits.model.batching import Batches
from chat_logits.model.probe import probe_model
from chat_logits.model.reference import plain_rows, rows_of_whole_layers
from logit_codec import Distributions

WIDE = 262_144
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
CAPPED = {"final_logit_softcapping": 5.0, "tie_word_embeddings": True, "sliding_window": 24}
MIXTURE = EXPERTS | {"num_experts": 4}
# Vocabularies divide by neither 2 nor 4, if nothing else is said.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {"vocab_size": 999},
    "qwen3": {},
    "qwen3_moe": MIXTURE,
    "gemma2": CAPPED,
    "gemma3_text": CAPPED | {"vocab_size": WIDE},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    "deepseek_v3": LATENT | {"num_attention_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "olmo2": {},
    **{name: TYPES[name] for name in ("glm4_moe", "minimax_m2", "qwen3_next")},
}
WIDE_CASES = ("gemma3_text",)
NINE_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
OTHERS = {
    "attention that does not divide": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    ),
    "experts that do not divide": ("qwen3_moe", MIXTURE | {"num_experts": 5}),
    "features that do not divide": ("llama", {"intermediate_size": 67}),
}
CASES = {name: (name, changes) for name, changes in FAMILIES.items()} | OTHERS


@pytest.fixture(scope="module", params=[2, 4])
def group(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(in_group.__file__).parent))  # to the other processes
        with started_group(request.param, "cpu") as started:
            yield started


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a case's random model."""

    @functools.cache
    def save(case: str):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        folder, (model_type, changes) = tmp_path_factory.mktemp("model"), CASES[case]
        config = AutoConfig.for_model(model_type, **{**SIZES, **HEADS, "vocab_size": 1001, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return save


def computed(model, case: str) -> tuple[dict[int, Distributions], object]:
    """What is stored of each conversation, and what they may share."""
    settings = SimpleNamespace(top_k=8, top_p=0.98, num_sampled=4, seed=0, prefix_cache=True)
    settings.batch_tokens, settings.batch_logit_rows = 250, 60
    sharing, found = probe_model(model), {}
    for members, pending in Batches(model, settings, sharing).compute(
        conversations()[: 2 if case in WIDE_CASES else None]
    ):
        whole, start = pending.wait(), 0
        for aligned in members:
            rows = slice(start, start + len(aligned.positions))
            found[aligned.source_index] = Distributions(**{name: each[rows] for name, each in vars(whole).items()})
            start = rows.stop
    return found, sharing


@pytest.fixture(scope="module")
def alone(saved):
    return functools.cache(lambda case: computed(loading.load_model(saved(case)), case))


@pytest.mark.parametrize("case", CASES)
def test_parts_give_what_one_process_gives(group, saved, alone, case):
    model = loading.load_part(group, saved(case))
    found, sharing = computed(model, case)
    expected, expected_sharing = alone(case)
    assert (sharing.batch, sharing.prefix) == (expected_sharing.batch, expected_sharing.prefix)
    assert found.keys() == expected.keys()
    for index, distributions in found.items():
        assert_same(distributions, expected[index])


def assert_same(found: Distributions, expected: Distributions) -> None:
    """Numbers within what sums in another order change; ids but where two are as probable, or a draw is at an edge."""
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, atol=2e-4)
    np.testing.assert_allclose(found.token_log_probs, expected.token_log_probs, atol=2e-4)
    np.testing.assert_allclose(found.top_probs, expected.top_probs, atol=2e-4)
    assert (found.top_ids == expected.top_ids).mean() > 0.995
    assert (found.sampled_ids == expected.sampled_ids).mean() > 0.98


def test_logits_are_float32_where_the_model_is_16_bit(group, saved):
    """Sums in another order change 16-bit hidden states by roundings; those of two dtypes differ as much."""
    model, plain = loading.load_part(group, saved("llama"), dtype="bfloat16"), loading.load_model(saved("llama"))
    assert loading.logits_dtype(model) == "float32" and model.dtype == torch.bfloat16
    assert probe_model(model).batch == "padded"  # its embeddings are nudged in all processes
    ids = np.arange(60)
    found, exact = plain_rows(model, ids[None], 0, ids[1:]), plain_rows(plain, ids[None], 0, ids[1:])
    alone = plain_rows(loading.load_model(saved("llama"), dtype="bfloat16"), ids[None], 0, ids[1:])
    assert (found - exact).square().mean() < 2 * (alone - exact).square().mean()
    head = model.get_output_embeddings()
    assert not torch.equal(head(torch.ones(1, 32).bfloat16()).bfloat16().float(), head(torch.ones(1, 32).bfloat16()))


LARGE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 64}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The folder of a model of 1 GB in one file, all of it zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE))
    zeros = {name: torch.zeros(each.shape) for name, each in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=zeros)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by Linux")
@pytest.mark.parametrize("group", [2], indirect=True)
def test_no_process_takes_more_than_its_part_of_the_memory(group, large, saved):
    """At its peak, loading and the model check included: 0.6 of the model's bytes with 2 processes."""
    probe_model(loading.load_part(group, saved("llama")))  # what comes with the first model, such as imports
    before = in_group.begin(group)
    model = loading.load_part(group, str(large))
    ids = np.arange(48)
    plain = plain_rows(model, ids[None], 0, ids[1:])
    assert (plain == rows_of_whole_layers(model, ids[None], 0, ids[1:])).all()
    whole = sum(weights.nbytes for weights in model.parameters())
    shares = [(peak - at_first) / whole for peak, at_first in zip(in_group.peaks(group), before, strict=True)]
    assert whole > 1e9 and max(shares) < 0.6, shares
    assert min(shares) > 0.45, shares  # or it was not counted


def test_a_plan_that_gives_other_logits_is_refused(group, saved):
    model = loading.load_part(group, saved("llama"))
    in_group.leave_out_a_sum(model)
    with pytest.raises(ToolkitError, match="split over processes, logits differ from those of whole layers"):
        probe_model(model)


def test_parts_are_on_their_own_devices_whatever_the_environment_and_torchs_build_say(group, saved, monkeypatch):
    """Of another launcher, and CUDA, as on a machine without a GPU that has the usual torch."""
    from transformers.distributed import utils

    asked, bind, built_for = [], utils._bind_local_device, lambda *_: torch.device("cuda")
    monkeypatch.setattr(utils, "_bind_local_device", lambda *place: asked.append(place) or bind(*place))
    monkeypatch.setattr(torch._C, "_get_accelerator", built_for)
    monkeypatch.setenv("LOCAL_RANK", "7")
    loading.load_part(group, saved("llama"))
    assert asked == [("cpu", 0)]
    assert os.environ["LOCAL_RANK"] == "7" and torch._C._get_accelerator is built_for


def test_what_is_no_safetensors_is_refused(group, saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "pickle")
    weights = tmp_path / "pickle" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickle" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ToolkitError, match="safetensors"):
        loading.load_part(group, str(tmp_path / "pickle"))


def test_quantised_checkpoints_are_refused(group, saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the checkpoint's weights are quantised"):
        loading.load_part(group, str(tmp_path / "quantised"))


def test_a_call_that_fails_everywhere_fails_as_in_one_process_and_the_group_goes_on(group, saved):
    model = loading.load_part(group, saved("llama"))
    with pytest.raises(RuntimeError, match="not here either"):
        in_group.fail_everywhere(model)
    assert loading.logits_dtype(model) == "float32"


def test_a_call_that_fails_in_one_process_ends_the_group(group, saved, monkeypatch):
    """The last test with a group: it is of no use afterwards."""
    model = loading.load_part(group, saved("llama"))
    monkeypatch.setattr(processes, "GRACE", 1.0)
    for _ in range(2):
        with pytest.raises(ToolkitError, match=f"process 2 of {group.size} is out of memory, the others are not"):
            in_group.run_out_of_memory_in_another(model)
