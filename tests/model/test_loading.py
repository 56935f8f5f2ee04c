"""Checkpoints: what is not whole, or is no decoder, is refused by name; of vision-language ones the text is used."""

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, make_tiny_model
from random_models import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, BartConfig, T5Config, ViTConfig

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model import loading, precision
from chat_logits.model.limits import input_limits
from chat_logits.model.probe import probe_model
from chat_logits.model.selection import SelectionSettings
from chat_logits.model.teacher import Request, Teacher

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def changed(tmp_path):
    """A tiny checkpoint whose tensors have been changed by a function."""

    def of(change) -> str:
        folder = make_tiny_model(tmp_path, vocab_size=1000)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return of


def test_within_autocast_no_model_is_loaded(tmp_path):
    """It would compute in bfloat16 what is recorded as float32."""
    folder = make_tiny_model(tmp_path, vocab_size=1000)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match=r"called within torch\.autocast"):
        loading.load_model(str(folder))
    loading.load_model(str(folder))


SET_TO_FEWER_BITS = {
    "as containers do": lambda: torch.set_float32_matmul_precision("high"),
    "to bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
    "by the other way": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("way", SET_TO_FEWER_BITS)
def test_float32_is_whole_whatever_the_process_was_set_to(tmp_path, caplog, way):
    folder = make_tiny_model(tmp_path, vocab_size=1000)
    SET_TO_FEWER_BITS[way]()
    loading.load_model(str(folder))
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    assert (cuda.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, False, "highest")
    kinds = (cuda, cudnn.conv, torch.backends.mkldnn.matmul)
    assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 3
    assert "float32 products were set to fewer bits" in caplog.text


def test_tf32_below_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match="NVIDIA_TF32_OVERRIDE=1 in the environment rounds float32 products"):
        loading.load_model(str(make_tiny_model(tmp_path, vocab_size=1000)))


def test_missing_tensors_are_named(changed):
    folder = changed(lambda tensors: tensors.pop(UP_PROJ))
    with pytest.raises(ToolkitError, match=rf"not whole: 1 tensors are missing \({UP_PROJ}\)"):
        loading.load_model(folder)


def test_of_many_missing_tensors_the_first_are_named(changed):
    folder = changed(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    with pytest.raises(ToolkitError, match=r"18 tensors are missing \(model\.layers\.0\..* and 15 others\)"):
        loading.load_model(folder)


def test_tensors_of_another_shape_are_named_with_both(changed):
    folder = changed(lambda tensors: tensors.update({UP_PROJ: torch.zeros(60, 32)}))
    with pytest.raises(ToolkitError, match=rf"1 have another shape \({UP_PROJ} \[60, 32\] for \[64, 32\]\)"):
        loading.load_model(folder)


def test_tensors_that_the_model_does_not_use_are_told(changed, caplog):
    folder = changed(lambda tensors: tensors.update({"vision.weight": torch.zeros(2)}))
    with caplog.at_level(logging.WARNING, "chat_logits"):
        loading.load_model(folder)
    assert "1 tensors of its checkpoint are not used (vision.weight)" in caplog.text


def test_tied_weights_are_not_missing(tmp_path):
    folder = make_tiny_model(tmp_path, vocab_size=1000, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = loading.load_model(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def mapped_share(model, folder) -> float:
    """Of the bytes of a model's weights, those that are pages of the files in a folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    pages = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    mapped = [one.nbytes for one in model.parameters() if any(a <= one.data_ptr() < b for a, b in pages)]
    return sum(mapped) / sum(one.nbytes for one in model.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped")
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 1), ("float16", 0)])
def test_weights_in_the_checkpoints_dtype_are_pages_of_its_files(tmp_path, dtype, expected):
    """So that, on their way to a card, they take no memory that the system cannot have back, in all processes once."""
    random_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    assert mapped_share(loading.load_model(str(tmp_path), dtype=dtype), tmp_path) == expected


@pytest.mark.parametrize(("kind", "is_told"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_a_card_that_emulates_bfloat16_is_named(monkeypatch, caplog, kind, is_told):
    monkeypatch.setattr(precision, "_emulating_card", lambda device: "Tesla T4" if device.type == "cuda" else None)
    model = random_model("llama").to(getattr(torch, kind))
    with caplog.at_level(logging.WARNING, "chat_logits"):
        precision.tell_of_emulation("a/model", model, [torch.device("cpu")])
        assert not caplog.records
        precision.tell_of_emulation("a/model", model, [torch.device("cuda", 0), torch.device("cuda", 1)])
    assert len(caplog.records) == is_told
    assert not is_told or "a/model: in bfloat16, as its checkpoint is, for which Tesla T4 has no" in caplog.text


def test_no_device_here_but_a_card_is_said_to_emulate():
    assert all(precision._emulating_card(torch.device(kind)) is None for kind in ("cpu", "mps", "xpu"))


@pytest.mark.parametrize("config", [BartConfig(), T5Config()], ids=["bart", "t5"])
def test_models_with_an_encoder_are_refused(config):
    with pytest.raises(ToolkitError, match=f"model type {config.model_type}: an encoder reads its prompts"):
        input_limits(config)


def test_models_without_a_vocabulary_are_refused():
    with pytest.raises(ToolkitError, match="model type vit: its configuration has no vocab_size") as refused:
        input_limits(ViTConfig())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", None])
def test_weights_that_are_no_safetensors_are_told_from_others(tmp_path, text):
    """Empty, a pointer of Git LFS in their place, cut off."""
    file = make_tiny_model(tmp_path, vocab_size=1000) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000] if text is None else text)
    with pytest.raises(ToolkitError, match=r"safetensors are damaged, or were not fetched \(.*\)\. Copy it again"):
        loading.load_model(str(tmp_path))


def test_what_transformers_says_of_a_configuration_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ToolkitError, match="has model type `no-such-type` but Transformers does not") as refused:
        loading.load_model(str(tmp_path))
    assert "\n" not in str(refused.value) and "pip install" not in str(refused.value)


TEXT = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", "image_size": 28, "patch_size": 14}),
        ("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}),
    ],
)
def test_of_a_vision_language_checkpoint_the_text_is_used(tmp_path, kind, text, vision):
    """The log-probabilities are those of its own class, whole conversations at once."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config={**TEXT, **text}, vision_config={**VISION, **vision})
    own = AutoModelForImageTextToText.from_config(config).eval()
    own.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / name)
    model = loading.load_model(str(tmp_path))
    assert input_limits(model.config).vocab_size == 1000
    probe_model(model)
    ids = np.random.default_rng(0).integers(0, 1000, 30)
    request = Request(ids, np.arange(1, 30), np.full(29, 0.5))
    settings = SelectionSettings(top_k=8, top_p=0.98, num_sampled=2)
    found = Teacher(model, 1000).distributions([request], settings).wait()
    with torch.inference_mode():
        log_probs = own(torch.tensor(ids)[None]).logits[0].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(found.token_log_probs, log_probs[np.arange(29), ids[1:]], atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("trocr", {"max_position_embeddings": 77}, 77),
        ("bloom", {}, None),
        ("llama", {"max_position_embeddings": 100, "max_target_positions": 77}, 77),
        ("mamba", {"max_seq_len": 77}, 77),
    ],
)
def test_the_most_tokens_that_a_model_reads_whatever_its_configuration_calls_them(kind, sizes, expected):
    assert input_limits(AutoConfig.for_model(kind, **sizes)).positions == expected
