"""Adapters: merged into their base by peft, against weights computed by hand; or refused by name, never left out."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL, make_tiny_model
from safetensors.torch import load_file, save_file

import extract_logits
from chat_logits.data.hashing import hash_files
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model import loading
from chat_logits.model.adapters import find_base
from chat_logits.storage.dataset import open_dataset

Q_PROJ = "model.layers.1.self_attn.q_proj"
RANK, ALPHA = 2, 6
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": [Q_PROJ]}
LORA_TENSORS = {"lora_A": (RANK, 32), "lora_B": (32, RANK)}


def write_adapter(folder, base, **changes):
    """A LoRA of one matrix, as peft saves it, with random numbers on both sides."""
    folder.mkdir(exist_ok=True)
    config = {**LORA, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.{Q_PROJ}.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in LORA_TENSORS.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base", vocab_size=49_152)


@pytest.fixture(params=["instead of weights", "beside weights"])
def adapter(request, base, tmp_path):
    if request.param == "beside weights":
        return write_adapter(base, "user/not-there")
    folder = write_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def extract(model, source, out) -> int:
    return extract_logits.main([*map(str, ("--model_id", model, "--dataset_id", source, "--output_dir", out))])


def test_an_adapter_is_refused_by_name_without_peft(adapter, chat_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    assert extract(adapter, chat_file([{"question": "Hi", "answer": "Hello"}]), tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"model {adapter}: an adapter (adapter_config.json) on " in line and "peft is not installed" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(ToolkitError, match=r"an adapter \(adapter_config\.json\) on"):  # as `--verify` loads it
        loading.load_model(str(adapter))


def test_an_adapter_is_merged_into_its_base(adapter, base, chat_file, tmp_path):
    pytest.importorskip("peft")
    model = loading.load_model(str(adapter))
    lora = load_file(adapter / "adapter_model.safetensors")
    down, up = (lora[f"base_model.model.{Q_PROJ}.{name}.weight"] for name in LORA_TENSORS)
    expected = load_file(base / "model.safetensors")[f"{Q_PROJ}.weight"] + up @ down * ALPHA / RANK
    torch.testing.assert_close(model.get_parameter(f"{Q_PROJ}.weight"), expected)
    assert type(model).__name__ == "LlamaForCausalLM" and model.name_or_path == str(adapter)

    assert extract(adapter, chat_file([{"question": "Hi", "answer": "Hello there"}]), tmp_path / "out") == 0
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.manifest.model_revision == hash_files(adapter)
    assert dataset.manifest.base_revision == hash_files(base)
    row = dataset.read_row(0)
    from chat_logits.analysis.opening import open_with_tokenizer
    from chat_logits.data.row_alignment import RowAligner

    found = RowAligner(open_with_tokenizer(str(tmp_path / "out"))[1], dataset.manifest).align(row)
    whole = loading.load_model(str(make_tiny_model(tmp_path / "again", vocab_size=49_152)))
    whole.get_parameter(f"{Q_PROJ}.weight").data.copy_(expected)
    with torch.inference_mode():
        log_probs = whole(torch.tensor(found.input_ids)[None]).logits[0].double().log_softmax(-1).numpy()
    at = np.array(found.positions)
    np.testing.assert_allclose(row["token_log_probs"], log_probs[at - 1, found.input_ids[at]], atol=2e-5)


def test_an_adapter_that_is_not_whole_is_refused(base, tmp_path):
    pytest.importorskip("peft")
    folder = write_adapter(tmp_path / "adapter", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.{Q_PROJ}.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ToolkitError, match=rf"does not fit its base: 1 tensors are missing \({name}\)"):
        loading.load_model(str(folder))
    save_file({**tensors, "base_model.model.other.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ToolkitError, match=r"1 are of another model \(base_model\.model\.other\.lora_A\.weight\)"):
        loading.load_model(str(folder))


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(ToolkitError, match="names no base model"):
        loading.load_model(str(write_adapter(tmp_path / "nameless", base, base_model_name_or_path=None)))
    inner = write_adapter(tmp_path / "inner", base)
    with pytest.raises(ToolkitError, match=r"on .*inner, which is an adapter itself"):
        loading.load_model(str(write_adapter(tmp_path / "outer", inner)))
    with pytest.raises(UsageError, match=r"`device_map`: model .*inner is an adapter"):
        loading.load_model(str(inner), device_map="auto")
    with pytest.raises(UsageError, match="goes into no GGUF file"):
        loading.load_model(str(inner), gguf_file="model.gguf")


def test_a_record_of_another_form_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ToolkitError, match=r"its adapter_config\.json is not a JSON object"):
        find_base(str(tmp_path))
    (tmp_path / "adapter_config.json").write_bytes(b"{\xff")
    with pytest.raises(ToolkitError, match=r"its adapter_config\.json cannot be read: 'utf-8' codec"):
        find_base(str(tmp_path))


@pytest.mark.parametrize("name", ["./nope", "/nowhere/at/all"])
def test_a_model_that_is_not_there_is_told_as_that(name):
    with pytest.raises(UsageError, match=f"^model {name}: no such file or folder"):
        find_base(name)
