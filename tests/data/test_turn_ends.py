"""Which token ends a turn of the assistant, in every family of templates/, against the token written out by hand."""

import re

import pytest
from template_families import CONVERSATIONS, FAMILIES, IM_END, SENTENCE, TOOL_USE, Conversation, talk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat_logits.data.alignment import PROMPT, SPECIAL_REASON, Aligner, Alignment
from chat_logits.data.templates import SHIPPED, ChatTemplate
from chat_logits.data.tokenizer import skipped_token_ids

TWO_TURNS = talk("Hi", "Hello!", "2+2?", "4")
ENDS = {  # of the two turns; GLM's turns end where the next message begins
    "command_r": ["<|END_OF_TURN_TOKEN|>"] * 2,
    "deepseek_r1": [SENTENCE] * 2,
    "deepseek_r1_distill": [SENTENCE] * 2,
    "deepseek_v3": [SENTENCE] * 2,
    "falcon3": ["<|endoftext|>"] * 2,
    "gemma2": ["<end_of_turn>"] * 2,
    "gemma3": ["<end_of_turn>"] * 2,
    "gemma4": ["<turn|>"] * 2,
    "gemma4_large": ["<turn|>"] * 2,
    "glm4": ["<|user|>"],
    "glm4_5": ["<|user|>"],
    "gpt_oss": ["<|end|>", "<|return|>"],
    "granite3": ["<|end_of_text|>"] * 2,
    "lfm2": [IM_END] * 2,
    "llama3": ["<|eot_id|>"] * 2,
    "llama3_1": ["<|eot_id|>"] * 2,
    "llama3_2": ["<|eot_id|>"] * 2,
    "mistral": ["</s>"] * 2,
    "mistral_nemo": ["</s>"] * 2,
    "mistral_small": ["</s>"] * 2,
    "nemotron3": [IM_END] * 2,
    "nemotron3_ultra": [IM_END] * 2,
    "olmo2": ["<|endoftext|>"] * 2,
    "phi3": ["<|end|>"] * 2,
    "phi3_5": ["<|end|>"] * 2,
    "phi4": [IM_END] * 2,
    "phi4_mini": ["<|end|>"] * 2,
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_2507", "qwen3_2507_thinking"), [IM_END] * 2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_nothink", "qwen3_6", "smollm2", "smollm3"), [IM_END] * 2),
}
SPECIAL = [
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<｜begin▁of▁sentence｜>", SENTENCE, "<｜User｜>", "<｜Assistant｜>", "<bos>", "<eos>", "<s>", "</s>"),
    *("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>", "<|end|>", "[gMASK]", "<sop>"),
    *("<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|im_start|>", IM_END),
    *("<|im_sep|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call_start|>"),
    *("<|tool_call_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|python_tag|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
]
GENERATION_TAG = re.compile(r"\{%-? (end)?generation -?%\}")


def tokenizer_of(eos: str) -> PreTrainedTokenizerFast:
    """One token a byte, and all families' special tokens; think tags are tokens, but no special ones."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def aligner_of(family: str, text: str | None = None, keep: bool = False, **kwargs) -> Aligner:
    known = FAMILIES[f"{family}.jinja"]
    tokenizer = tokenizer_of(known.eos)
    text = text or (SHIPPED / f"{family}.jinja").read_text(encoding="utf-8")
    tokens = {"bos_token": known.bos, "eos_token": known.eos}
    template = ChatTemplate(text, tokens, kwargs, date="2025-01-01")
    return Aligner(tokenizer, template, skipped_token_ids(tokenizer), keep_end_of_turn=keep)


def align(chat: Conversation, aligner: Aligner) -> Alignment:
    return aligner.align(chat.messages, chat.kwargs.get("tools"))


def ends(alignment: Alignment, aligner: Aligner) -> list[str]:
    return aligner.tokenizer.convert_ids_to_tokens(alignment.input_ids[list(alignment.turn_ends)].tolist())


def test_every_family_is_in_the_table():
    assert {f"{family}.jinja" for family in ENDS} == set(FAMILIES)


@pytest.mark.parametrize("family", ENDS)
def test_what_ends_a_turn_stands_right_behind_the_answer(family):
    aligner = aligner_of(family)
    alignment = align(TWO_TURNS, aligner)
    assert ends(alignment, aligner) == ENDS[family]
    before = aligner.tokenizer.convert_ids_to_tokens([alignment.input_ids[i - 1] for i in alignment.turn_ends])
    assert before == ["!", "4"][: len(before)]
    assert {alignment.reasons[i] for i in alignment.turn_ends} <= {SPECIAL_REASON, PROMPT}


@pytest.mark.parametrize("family", ENDS)
def test_kept_ends_are_extracted_and_nothing_else_changes(family):
    skipped, kept = align(TWO_TURNS, aligner_of(family)), align(TWO_TURNS, aligner_of(family, keep=True))
    assert kept.input_ids.tolist() == skipped.input_ids.tolist() and kept.turn_ends == skipped.turn_ends
    assert kept.positions.tolist() == sorted([*skipped.positions.tolist(), *skipped.turn_ends])
    changed = [i for i, pair in enumerate(zip(kept.reasons, skipped.reasons, strict=True)) if pair[0] != pair[1]]
    assert tuple(changed) == kept.turn_ends


MOVED = {  # render an earlier answer otherwise than the last, or open it otherwise than their prompt does
    *("deepseek_r1", "deepseek_r1_distill", "gemma4_large", "gpt_oss", "nemotron3", "nemotron3_ultra"),
    *("phi3", "phi3_5", "phi4_mini", "qwen3", "qwen3_2507_thinking", "qwen3_5", "qwen3_5_nothink", "qwen3_6"),
}


@pytest.mark.parametrize("family", sorted(ENDS.keys() - MOVED))
def test_spans_from_prefixes_end_at_the_same_tokens(family):
    """The family's template without its marks."""
    text = GENERATION_TAG.sub("", (SHIPPED / f"{family}.jinja").read_text(encoding="utf-8"))
    aligner = aligner_of(family, text)
    assert ends(align(TWO_TURNS, aligner), aligner) == ENDS[family]


def test_the_end_of_the_conversation_is_not_taken_for_the_answers():
    """phi-4-mini's last answer ends with <|end|><|endoftext|>."""
    text = GENERATION_TAG.sub("", (SHIPPED / "phi4_mini.jinja").read_text(encoding="utf-8"))
    aligner = aligner_of("phi4_mini", text)
    alignment = align(talk("Hi", "Hello!"), aligner)
    assert ends(alignment, aligner) == ["<|end|>"]
    (end,) = alignment.turn_ends
    assert aligner.tokenizer.convert_ids_to_tokens(alignment.input_ids[end:].tolist()) == ["<|end|>", "<|endoftext|>"]


CALLS = {  # what ends the call, and the answer after its result
    ("gpt_oss", "tool_round"): ["<|call|>", "<|return|>"],
    ("gpt_oss", "tool_thoughts"): ["<|call|>", "<|return|>"],
    ("llama3_1", "tool_round"): ["<|eot_id|>", "<|eot_id|>"],
    ("lfm2", "tool_round"): [IM_END, IM_END],
    ("mistral", "tool_round"): ["</s>", "</s>"],
    ("nemotron3", "tool_round"): [IM_END, IM_END],
    ("qwen3", "two_calls"): [IM_END, IM_END],
    ("glm4_5", "tool_round"): ["<|observation|>"],
    ("glm4_5", "tool_round_text"): ["<|observation|>", "<|user|>"],
}


@pytest.mark.parametrize(("family", "name"), CALLS)
def test_what_ends_a_tool_call(family, name):
    aligner = aligner_of(family)
    assert ends(align(TOOL_USE[name], aligner), aligner) == CALLS[family, name]


def test_a_call_of_a_built_in_tool_ends_with_its_own_token():
    aligner = aligner_of("llama3_1", builtin_tools=["search"])
    assert ends(align(TOOL_USE["tool_search"], aligner), aligner) == ["<|eom_id|>"]


@pytest.mark.parametrize("family", ["qwen2_5", "gpt_oss", "gemma3", "mistral_nemo"])
def test_an_empty_answer_ends_at_once(family):
    aligner = aligner_of(family)
    chat = CONVERSATIONS["empty_earlier"]
    assert ends(align(chat, aligner), aligner) == ENDS[family]


def test_the_header_of_the_assistants_next_turn_ends_none():
    """GLM's two answers in a row: behind the first stands <|assistant|>, which no answer ends with."""
    aligner = aligner_of("glm4")
    assert ends(align(CONVERSATIONS["two_assistants"], aligner), aligner) == []


ONE = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"


@pytest.mark.parametrize(
    ("turn", "chat", "expected"),
    [
        # the end outside of the generation block, as some models' own templates have it
        ("{% generation %}{{ m.content }}{% endgeneration %}</s>", TWO_TURNS, ["</s>"] * 2),
        ("{% generation %}{{ m.content }}{% endgeneration %}</s>", CONVERSATIONS["two_assistants"], ["</s>"] * 2),
        # from prefixes, with a token behind the whole conversation
        (" {{ m.content }}<|end|>\n{% if loop.last %}<|endoftext|>{% endif %}", talk("Hi", "Hello!"), ["<|end|>"]),
        (" {{ m.content }}<|end|>{% if loop.last %}<|endoftext|>{% endif %}", talk("Hi", "Hello!"), ["<|end|>"]),
        # no answer but the last one ends with any of them
        ("{{ m.content }}{% if loop.last %}<|end|></s>{% endif %}", talk("Hi", "Hello!"), ["</s>"]),
        # the next message's header is all that ends it
        ("{% generation %}{{ m.content }}{% endgeneration %}", TWO_TURNS, ["[INST]"]),
        # no special token ends it, or none right behind it
        ("{% generation %}{{ m.content }}{% endgeneration %}", talk("Hi", "Hello!"), []),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ '\\n' }}</s>", TWO_TURNS, []),
        # a think tag is none
        ("{% generation %}{{ m.content }}</think>{% endgeneration %}!", TWO_TURNS, []),
    ],
)
def test_other_templates(turn, chat, expected):
    aligner = aligner_of("mistral", ONE + turn + "{% endif %}{% endfor %}")
    assert ends(align(chat, aligner), aligner) == expected


def test_turns_left_out_have_no_end():
    chat = talk("Hi", {"role": "assistant", "content": "Hello!", "weight": 0}, "2+2?", "4")
    aligner = aligner_of("qwen2_5", keep=True)
    alignment = align(chat, aligner)
    (end,) = alignment.turn_ends
    assert aligner.tokenizer.convert_ids_to_tokens(int(alignment.input_ids[end - 1])) == "4"
