"""Parameters, bytes, cards and operations of models by their configuration alone, against sums made by hand."""

import pytest
import torch

from chat_logits.errors import UsageError
from chat_logits.model.batch_plan import Budget
from chat_logits.model.bits import bits_of
from chat_logits.model.cards import CARDS, GIB, card_named, known_peak, read_size
from chat_logits.model.memory import choose_budget, peak_memory, peak_parts
from chat_logits.model.plan import Batching, choose_card, load_on, seconds_of, smallest_load, work_of
from chat_logits.model.shape import DIVIDED, shape_of

# What the config.json of each says; the rest does not change a size.
QWEN_05B = {  # Qwen2.5-0.5B
    **{"model_type": "qwen2", "dtype": "bfloat16", "vocab_size": 151_936, "tie_word_embeddings": True},
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2},
}
LLAMA_8B = {  # Llama-3.1-8B
    **{"model_type": "llama", "dtype": "bfloat16", "vocab_size": 128_256, "tie_word_embeddings": False},
    **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8},
}
LLAMA_70B = {  # Llama-3.1-70B
    **{"model_type": "llama", "dtype": "bfloat16", "vocab_size": 128_256, "tie_word_embeddings": False},
    **{"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8},
}
QWEN_235B = {  # Qwen3-235B-A22B
    **{"model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 151_936, "tie_word_embeddings": False},
    **{"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 94},
    **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}

# Of a layer: queries (and their biases), keys and values, the output; gate, up and down; two norms.
QWEN_LAYER = (896 * 896 + 896) + 2 * (896 * 128 + 128) + 896 * 896 + 3 * 896 * 4864 + 2 * 896
LAYER_8B = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 14_336 + 2 * 4096
LAYER_70B = 8192 * 8192 + 2 * 8192 * 1024 + 8192 * 8192 + 3 * 8192 * 28_672 + 2 * 8192
ATTENTION_235B = 4096 * 8192 + 2 * 4096 * 512 + 8192 * 4096
EXPERT, ROUTER = 3 * 4096 * 1536, 128 * 4096
NORMS_235B = 2 * 4096 + 2 * 128  # of the layer, of each head's queries and keys
REST_235B = ATTENTION_235B + ROUTER + NORMS_235B

# All parameters, those that work on a token, and of these those of the layers (with the last norm).
COUNTS = {
    "0.5B": (QWEN_05B, 24 * QWEN_LAYER + 896 + 151_936 * 896, 0, 24 * QWEN_LAYER + 896),
    "8B": (LLAMA_8B, 32 * LAYER_8B + 4096 + 2 * 128_256 * 4096, 0, 32 * LAYER_8B + 4096),
    "70B": (LLAMA_70B, 80 * LAYER_70B + 8192 + 2 * 128_256 * 8192, 0, 80 * LAYER_70B + 8192),
    "235B": (
        QWEN_235B,
        94 * (REST_235B + 128 * EXPERT) + 4096 + 2 * 151_936 * 4096,
        94 * 120 * EXPERT,
        94 * (REST_235B + 8 * EXPERT) + 4096,
    ),
}
PUBLISHED = {"0.5B": 494_032_768, "8B": 8_030_261_248, "70B": 70_553_706_496, "235B": 235_093_634_560}


def shape(name_or_config, **changes):
    from transformers import AutoConfig

    config = COUNTS[name_or_config][0] if isinstance(name_or_config, str) else name_or_config
    return shape_of(AutoConfig.for_model(**config | changes))


@pytest.fixture(scope="module", params=COUNTS)
def counted(request):
    _, *counts = COUNTS[request.param]
    return request.param, shape(request.param), counts


def test_parameters_are_counted_to_the_last_one(counted):
    name, found, (parameters, idle, in_layers) = counted
    assert parameters == PUBLISHED[name], "as the checkpoints' own indices have them"
    assert found.parameters == parameters
    assert found.active == parameters - idle
    assert found.active_in_layers() == in_layers
    assert found.weight_bytes() == 2 * parameters
    assert all(weights.is_meta for weights in found.model.parameters())


def test_the_active_parameters_of_the_mixture_are_its_names():
    assert 22.1e9 < shape("235B").active < 22.3e9


# What divides by two is in halves; norms, and a mixture's routers, are whole in each process.
WHOLE_70B, WHOLE_235B = (2 * 80 + 1) * 8192, 94 * (NORMS_235B + ROUTER) + 4096
DIVIDED_70B, DIVIDED_235B = PUBLISHED["70B"] - WHOLE_70B, PUBLISHED["235B"] - WHOLE_235B
# Four key-value heads are not divisible by eight.
ATTENTION_WHOLE = 94 * ATTENTION_235B


@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [
        ("70B", 2, WHOLE_70B + DIVIDED_70B // 2),
        ("70B", 8, WHOLE_70B + DIVIDED_70B // 8),
        ("235B", 4, WHOLE_235B + DIVIDED_235B // 4),
        ("235B", 8, WHOLE_235B + ATTENTION_WHOLE + (DIVIDED_235B - ATTENTION_WHOLE) // 8),
    ],
)
def test_what_a_process_has_of_the_weights(name, processes, expected):
    found = shape(name)
    assert found.weight_bytes(processes) == 2 * expected
    assert found.split(processes).is_attention_whole == (name == "235B" and processes == 8)


def test_a_width_that_does_not_divide_leaves_one_process_the_longer_part():
    found = shape("0.5B", vocab_size=1001, num_hidden_layers=1)
    whole = 3 * 896 + 896  # norms, and biases of the output are none
    longer = 501 * 896 + (QWEN_LAYER - 2 * 896) // 2
    assert found.weight_bytes(2) == 2 * (longer + whole - 896)


# Bytes of the card less those of the weights; a quarter of it over what a token takes in a layer and the cache.
@pytest.mark.parametrize(
    ("name", "card", "cards"),
    [
        *(("0.5B", card, 1) for card in CARDS),
        *(("8B", card, 1) for card in CARDS),
        ("70B", "h100-80gb", 2),
        ("70B", "h200-141gb", 2),  # one has 8 GB beside 141: batches of 683 tokens
        ("70B", "b200-180gb", 1),
        ("70B", "a100-40gb", 8),  # four have 6.6 GB beside 35.3: 556 tokens
        ("70B", "rtx4090-24gb", None),  # eight have 7.0 GB beside 17.6: 591 tokens
        ("235B", "h100-80gb", 8),
        ("235B", "h200-141gb", 4),
        ("235B", "b200-180gb", 4),
        ("235B", "a100-40gb", None),
    ],
)
def test_the_fewest_cards(name, card, cards):
    load, why = smallest_load(shape(name), card_named(card), True, Batching())
    assert (load.cards if load else None) == cards
    assert load is None or (load.total <= load.card.memory and bool(why) == (cards > 1))


def test_batches_on_a_card_follow_the_formula_by_hand():
    """70B on two H100s: of 79 GiB less half the weights a quarter, over a layer's and eight times the cache's bytes."""
    load = load_on(shape("70B"), card_named("h100-80gb"), 2, True, Batching(longest=500))
    room = 79 * GIB - 2 * (WHOLE_70B + DIVIDED_70B // 2)
    a_token, cached = 2 * (8 * 8192 + 4 * 28_672), 2 * 80 * (2 * 8 * 128)
    tokens = int(room / 4 / (a_token + 8 * cached))
    rows = room // 8 // (128_256 * 4)
    assert load.budget == (load.budget.__class__)(tokens, rows) and tokens == 1196
    assert load.parts.logits == 2 * min(rows, tokens) * 128_256 * 4
    assert load.parts.prefix_cache == 8 * tokens * cached
    assert load.parts.layer_at_work == tokens * (a_token + 500 * 5)
    assert load.parts.kept_hidden_states == tokens * (8192 * 6 + 1600 * 16)


def test_a_plan_for_the_cpu_is_what_a_run_on_it_takes(tiny_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    found = shape_of(AutoConfig.from_pretrained(tiny_model), on_cpu=True)
    load, _ = smallest_load(found, choose_card(None, "cpu"), True, Batching(longest=300))
    assert load.budget == choose_budget(model, None, None)
    held = peak_memory(model, load.budget, 300, load.budget.tokens, True)
    assert load.total == held + sum(weights.nbytes for weights in model.parameters())


def test_operations_and_hours_of_a_billion_tokens():
    """Conversations of 512 tokens, 256 of them extracted, as docs/scale.md has them: its figures, and its hours."""
    tokens, extracted, pairs = 2e9, 1e9, 2e9 / 512 * (512 * 513 / 2)
    for name, heads, layers, head, in_text in (
        ("0.5B", 14 * 64, 24, 151_936 * 896, 1.75e9),
        ("8B", 32 * 128, 32, 128_256 * 4096, 29.2e9),
        ("70B", 64 * 128, 80, 128_256 * 8192, 277e9),
    ):
        work = work_of(shape(name), tokens, pairs, extracted)
        assert work.decoder == 2 * COUNTS[name][3] * 2 * 10**9
        assert work.attention == pytest.approx(4 * heads * layers * pairs, rel=1e-12)
        assert work.head == 2 * head * 10**9
        assert work.total / extracted == pytest.approx(in_text, rel=0.01)
        assert seconds_of(work, card_named("h100-80gb")) == pytest.approx(work.total / (0.4 * 989e12))
    hours = seconds_of(work_of(shape("8B"), tokens, pairs, extracted), card_named("h100-80gb")) / 3600
    assert hours == pytest.approx(20.5, rel=0.01), "docs/scale.md has 21 with the selection"
    assert seconds_of(work, card_named("80GiB")) is None


def test_the_work_of_a_process_is_its_part_of_the_experts_and_all_of_an_attention_that_does_not_divide():
    found, tokens, pairs = shape("235B"), 10**9, 10**11
    whole, fourth, eighth = (work_of(found, tokens, pairs, 0, processes) for processes in (1, 4, 8))
    norms = 94 * (NORMS_235B + ROUTER) + 4096
    shared = 94 * (ATTENTION_235B + 8 * EXPERT)
    assert whole.decoder == 2 * (norms + shared) * tokens
    assert fourth.decoder == 2 * (norms + shared // 4) * tokens
    assert eighth.decoder == 2 * (norms + 94 * ATTENTION_235B + 94 * 8 * EXPERT // 8) * tokens
    assert whole.attention == 94 * 64 * 128 * 4 * pairs == 4 * fourth.attention == eighth.attention


FAMILIES = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
        "gemma2",
        "gemma3_text",
        "mixtral",
        "gpt_oss",
        "deepseek_v3",
    ),
    *("granite", "cohere", "phi3", "glm4", "gpt2"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_processes_share_what_a_run_has_them_share(family):
    """The plan's rule beside that of loading, in transformers' default sizes of the family."""
    from transformers import AutoConfig

    from chat_logits.model.parts import choose_split

    config = AutoConfig.for_model(family)
    config.num_hidden_layers, config.dtype = 2, "bfloat16"
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:2])
    found = shape_of(config)
    for processes in (2, 3, 4, 8):
        split = found.split(processes)
        try:
            chosen, told = choose_split(found.model, processes)
        except UsageError:
            assert split.obstacle
            continue
        by_expert = (found.model.ep_plan or {}) if chosen.ep_size > 1 else {}
        styles = found.model.tp_plan | (chosen.tp_plan or {}) | by_expert
        assert {name: DIVIDED.get(style) for name, style in styles.items()} == {
            name: DIVIDED.get(style) for name, style in split.styles.items()
        }
        assert split.obstacle is None and split.is_attention_whole == bool(told)


def test_a_model_without_a_plan_is_not_shared():
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000}
    found = shape({"model_type": "gpt2", "dtype": "float16", **sizes})
    load, why = smallest_load(found, card_named("1MB"), True, Batching())
    assert load is None and "transformers' plan has nothing in GPT2LMHeadModel's layers" in why


def test_bits_of_a_weight_are_taken_from_the_configuration_or_not_guessed():
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    found = shape("8B", quantization_config=awq)
    matrices = 32 * (LAYER_8B - 2 * 4096)
    kept = 2 * (PUBLISHED["8B"] - matrices)
    assert found.weight_bytes() == kept + matrices * (4 + 20 / 128) / 8
    assert "quantised" in found.split(2).obstacle
    routed = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "mlp.gate."]}
    experts = 94 * 128 * EXPERT
    assert shape("235B", quantization_config=routed).weight_bytes() == pytest.approx(
        2 * (PUBLISHED["235B"] - experts) + experts * 4.25 / 8
    )
    with pytest.raises(UsageError, match=r"\(hqq\) names no bits .* not guessed"):
        shape("8B", quantization_config={"quant_method": "hqq"})


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
            },
            4 + 20 / 128,
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {}}}}, None),
        ({"quant_method": "awq"}, None),
    ],
)
def test_bits_by_method(quantization, bits):
    assert bits_of(quantization) == bits


def test_a_mixture_that_does_not_say_how_many_experts_work_has_no_operations():
    found = shape("235B", num_hidden_layers=1)
    vars(found.model.config)["num_experts_per_tok"] = None
    assert found.active is None and work_of(found, 1, 1, 1) is None


def test_experts_are_found_wherever_they_lie_and_not_guessed():
    """JetMoe has experts in its attention, too, and none of its modules is called experts."""
    found = shape({"model_type": "jetmoe", "dtype": "bfloat16"})
    expert = 3 * 2048 * 5632 + 2 * 2048 * 2048
    assert (found.is_mixture, found.experts_a_token) == (True, 2)
    assert found.active == found.parameters - 12 * 6 * expert
    doge = {"model_type": "doge", "dtype": "bfloat16", "num_experts": 16}  # experts are rows of embeddings there
    for unlike in (shape({**doge, "is_moe": True}), shape({"model_type": "longcat_flash", "dtype": "bfloat16"})):
        assert unlike.is_mixture and unlike.active is None and work_of(unlike, 1, 1, 1) is None
    dense = shape(doge)  # whose number of experts is one it does not use
    assert not dense.is_mixture and dense.active == dense.parameters


def test_layers_that_differ_are_counted_each_by_its_own():
    """Gemma 4: of six layers one has heads of 512, five have heads of 256, and each token has a row for each layer."""
    found = shape({"model_type": "gemma4_text", "dtype": "bfloat16"})
    assert found.attended == 25 * 8 * (256 + 256) + 5 * 8 * (512 + 512)
    rows = 262_144 * 2304 + 262_144 * 30 * 256
    assert found.active_in_layers() == found.parameters - rows
    wide = {"intermediate_size": [256, 512], "num_hidden_layers": 2, "activation_sparsity_pattern": [0.0, 0.0]}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    nested = shape({"model_type": "gemma3n_text", "dtype": "bfloat16", **wide, **kinds})
    one = peak_parts(nested.model, "cuda", Budget(1, 1), 1, 1, prefix_cache=False).layer_at_work
    assert one == (8 * 2048 + 4 * 512) * 2 + 5


def test_the_number_format_is_not_guessed():
    with pytest.raises(UsageError, match=r"`dtype` auto: the model's config.json names none"):
        shape("0.5B", dtype=None)


def test_cards_by_name_and_by_size():
    assert card_named("H100-80GB").memory == 79 * GIB and card_named("24 GB").memory == 24 * 10**9
    assert read_size("1.5TiB") == 3 * 2**39
    for wrong in ("h100", "80", "GB", "-1GB"):
        with pytest.raises(UsageError, match=rf"`plan_for` {wrong}: expected one of h100-80gb, "):
            card_named(wrong)
    assert not torch.accelerator.is_available() or choose_card(None).source == "the device here"


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_a_card_is_known_by_what_cuda_calls_it(called, name):
    assert known_peak(called) == (CARDS[name].peak if name else None)
