"""Tiny random models of many families, for what is done to their logits."""

import torch

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 6},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": 6},
}


def random_model(model_type: str):
    """A random two-layer model of a family, weights large enough for its logits to differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(model_type, **sizes, **ARCHITECTURES[model_type])
    return AutoModelForCausalLM.from_config(config).eval()
