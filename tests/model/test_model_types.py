"""Sixty and more model types with tiny random weights: right within 0.001 nats, or refused with the reason."""

import functools
import re
from pathlib import Path

import model_types
import numpy as np
import pytest
import torch
import transformers
from conftest import make_tiny_model
from model_types import LIMIT, PAGE, TYPES
from transformers import AutoConfig, AutoModelForCausalLM

import extract_logits
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.data.row_alignment import RowAligner

REFUSED = {
    "bart": "an encoder reads its prompts",
    **dict.fromkeys(("bert", "electra", "xlm"), "so the model is not causal"),
    "xmod": "the forward pass over token ids alone fails",  # it needs a language
}
KNOWN = {name for name in TYPES if name in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result of a type, computed once."""
    return functools.cache(lambda name: model_types.try_type(name, TYPES[name], tmp_path_factory.mktemp("type")))


@pytest.mark.parametrize("model_type", sorted(KNOWN))
def test_what_is_stored_is_the_reference_forward_pass(model_type, results):
    result = results(model_type)
    if model_type in REFUSED:
        assert REFUSED[model_type] in result.refusal and "\n" not in result.refusal
    else:
        assert result.refusal == "" and result.error <= LIMIT
    assert max(result.windows, default=0) < 130  # the prefix is longer than those that cut attention


def test_there_are_sixty_types():
    assert len(set(TYPES) - set(REFUSED)) >= 60


def test_the_page_has_what_came_out(results):
    page = PAGE.read_text(encoding="utf-8")
    if transformers.__version__ == model_types.made_with(page):  # another version may find other ways
        assert model_types.with_table(page, {name: results(name) for name in TYPES}) == page
    pinned = re.search(r"^transformers==(\S+)$", (Path(PAGE.parent.parent) / "requirements.txt").read_text(), re.M)
    assert pinned and pinned[1] == model_types.made_with(page)


@pytest.mark.parametrize("model_type", ["moshi", "gemma3_text", "deepseek_v32", "gemma4_unified_text"])
def test_the_command_stores_the_reference_forward_pass(model_type, tmp_path, chat_file):
    """Through a system prompt of some 200 tokens, longer than the window of 24: with the cache, or without it."""
    folder = make_tiny_model(tmp_path / "model", vocab_size=49_152)
    torch.manual_seed(0)
    sizes = {**model_types.SIZES, **TYPES[model_type], "vocab_size": 49_152, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    source = chat_file([{"question": f"What is {i}?", "answer": f"It is {'so ' * i}{i}."} for i in range(6)])
    out, system = tmp_path / "out", "You answer in one short sentence, whatever is asked. " * 16
    flags = ("--model_id", folder, "--dataset_id", source, "--output_dir", out, "--system_prompt", system)
    assert extract_logits.main([*map(str, flags), "--device", "cpu"]) == 0
    dataset, tokenizer = open_with_tokenizer(str(out))
    aligner = RowAligner(tokenizer, dataset.manifest)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in dataset.rows():
        found = aligner.align(row)
        at = np.array(found.positions)
        assert at[0] > 150
        with torch.inference_mode():
            log_probs = model(torch.tensor(found.input_ids)[None]).logits[0].double().log_softmax(-1).numpy()
        np.testing.assert_allclose(row["token_log_probs"], log_probs[at - 1, found.input_ids[at]], atol=LIMIT)
    assert dataset.manifest.prefix_cache is model_type.startswith("gemma")
