"""Load the student to train, its tokenizer and its float32 weights, and add what it has been taught with."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chat_logits.data.hashing import hash_files
from chat_logits.data.template_choice import choose_template
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import resolve_commit
from chat_logits.model.adapters import find_base
from chat_logits.model.limits import input_limits, load_config
from chat_logits.model.loading import load_model
from chat_logits.storage.json_files import canonical
from chat_logits.storage.manifest import Manifest
from chat_logits.training.config import TrainConfig
from chat_logits.training.record import Student

logger = logging.getLogger(__name__)

READ_TOGETHER = 1000  # conversations
PROBE = range(1, 9)  # token ids that any vocabulary has
DECIDE_STUDENT = ("config.json", "*.safetensors", "*.bin")  # the files of a folder that its weights come from
NOISE = 1e-4  # relative to the largest logit, float32, from the order of summation


def student_tokenizer(config: TrainConfig) -> Any:
    """The student's tokenizer, after a check of its configuration, and before any weights are read.

    Raises UsageError for a model that is not a complete causal language model in floating point, ToolkitError if the
    model or its tokenizer is missing.
    """
    name, revision = config.student_id, config.student_revision
    if name.endswith(".gguf"):
        raise UsageError(
            f"`student_id` {name}: a GGUF file, whose weights are quantized; expected a folder or a Hub id"
        )
    base = find_base(name, revision)
    if base:
        raise UsageError(f"`student_id` {name}: an adapter on {base.model_id}; merge it, save the model, and give that")
    found = load_config(name, revision)
    input_limits(found)
    _refuse_quantized(name, found)
    _refuse_other_kinds(name, found)
    return load_tokenizer(name, revision)


def longest_taught(config: TrainConfig) -> int | None:
    """The most tokens of a conversation: ``max_length``, or the student's own limit if that is less; None for none."""
    positions = input_limits(load_config(config.student_id, config.student_revision)).positions
    longest = min((limit for limit in (config.max_length, positions) if limit), default=None)
    if longest != config.max_length:
        logger.info("Conversations of more than %d tokens, the most that the student reads, are skipped", longest)
    return longest


def find_student(config: TrainConfig) -> Student:
    """Which model the student is now. Raises ToolkitError if the Hub refuses."""
    name = config.student_id
    if Path(name).is_dir():
        return Student(name, hash_student(Path(name)))
    return Student(name, resolve_commit(name, "model", config.student_revision))


def hash_student(folder: Path) -> str:
    """SHA-256 (hex) of a model's configuration and weights. Other files, and a folder inside it that a training writes
    into, do not count."""
    files = sorted(file for pattern in DECIDE_STUDENT for file in folder.glob(pattern))
    return hashlib.sha256(canonical([[file.name, hash_files(file)] for file in files])).hexdigest()


def compare_vocabularies(config: TrainConfig, examples: Any, teacher_ids: int) -> None:
    """Log how many of the teacher's ``teacher_ids`` ids the student does not have.

    ``examples`` come from ``training_dataset``. Raises UsageError if a conversation has a token with such an id.
    """
    size = load_config(config.student_id, config.student_revision).get_text_config().vocab_size
    if size >= teacher_ids:
        return
    aligned = examples.with_format("arrow").select_columns(["input_ids"]).iter(READ_TOGETHER)
    last = max(int(np.frombuffer(b"".join(rows["input_ids"].to_pylist()), "<i4").max()) for rows in aligned)
    if last >= size:
        raise UsageError(
            f"`student_id` {config.student_id}: it has {size:,} token ids, and a conversation has the token {last:,}. "
            "Give it as many rows (resize_token_embeddings), save it, and give that."
        )
    logger.info(f"The student has {size:,} of the teacher's {teacher_ids:,} token ids; no conversation has the others")


def load_student(config: TrainConfig) -> torch.nn.Module:
    """The student in float32 on the CPU, with an adapter if ``lora_rank`` is set.

    Raises UsageError if it is not causal, peft is missing or it cannot compute activations again, ToolkitError if its
    checkpoint is incomplete.
    """
    name, attention = config.student_id, config.attn_implementation
    student = load_model(name, config.student_revision, dtype="float32", attn_implementation=attention)
    if config.gradient_checkpointing and not student.supports_gradient_checkpointing:
        raise UsageError(f"`gradient_checkpointing`: transformers has none for a {type(student).__name__}")
    _refuse_looking_ahead(config.student_id, student)
    if config.freeze_embeddings:
        for embeddings in (student.get_input_embeddings(), student.get_output_embeddings()):
            embeddings.requires_grad_(False)
    return student if config.lora_rank is None else _adapted(student, config.lora_rank)


def _refuse_quantized(name: str, found: Any) -> None:
    quantization = getattr(found, "quantization_config", None)
    if quantization is not None:
        asked = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise UsageError(
            f"`student_id` {name}: its weights are quantized ({asked.get('quant_method', 'by its config')}), so they "
            "have no gradient; take the model that it was made from"
        )


def _refuse_other_kinds(name: str, found: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"`student_id` {name}: a {found.model_type}, which transformers has no causal language model for; "
            "expected one, such as Llama, Qwen or Gemma"
        )


@torch.no_grad()
def _refuse_looking_ahead(name: str, student: torch.nn.Module) -> None:
    """Raise UsageError if a token's logits depend on later tokens."""
    ids = torch.tensor([list(PROBE)])
    whole, begun = (student(input_ids=part, use_cache=False).logits.float() for part in (ids, ids[:, :4]))
    if not (whole[:, :4] - begun).abs().max() <= NOISE * whole.abs().max():
        if not whole.isfinite().all():
            raise ToolkitError(f"`student_id` {name}: its logits are not finite, so its weights are damaged")
        raise UsageError(
            f"`student_id` {name}: a {type(student).__name__} looks ahead; expected a causal language model"
        )


def _adapted(student: torch.nn.Module, rank: int) -> torch.nn.Module:
    try:
        import peft
    except ImportError as error:
        raise UsageError("`lora_rank` needs peft, which is not installed: pip install peft") from error
    return peft.get_peft_model(student, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


# --- what the student has been taught with ---


def use_recorded_template(tokenizer: Any, recorded: Manifest) -> None:
    """Give the tokenizer the template of the extraction, unless its own renders the same."""
    try:
        own = choose_template(None, tokenizer, recorded.template_kwargs, recorded.template_date, []).template
    except UsageError:  # it has none, or one that does not run
        own = None
    if own and (own.text, own.tools_text) == (recorded.chat_template, recorded.tools_template):
        return
    text, with_tools = recorded.chat_template, recorded.tools_template
    tokenizer.chat_template = {"default": text, "tool_use": with_tools} if with_tools else text
    found = "another" if own else "none"
    logger.info("The student is saved with the chat template that the rows were rendered by; it has %s", found)


def taught_ends(examples: Any, end_of_turn: str, skipped_ids: list[int]) -> set[int]:
    """The ids of the tokens that end turns and are taught, of aligned rows: those that were extracted, as
    ``skipped_ids`` are nowhere else, and unless ``end_of_turn`` is "skip" those that were not."""
    found: set[int] = set()
    columns = ["length", "input_ids", "positions", "turn_ends"]
    for rows in examples.with_format("arrow").select_columns(columns).iter(READ_TOGETHER):
        found |= _ids_at(rows, "positions") & set(skipped_ids)
        found |= _ids_at(rows, "turn_ends") if end_of_turn != "skip" else set()
    return found


def _ids_at(rows: Any, name: str) -> set[int]:
    """The ids of the tokens at the positions in a column of aligned rows."""
    lengths, places = rows["length"].to_numpy(), rows[name].to_pylist()
    starts = np.repeat(np.cumsum(lengths) - lengths, [len(each) // 4 for each in places])
    ids = np.frombuffer(b"".join(rows["input_ids"].to_pylist()), "<i4")
    return set(ids[np.frombuffer(b"".join(places), "<i4") + starts].tolist())


def stop_at(student: torch.nn.Module, ends: set[int], tokenizer: Any) -> None:
    """Have ``generate`` stop at these token ids as well."""
    settings = student.generation_config
    if settings is None:  # transformers cannot generate with it
        return
    known = [] if settings.eos_token_id is None else np.atleast_1d(settings.eos_token_id).tolist()
    missing = sorted(ends.difference(known))
    if missing:
        settings.eos_token_id = [*known, *missing]
        logger.info("generation_config.json stops at %s, too", ", ".join(tokenizer.convert_ids_to_tokens(missing)))
