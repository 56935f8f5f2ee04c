"""Models in fewer bits, against weights quantised by hand; what cannot be had is refused before weights are read."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import QUICK_VOCABULARY, REPO, make_tiny_model
from runs import without
from safetensors.torch import load_file, save_file
from test_adapters import write_adapter
from transformers import AutoConfig, AutoModelForCausalLM

import extract_logits
from chat_logits.analysis.runs import run_differences, run_record
from chat_logits.analysis.verification import load_recorded_model, verify
from chat_logits.display import dataset_page
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.plan import plan
from chat_logits.model import loading
from chat_logits.model.config import ModelConfig
from chat_logits.model.head import use_head_dtype
from chat_logits.model.probe import probe_model
from chat_logits.model.quantization import METHODS, find_quantization, option_of, stored_bytes
from chat_logits.storage.card import render_card
from chat_logits.storage.dataset import open_dataset

TORCHAO = REPO / ".venv" / "torchao"  # apart from the rest: once it is there, every start of transformers imports it
needs_torchao = pytest.mark.torchao  # run by the last test, in a process that has it
OPTIONS = [pytest.param(name, marks=needs_torchao) if "torchao" in name else name for name in METHODS]
IDS = torch.randint(0, QUICK_VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
BLOCK = 32  # rows and columns of a weight that share a scale of the fp8 checkpoint
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
# The 16 values of nf4, of Dettmers et al., "QLoRA", appendix E
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture(scope="session")
def even_model(shared):
    """A random model whose layers' matrices are of whole blocks, 64 weights of nf4 and BLOCK squared of fp8."""
    size = {"hidden_size": 64, "intermediate_size": 128}
    return shared("even_model", lambda folder: make_tiny_model(folder, QUICK_VOCABULARY, **size))


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def matrices(model) -> dict[str, torch.nn.Module]:
    """Of the layers; the lm_head is none of them."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


# --- what each computes, by hand ---


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16 values, times the largest of each 64 weights."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks / largest)[..., None] - NF4).abs().argmin(-1)] * largest).reshape(weight.shape)


def int8_by_row(weight: torch.Tensor) -> torch.Tensor:
    """Steps of 1/127.5 of each row's largest weight."""
    step = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight * (1 / step)).round().clamp(-128, 127) * step


@pytest.mark.parametrize(
    ("option", "by_hand"),
    [("bitsandbytes-4bit", nf4), pytest.param("torchao-int8", int8_by_row, marks=needs_torchao)],
)
def test_quantized_weights_are_those_computed_by_hand(even_model, option, by_hand):
    expected = loading.load_model(str(even_model))
    for module in matrices(expected).values():
        module.weight.data = by_hand(module.weight.data)
    torch.testing.assert_close(
        logits(loading.load_model(str(even_model), quantization=option)), logits(expected), atol=2e-4, rtol=0
    )


class Int8Product(torch.nn.Module):
    """A matrix and its inputs, both in float16, as int8 by rows; sums of integers, which are exact.

    What bitsandbytes has for 1 / 127² lacks a digit: 6.200124e-05 for 6.2000124e-05.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.codes, self.largest = self._quantized(weight)

    @staticmethod
    def _quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = rows.half().float().abs().amax(-1)
        return (rows.half() * (127 / largest[..., None])).round().double(), largest

    def forward(self, hidden):
        codes, largest = self._quantized(hidden)
        return (codes @ self.codes.T).float() * (largest[..., None] * self.largest) * 6.200124e-05


def test_products_of_eight_bits_are_those_computed_by_hand(even_model):
    expected = loading.load_model(str(even_model))
    for name, module in matrices(expected).items():
        parent, _, own = name.rpartition(".")
        setattr(expected.get_submodule(parent), own, Int8Product(module.weight.data))
    found = logits(loading.load_model(str(even_model), quantization="bitsandbytes-8bit"))
    torch.testing.assert_close(found, logits(expected), atol=2e-4, rtol=0)
    assert (found - logits(loading.load_model(str(even_model)))).abs().max() > 0.1


@pytest.mark.parametrize("option", OPTIONS)
def test_the_lm_head_and_sums_of_its_logits_stay_as_they_are(even_model, option):
    """Its matrix is the checkpoint's, in bfloat16; the logits are float32, and those of exact sums."""
    model = loading.load_model(str(even_model), dtype="bfloat16", quantization=option)
    head = model.get_output_embeddings()
    stored = load_file(even_model / "model.safetensors")["lm_head.weight"].bfloat16()
    assert type(head) is torch.nn.Linear and torch.equal(head.weight, stored)
    with torch.inference_mode():
        hidden = model.model(IDS).last_hidden_state
    assert hidden.dtype == torch.bfloat16 and loading.logits_dtype(model) == "float32"
    torch.testing.assert_close(logits(model).double(), hidden.double() @ stored.double().T, atol=1e-5, rtol=1e-5)
    assert stored_bytes(head.weight) == 2 * stored.numel()


@needs_torchao
def test_a_quantized_lm_head_gives_no_exact_sums(even_model, monkeypatch):
    monkeypatch.setitem(METHODS, "whole", {**METHODS["torchao-int8"], "include_input_output_embeddings": True})
    model = loading.load_model(str(even_model), dtype="bfloat16", quantization="whole")
    assert type(model.lm_head.weight).__name__ == "Int8Tensor" and loading.logits_dtype(model) == "bfloat16"
    with pytest.raises(ToolkitError, match="which cannot give its output in float32; give `head_dtype` model"):
        use_head_dtype(model, "float32")


@needs_torchao
def test_bytes_are_those_that_are_stored(even_model):
    model = loading.load_model(str(even_model), quantization="torchao-int8")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert stored_bytes(weight) == weight.numel() + (4 + 1) * len(weight)  # a row's step and its zero, float32 and int8
    assert stored_bytes(model.lm_head.weight) == 4 * model.lm_head.weight.numel()


SIZES = {"vocab_size": 1000, "initializer_range": 0.3}
LAYERS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": LAYERS,
    "mixtral": {**LAYERS, "num_key_value_heads": 2, "num_local_experts": 4},
    "opt": {**LAYERS, "ffn_dim": 256, "max_position_embeddings": 8192, "word_embed_proj_dim": 128},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
}


@pytest.fixture(scope="module")
def of_family(shared):
    """A saved random model of a family."""

    def save(model_type: str, folder) -> None:
        config = AutoConfig.for_model(model_type, **SIZES, **FAMILIES[model_type])
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    return lambda name: shared(f"quantized_{name}", lambda folder: save(name, folder))


def taken(model) -> int:
    """Bytes of a loaded model's parameters, and of the scales that bitsandbytes keeps beside them."""
    beside = [each.quant_state.absmax for each in model.parameters() if hasattr(each, "quant_state")]
    beside += [each.SCB for each in model.parameters() if getattr(each, "SCB", None) is not None]
    return sum(map(stored_bytes, model.parameters())) + sum(scales.nbytes for scales in beside)


def test_four_bits_are_not_rounded_to_bfloat16_on_cpus_that_have_a_kernel_for_it(even_model, monkeypatch):
    """As with AVX-512, which the machine of the test need not have: without it, the flag would be False anyway."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = loading.load_model(str(even_model), quantization="bitsandbytes-4bit")
    flags = [module.support_avx512bf16_for_cpu for module in matrices(model).values()]
    assert flags and not any(flags)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_bytes_that_a_loaded_model_takes(of_family, family, option):
    """But for the steps of 8 bits, 4 or 5 bytes for each row of 128 or more."""
    folder = str(of_family(family))
    config, says = ModelConfig(model_id=folder, quantization=option), "finds no layer of it to quantise"
    if (family, option) == ("gpt2", "torchao-int8"):  # its layers are transformers' own Conv1D
        for refused in (lambda: plan(config, "1GB"), lambda: loading.load_model(folder, quantization=option)):
            with pytest.raises(ToolkitError, match=says):
                refused()
        return
    counted = plan(config, "1GB")["weights, float32"]
    bound = 0.03 if "8" in option else 1e-12
    assert counted.value == pytest.approx(taken(loading.load_model(folder, quantization=option)), rel=bound)
    assert f"by `quantization` {option}" in counted.source


def test_a_plan_counts_dequantized_weights_in_their_own_dtype_and_refuses_what_a_run_does(even_model, tmp_path):
    folder, _ = write_fp8(even_model, tmp_path / "fp8")
    whole = sum(tensor.nbytes for tensor in load_file(even_model / "model.safetensors").values())
    counted = plan(ModelConfig(model_id=str(folder), quantization="dequantize"), "1GB")
    assert counted["weights, float32"].value == whole
    (tmp_path / "fp8" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"`quantization` torchao-int8: .* is quantised already \(fp8\)"):
        plan(ModelConfig(model_id=str(folder), quantization="torchao-int8"), "1GB")


def test_a_mixture_whose_experts_stay_as_they_are_is_told(of_family, caplog):
    """Of a layer's numbers the experts have 4 · 3 · 128 · 256, its norms and its router 2 · 128 and 4 · 128; 4 · 128²
    of attention are quantised, and there is one more norm."""
    for dense in ("llama", "opt"):  # which has embeddings of positions, three times its layers
        loading.load_model(str(of_family(dense)), quantization="bitsandbytes-4bit")
    assert "stay in" not in caplog.text
    loading.load_model(str(of_family("mixtral")), quantization="bitsandbytes-4bit")
    stays = 2 * (12 * 128 * 256 + 6 * 128) + 128
    share = stays / (stays + 2 * 4 * 128 * 128)
    assert f"{share:.1%} of the layers' weights stay in float32, as model.layers.*.mlp.experts." in caplog.text


# --- what conversations may share ---


@pytest.mark.parametrize("option", OPTIONS)
def test_rows_are_the_same_in_a_batch_and_behind_a_prefix(even_model, option):
    """Within the tolerance of the dtype they are computed in, which is not widened for them."""
    sharing = probe_model(loading.load_model(str(even_model), quantization=option))
    assert (sharing.batch, sharing.prefix) == ("padded", True)


def test_the_default_of_eight_bits_sees_the_tokens_behind(even_model, tmp_path, monkeypatch):
    """Columns with an outlier anywhere in the batch stay in 16 bits: the check at start-up finds that the logits follow
    it, and a checkpoint in that form is refused before its weights are read."""
    shutil.copytree(even_model, tmp_path / "model")
    tensors = load_file(even_model / "model.safetensors")
    norms = [name for name in tensors if "layernorm" in name]
    save_file({**tensors, **{name: 3 * tensors[name] for name in norms}}, tmp_path / "model" / "model.safetensors")
    usual = {**METHODS["bitsandbytes-8bit"], "llm_int8_threshold": 6.0}
    monkeypatch.setitem(METHODS, "usual", usual)
    with pytest.raises(ToolkitError, match="the logits change when later tokens change"):
        probe_model(loading.load_model(str(tmp_path / "model"), quantization="usual"))
    folder = without_weights(even_model, tmp_path / "stored", usual)
    with pytest.raises(ToolkitError, match=r"llm_int8_threshold 6, .*\. Expected 0: set it in its config\.json"):
        loading.load_model(str(folder))


# --- checkpoints ---


def without_weights(model, folder, config: dict):
    """The model's folder with this quantisation configuration, and no file of weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}), encoding="utf-8")
    return folder


def write_fp8(model, folder):
    """The model's checkpoint in fp8 by blocks; and its tensors as they are dequantised."""
    without_weights(model, folder, FP8)
    stored, dequantized = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stored[name] = dequantized[name] = tensor
        if name.endswith("_proj.weight"):
            blocks = tensor.reshape(tensor.shape[0] // BLOCK, BLOCK, -1, BLOCK)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448  # the largest of float8_e4m3fn
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = codes.reshape(tensor.shape)
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            dequantized[name] = (codes.float() * scale).reshape(tensor.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder, dequantized


def test_a_checkpoint_without_kernels_here_is_dequantized_when_asked_and_not_else(even_model, tmp_path):
    folder, dequantized = write_fp8(even_model, tmp_path / "fp8")
    with pytest.raises(
        ToolkitError, match=r"in fp8, which needs a GPU .*; here is a CPU\.\n.*`quantization` dequantize"
    ):
        loading.load_model(str(folder))
    expected = loading.load_model(str(even_model))
    expected.load_state_dict(dequantized)
    found = loading.load_model(str(folder), quantization="dequantize")
    assert torch.equal(logits(found), logits(expected))
    assert (found.dtype, matrices(found)["model.layers.0.mlp.up_proj"].weight.dtype) == (torch.float32,) * 2


@pytest.mark.parametrize("option", OPTIONS)
def test_a_quantized_checkpoint_is_taken_as_it_is(even_model, tmp_path, option):
    model = loading.load_model(str(even_model), quantization=option)
    model.save_pretrained(tmp_path)
    kind = type(matrices(model)["model.layers.0.mlp.up_proj"].weight)
    again = loading.load_model(str(tmp_path))
    assert type(matrices(again)["model.layers.0.mlp.up_proj"].weight) is kind
    assert torch.equal(logits(again), logits(model))
    found = find_quantization(str(tmp_path))
    assert found and found["weights"] == "as stored" and found["config"].items() >= METHODS[option].items()
    with pytest.raises(UsageError, match=rf"`quantization` {option}: .* is quantised already"):
        loading.load_model(str(tmp_path), quantization=option)


def test_an_lm_head_of_packed_weights_is_refused(even_model, monkeypatch):
    monkeypatch.setitem(METHODS, "whole", {**METHODS["bitsandbytes-4bit"], "llm_int8_skip_modules": ["none"]})
    with pytest.raises(ToolkitError, match="its lm_head is a Linear4bit of packed weights, which gives no vocabulary"):
        loading.load_model(str(even_model), quantization="whole")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "int3-magic"}, r"of the method 'int3-magic', which this transformers does not know"),
        ({"bits": 4}, r"of the method 'None', which this transformers does not know"),
        (
            {"quant_method": "fbgemm_fp8"},
            r"compute capability 9\.0 or above, and the package fbgemm-gpu; here is a CPU\.\n",
        ),
        ({"quant_method": "eetq"}, r"in eetq, which needs a GPU; here is a CPU\.\nTake a checkpoint in 16 bits\.$"),
        ({"quant_method": "nvfp4"}, r"compute capability 10\.0 or above"),
        ({"quant_method": "metal", "bits": 4}, r"needs Apple's GPU, and the package kernels; here is a CPU"),
        ({"quant_method": "awq", "bits": 4}, r"requires gptqmodel\. .*`pip install gptqmodel`\. Or take a checkpoint"),
        ({"quant_method": "hqq"}, r"HQQ version .* is not available"),
        ({"quant_method": "quanto"}, r"requires optimum-quanto library"),
        ({"quant_method": "gptq", "bits": 4}, r"GPTQ quantized model requires optimum"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, r"in fp8, which needs a GPU"),
    ],
)
def test_what_does_not_run_here_is_refused_before_weights_are_read(even_model, tmp_path, config, words):
    """There are none to be read: what looks for them says that there is no such file."""
    folder = without_weights(even_model, tmp_path / "model", config)
    with pytest.raises(ToolkitError, match=words) as refused:
        loading.load_model(str(folder))
    assert len(str(refused.value).splitlines()) <= 2 and refused.value.exit_status == 1


def test_what_transformers_would_dequantize_in_its_log_alone_is_refused(even_model, tmp_path, capsys, monkeypatch):
    """MXFP4 has kernels for a CPU, in a package that is not there."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr("transformers.quantizers.quantizer_mxfp4.is_kernels_available", lambda: False)
    folder = without_weights(even_model, tmp_path / "model", {"quant_method": "mxfp4"})
    with pytest.raises(ToolkitError, match=r"needs the packages triton .* not all of it is here\.\n.*dequantize\.$"):
        loading.load_model(str(folder))
    assert "default to dequantizing" not in capsys.readouterr().err


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao", "accelerate"])
def test_a_missing_package_is_named(even_model, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=sys.modules["importlib.util"].find_spec: None if name == package else find(name),
    )
    folder = tmp_path / "model"
    shutil.copytree(even_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    option = next(option for option in METHODS if package in (option.partition("-")[0], "accelerate"))
    with pytest.raises(
        ToolkitError, match=rf"need the package {package}, which is not installed\.\n.*extra `quantization`"
    ):
        loading.load_model(str(folder), quantization=option)


def test_options_that_a_model_cannot_have_are_refused(even_model, tmp_path):
    with pytest.raises(UsageError, match=r"`quantization` dequantize: .* is not quantised"):
        loading.load_model(str(even_model), quantization="dequantize")
    awq = without_weights(even_model, tmp_path / "awq", {"quant_method": "awq", "bits": 4})
    with pytest.raises(UsageError, match=r"`quantization` torchao-int8: .* is quantised already \(awq\); leave it out"):
        loading.load_model(str(awq), quantization="torchao-int8")
    with pytest.raises(UsageError, match=r"is in awq; only fp8, .* can be"):
        loading.load_model(str(awq), quantization="dequantize")


def test_adapters_and_quantized_weights_do_not_go_together(even_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", even_model)
    with pytest.raises(UsageError, match=r"an adapter is not merged into quantised weights \(torchao-int8\); merge it"):
        loading.load_model(str(adapter), quantization="torchao-int8")
    awq = without_weights(even_model, tmp_path / "awq", {"quant_method": "awq"})
    with pytest.raises(UsageError, match=r"not merged into quantised weights \(awq\)"):
        loading.load_model(str(write_adapter(tmp_path / "other", awq)))


def test_the_option_is_that_of_the_record():
    recorded = [{"weights": "quantized on loading", "config": config} for config in METHODS.values()]
    assert [option_of(each) for each in recorded] == [*METHODS]
    assert option_of({"weights": "as stored", "config": FP8}) is None and option_of(None) is None
    assert option_of({"weights": "dequantized on loading", "config": FP8}) == "dequantize"
    with pytest.raises(ToolkitError, match="a quantization on loading that is none of bitsandbytes-8bit, "):
        option_of({"weights": "quantized on loading", "config": {"quant_method": "torchao"}})


# --- a run ---


@pytest.fixture(scope="session")
def int8_run(shared, quick_model, calm_source):
    """The run of ``runs.py`` with ``quick_model`` in int8, of which a shard is missing."""
    import runs

    def make(folder) -> None:
        flags = [*runs.flags_for(quick_model, calm_source, folder / "out"), "--quantization", "bitsandbytes-8bit"]
        assert extract_logits.main([*flags, "--max_samples", "36"]) == 0

    return shared("int8_run", make) / "out"


def test_a_run_records_how_its_weights_were_quantized(int8_run, quick_run):
    dataset, plain = open_dataset(str(int8_run)), open_dataset(str(quick_run))
    quantization = {"weights": "quantized on loading", "config": METHODS["bitsandbytes-8bit"]}
    assert dataset.manifest.quantization == quantization
    assert replace(dataset.manifest, quantization=None, max_samples=None) == plain.manifest
    without = replace(dataset.manifest, quantization=None)
    assert without.fingerprint != dataset.manifest.fingerprint
    assert "quantization" not in plain.manifest.as_json()
    differences = {each.key: (each.first, each.other) for each in run_differences(plain.manifest, dataset.manifest)}
    assert differences["quantization.weights"] == (None, "quantized on loading")
    assert differences["quantization.config.quant_method"] == (None, "bitsandbytes")
    facts = dict(dataset_page._record(run_record(dataset)))
    assert facts["Computed in"].startswith(
        "float32, weights bitsandbytes, 8 bit, quantized on loading, head float32, attention "
    )
    card = (int8_run / "README.md").read_text(encoding="utf-8")
    assert "Computed in float32 (weights bitsandbytes, 8 bit, quantized on loading), logits in float32" in card
    assert "Computed in float32, logits" in render_card(plain.manifest, [])


def test_a_run_holds_against_its_own_weights_and_not_against_the_plain_ones(int8_run, quick_model):
    from chat_logits.data.tokenizer import load_tokenizer

    dataset = open_dataset(str(int8_run))
    model = load_recorded_model(dataset)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Params"
    report = verify(dataset, load_tokenizer(str(quick_model)), 6)
    assert report.holds and report.figures["kl_mean"] < 1e-3 and abs(report.figures["token_log_probs"]) < 1e-3
    dataset.manifest.__dict__["quantization"] = None  # as if it were not recorded
    plain = verify(dataset, load_tokenizer(str(quick_model)), 6)
    assert not plain.holds and plain.figures["kl_mean"] > 5 * report.figures["kl_mean"]


def test_a_run_resumes_with_its_own_quantization_alone(int8_run, flags, tmp_path, capsys):
    shutil.copytree(int8_run, tmp_path / "out")
    shards = sorted((tmp_path / "out" / "data").rglob("*.parquet"))
    rows = shards[5].read_bytes()
    shards[5].unlink()
    wanted = [*flags("out"), "--max_samples", "36"]
    assert extract_logits.main([*wanted, "--quantization", "bitsandbytes-4bit"]) == 2
    assert "holds another run (quantization: from character" in capsys.readouterr().err.splitlines()[-1]
    assert not shards[5].exists()
    assert extract_logits.main(wanted) == 0
    told = capsys.readouterr().err
    assert "taken from the resumed run: `max_samples`" not in told
    assert "--quantization bitsandbytes-8bit" in told and "Weights: bitsandbytes, 8 bit, quantized on loading" in told
    assert shards[5].read_bytes() == rows


def test_a_plain_run_is_not_resumed_in_fewer_bits(quick_run, flags, tmp_path, capsys):
    shutil.copytree(quick_run, tmp_path / "out")
    assert extract_logits.main(flags("out", "--quantization", "torchao-int8")) == 2
    assert "holds another run (quantization: " in capsys.readouterr().err.splitlines()[-1]


def test_wrong_use_and_what_is_missing_have_their_exit_status(flags, quick_model, tmp_path, capsys):
    assert extract_logits.main(flags("out", "--quantization", "dequantize")) == 2
    assert "--quantization dequantize: " in capsys.readouterr().err.splitlines()[-1]
    assert extract_logits.main(flags("out", "--quantization", "torchao-int8", "--gguf_file", "model.gguf")) == 2
    assert "--quantization torchao-int8: a GGUF file has its own" in capsys.readouterr().err.splitlines()[-1]
    fp8 = without_weights(quick_model, tmp_path / "fp8", FP8)
    wanted = [*without("--model_id", flags("out")), "--model_id", str(fp8)]
    assert extract_logits.main(wanted) == 1
    assert "in fp8, which needs a GPU" in capsys.readouterr().err and not list((tmp_path / "out").rglob("*.parquet"))


def test_torchao_where_it_is():
    """The tests that need it, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TORCHAO), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-m", "torchao", "-p", "no:cacheprovider", "-n", "0", "-v", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
    assert done.returncode == 0, done.stdout
    assert " 10 passed" in done.stdout, done.stdout
