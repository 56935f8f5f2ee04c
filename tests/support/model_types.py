"""Tiny random models of many types of transformers through the extraction, and the table of them in docs/models.md.

    python tests/support/model_types.py    # writes the table anew

Each is saved, loaded and probed as the command does it, and computes conversations with a shared prefix that is longer
than any window. What is stored of the target tokens is held against the reference forward pass of each conversation
alone.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from chat_logits.data.alignment import Alignment  # noqa: E402
from chat_logits.data.reader import Aligned  # noqa: E402
from chat_logits.errors import ToolkitError  # noqa: E402
from chat_logits.model.batching import Batches, Sharing  # noqa: E402
from chat_logits.model.limits import input_limits, load_config  # noqa: E402
from chat_logits.model.loading import load_model  # noqa: E402
from chat_logits.model.probe import named_windows, probe_model  # noqa: E402

PAGE = REPO / "docs" / "models.md"
VOCABULARY, SHARED, LENGTHS = 500, 72, (84, 110, 97, 84, 76, 40)  # the last has another beginning
LIMIT = 1e-3  # nats
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# What many types have in common, and then what each needs to be tiny and to have windows of 24 tokens.
WINDOW = {"sliding_window": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 32}
INDEX = {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DEEPSEEK_V4 = INDEX | EXPERTS | {"num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2}
DEEPSEEK_V4 |= {"o_lora_rank": 16, "n_routed_experts": 4, "mlp_layer_types": ["moe", "moe"], "sliding_window": 8}
DEEPSEEK_V4 |= {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]}
GEMMA_3N = {"intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0}
GEMMA_3N |= {"layer_types": ["sliding_attention", "full_attention"], "altup_num_inputs": 2, "laurel_rank": 8}
GEMMA_3N |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 300}
TYPES: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bamba": MAMBA | {"mamba_chunk_size": 24, "attn_layer_indices": [1]},
    "bart": {},
    "bert": {},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | INDEX,
    "deepseek_v4": DEEPSEEK_V4,
    "diffllama": {},
    "doge": {},
    "dory": WINDOW | {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3, "n_recurrent_layers": 1},
    "electra": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone": {},
    "exaone4": WINDOW | {"sliding_window_pattern": 2},
    "exaone_moe": EXPERTS | {"num_experts": 4},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma3n_text": WINDOW | GEMMA_3N,
    "gemma4_text": WINDOW,
    "gemma4_unified_text": WINDOW,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | INDEX,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 24},
    "gpt_neox": {},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granite_swa": WINDOW,
    "granitemoe": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "jais2": {},
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"num_experts": 4, "layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 24},
    "mamba": {},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 24},
    "mellum": WINDOW | EXPERTS | {"num_experts": 4},
    "mimo_v2_flash": WINDOW | EXPERTS | {"n_routed_experts": 4},
    "minimax": {"block_size": 24, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4},
    "minimax_m2": EXPERTS | {"num_local_experts": 4},
    "minimax_m3_vl_text": {},
    "ministral": WINDOW,
    "ministral3": WINDOW,
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "modernbert-decoder": {"local_attention": 24},
    "moshi": WINDOW | {"num_key_value_heads": 4, "ffn_dim": 64},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3_5_moe_text": EXPERTS
    | LINEAR
    | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR | {"num_hidden_layers": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "qwen3_next": EXPERTS | LINEAR | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 24, "lru_width": 32},
    "roberta": {"is_decoder": True},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": WINDOW | {"use_sliding_window": True},
    "stablelm": {},
    "starcoder2": WINDOW,
    "trocr": {},
    "vaultgemma": WINDOW,
    "xglm": {},
    "xlm": {},
    "xmod": {},
}


@dataclass(frozen=True)
class Result:
    """What became of a model type: the largest error in nats of what is stored, or why it is refused."""

    windows: list[int]
    sharing: Sharing | None = None
    error: float | None = None
    refusal: str = ""


def try_type(model_type: str, changes: dict, folder: Path) -> Result:
    """A random model of this type through the extraction."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    windows = named_windows(config)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoConfig.for_model(model_type, **{**SIZES, **changes}).save_pretrained(folder)  # the model may have changed it
    try:
        limits = input_limits(load_config(str(folder)))
        model = load_model(str(folder))
        sharing = probe_model(model)
        assert limits.positions is None or limits.positions >= max(LENGTHS), limits
        return Result(windows, sharing, _largest_error(model, sharing))
    except ToolkitError as error:
        return Result(windows, refusal=str(error))


def _largest_error(model, sharing: Sharing) -> float:
    """Of the log-probabilities of target tokens, in nats, against full logits of one conversation at a time."""
    settings = SimpleNamespace(top_k=8, top_p=0.98, num_sampled=4, seed=0, prefix_cache=True)
    settings.batch_tokens, settings.batch_logit_rows = 250, 100
    largest, seen = 0.0, 0
    for members, pending in Batches(model, settings, sharing).compute(conversations()):
        found, start = pending.wait().token_log_probs, 0
        for aligned in members:
            expected = _reference(model, aligned)
            largest = max(largest, np.abs(found[start : start + len(expected)] - expected).max())
            start, seen = start + len(expected), seen + 1
    assert seen == len(LENGTHS)
    return float(largest)


def _reference(model, aligned: Aligned) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.from_numpy(aligned.input_ids)[None]).logits[0].double()
    return logits.log_softmax(-1)[aligned.positions - 1, aligned.input_ids[aligned.positions]].numpy()


def conversations() -> list[Aligned]:
    """Random tokens but for a shared prefix; some tokens stand behind the last extracted one."""
    random = np.random.default_rng(1)
    prefix, ready = random.integers(3, VOCABULARY, SHARED), []
    for index, length in enumerate(LENGTHS):
        shared = prefix[: SHARED if length > SHARED else 0]
        ids = np.concatenate([shared, random.integers(3, VOCABULARY, length - len(shared))])
        ready.append(Aligned(index, [], Alignment(ids, []), np.arange(len(shared) + 1, length - 2)))
    return ready


# --- the table ---

BATCHES = {"padded": "of any lengths", "equal": "of one length, read whole", "alone": "each alone"}


def table(results: dict[str, Result]) -> str:
    """The results as Markdown, a line a type."""
    lines = ["| type | window, tokens | in a batch | shared prefix | |", "| --- | --- | --- | --- | --- |"]
    for name, result in results.items():
        windows = ", ".join(map(str, result.windows))
        if result.sharing is None:
            lines.append(f"| `{name}` | {windows} | | | refused: {result.refusal.partition(chr(10))[0]} |")
        else:
            cached = "cached" if result.sharing.prefix else "not cached"
            lines.append(f"| `{name}` | {windows} | {BATCHES[result.sharing.batch]} | {cached} | right |")
    return "\n".join(lines) + "\n"


def with_table(page: str, results: dict[str, Result]) -> str:
    """The page's text with its table as it should be."""
    made = table(results)
    return re.sub(r"(<!-- table: models -->\n).*?(?=<!-- end -->)", lambda found: found[1] + made, page, flags=re.S)


def made_with(page: str) -> str:
    """The version of transformers that the page says its table was made with."""
    found = re.search(r"transformers (\d+\.\d+\.\d+)", page)
    assert found
    return found[1]


def try_all() -> dict[str, Result]:
    """All of ``TYPES``, in order."""
    results = {}
    for name, changes in TYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = try_type(name, changes, Path(folder))
    return results


if __name__ == "__main__":
    import transformers

    text = PAGE.read_text(encoding="utf-8").replace(
        made_with(PAGE.read_text(encoding="utf-8")), transformers.__version__
    )
    PAGE.write_text(with_table(text, try_all()), encoding="utf-8")
