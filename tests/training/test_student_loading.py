"""What a student is loaded with and saved with: its limits, its attention, and the template and stops it was taught."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK_VOCABULARY, make_tiny_model
from datasets import Dataset
from training.test_train_student import record, run, student  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.training.config import TrainConfig
from chat_logits.training.dataset import training_dataset
from chat_logits.training.loading import load_student, taught_ends
from chat_logits.training.student import StudentTrainer

TALK = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "It is 2 of 3."}]
WRITTEN = "<|im_start|>user\nWhat is 3?<|im_end|>\n<|im_start|>assistant\nIt is 2 of 3.<|im_end|>\n"
END_OF_TEXT, END = 0, 2  # <|endoftext|> and <|im_end|>


def lengths_of(dataset: Path, tokenizer: Path) -> list[int]:
    return [len(one["input_ids"]) for one in training_dataset(dataset, AutoTokenizer.from_pretrained(tokenizer))]


def changed(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("options", "stops"),
    [({}, [END_OF_TEXT, END]), ({"end_of_turn": "skip"}, END_OF_TEXT), ({"lora_rank": 2}, None)],
)
def test_a_base_student_is_saved_with_the_template_and_the_stops_it_was_taught(
    run,  # noqa: F811
    student,  # noqa: F811
    quick_run,
    tmp_path,
    capsys,
    options,
    stops,
):
    base, out = shutil.copytree(student, tmp_path / "base"), tmp_path / "out"
    (base / "chat_template.jinja").unlink()
    for name in ("config", "generation_config"):
        changed(base / f"{name}.json", eos_token_id=END_OF_TEXT)
    changed(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert run(student_id=base, max_steps=1, **options) == 0
    told = capsys.readouterr().err
    assert "The student is saved with the chat template that the rows were rendered by; it has none" in told
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == open_dataset(str(quick_run)).manifest.chat_template
    assert tokenizer.apply_chat_template(TALK, tokenize=False).endswith(WRITTEN)
    assert ("generation_config.json stops at <|im_end|>, too" in told) == (stops == [END_OF_TEXT, END])
    if stops is not None:
        assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == stops
    else:
        assert not (out / "generation_config.json").exists()


def test_a_student_that_renders_the_same_keeps_its_own_template(run, student, tmp_path, capsys):  # noqa: F811
    own = (student / "chat_template.jinja").read_text()
    assert run(max_steps=1) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == own
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == END
    assert "The student is saved with" not in capsys.readouterr().err


def test_the_ends_that_are_taught_by_hand():
    """Of two aligned rows: token 7 is extracted and skipped elsewhere, as an end is; 2 and 3 end turns for certain."""
    rows = {"input_ids": [[5, 7, 1, 2], [7, 9, 3, 8, 2]], "positions": [[1, 2], [1]], "turn_ends": [[3], [2, 4]]}
    columns = {name: [np.array(row, "<i4").tobytes() for row in values] for name, values in rows.items()}
    examples = Dataset.from_dict({**columns, "length": [4, 5]})
    assert taught_ends(examples, "hard", [2, 3, 7]) == {2, 3, 7}
    assert taught_ends(examples, "skip", [2, 3, 7]) == {7}


def test_conversations_beyond_the_students_positions_are_skipped(run, quick_model, quick_run, tmp_path, capsys):  # noqa: F811
    lengths = lengths_of(quick_run, quick_model)
    longest = sorted(lengths)[100]
    longer = sum(length > longest for length in lengths)
    for positions, name in ((longest, "short"), (8, "none")):
        make_tiny_model(tmp_path / name, vocab_size=QUICK_VOCABULARY, max_position_embeddings=positions)
        shutil.copy(quick_model / "tokenizer.json", tmp_path / name / "tokenizer.json")
    assert run(student_id=tmp_path / "short", max_steps=1) == 0
    told = capsys.readouterr().err
    assert f"{longer} of 160 conversations have more than max_length {longest} tokens and are skipped" in told
    assert f"Conversations of more than {longest} tokens, the most that the student reads, are skipped" in told
    assert run("other", student_id=tmp_path / "none") == 1
    assert "160 of 160 conversations have more than max_length 8 tokens: none is left" in capsys.readouterr().err
    assert run("fewer", student_id=tmp_path / "short", max_steps=1, max_length=longest - 1) == 0
    assert "the most that the student reads" not in capsys.readouterr().err


def test_the_attention_that_was_asked_for_is_computed(student, tmp_path):  # noqa: F811
    options = {"logit_dataset_id": "any", "student_id": str(student), "output_dir": str(tmp_path)}
    for asked, expected in (("eager", "eager"), (None, "sdpa")):
        assert load_student(TrainConfig(**options, attn_implementation=asked)).config._attn_implementation == expected
    with pytest.raises(ToolkitError, match="nonsense"):
        load_student(TrainConfig(**options, attn_implementation="nonsense"))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_activations_that_are_computed_again_give_the_same_student(run, tmp_path, monkeypatch, options):  # noqa: F811
    forward, calls = LlamaMLP.forward, []

    def counted(self, *args):
        calls.append(self.training)
        return forward(self, *args)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    assert run("kept", max_steps=2, measure_every=2, **options) == 0
    times, calls[:] = sum(calls), []
    assert run("again", "--gradient_checkpointing", max_steps=2, measure_every=2, **options) == 0
    assert sum(calls) == times + 2 * 2  # layers, steps
    kept, again = (record(tmp_path / name) for name in ("kept", "again"))
    assert [point["kl"] for point in again] == pytest.approx([point["kl"] for point in kept], rel=1e-6)


def test_a_student_that_cannot_compute_them_again_is_refused(tmp_path):
    CTRLLMHeadModel(CTRLConfig(vocab_size=100, n_embd=8, dff=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    options = {"logit_dataset_id": "any", "student_id": str(tmp_path), "output_dir": "any"}
    with pytest.raises(UsageError, match="`gradient_checkpointing`: transformers has none for a CTRLLMHeadModel"):
        load_student(TrainConfig(**options, gradient_checkpointing=True))


def tiny_bloom(folder: Path, tokenizer: Path) -> Path:
    """A student that packed conversations would meet in."""
    BloomForCausalLM(BloomConfig(vocab_size=QUICK_VOCABULARY, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(
        folder
    )
    for file in (*tokenizer.glob("tokenizer*"), tokenizer / "chat_template.jinja"):
        shutil.copy(file, folder)
    return folder


def test_padded_batches_have_no_more_tokens_than_allowed(run, quick_model, tmp_path, monkeypatch):  # noqa: F811
    step, shapes = StudentTrainer.training_step, []

    def seen(self, model, inputs, *args, **options):
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *args, **options)

    monkeypatch.setattr(StudentTrainer, "training_step", seen)
    assert run(student_id=tiny_bloom(tmp_path / "bloom", quick_model), max_steps=None, measure_every=100) == 0
    assert sum(count for count, _ in shapes) == 148  # all, once
    assert max(count for count, _ in shapes) > 1 and max(count * longest for count, longest in shapes) <= 600


def test_conversations_that_are_too_long_for_a_batch_are_told_before_and_if_memory_ends(
    run,  # noqa: F811
    quick_model,
    quick_run,
    monkeypatch,
    capsys,
):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(StudentTrainer, "training_step", fail)
    assert run(batch_tokens=100) == 1
    lengths = lengths_of(quick_run, quick_model)
    longer, told = sum(length > 100 for length in lengths), capsys.readouterr().err
    assert f"{longer} conversations have more than --batch_tokens 100 tokens, the longest {max(lengths)}: each" in told
    assert f"error: out of memory with a conversation of {max(lengths)} tokens, more than --batch_tokens 100;" in told
    assert "--max_length" in told.splitlines()[-1]
