"""A student's training from a stored dataset to a saved model."""

import logging
import math
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d
from transformers import TrainingArguments, set_seed

from chat_logits.errors import UsageError
from chat_logits.stages import stage
from chat_logits.storage.dataset import StoredDataset, open_dataset
from chat_logits.training.collator import PackingCollator, PaddingCollator, refuse_packing
from chat_logits.training.config import CHECKPOINTS, TrainConfig
from chat_logits.training.dataset import training_dataset
from chat_logits.training.examples import ExampleMaker
from chat_logits.training.loading import (
    compare_vocabularies,
    find_student,
    load_student,
    longest_taught,
    stop_at,
    student_tokenizer,
    taught_ends,
    use_recorded_template,
)
from chat_logits.training.packs import OfOnePack, Packs, plan_packs
from chat_logits.training.progress import MeasuringTrainer
from chat_logits.training.record import (
    Checkpoint,
    TaughtRows,
    TrainingResult,
    go_on,
    last_checkpoint,
    locked_folder,
)
from chat_logits.training.stopping import explained_failures, stopping
from chat_logits.training.student import refuse_several_gpus
from chat_logits.words import count_text

logger = logging.getLogger(__name__)

MEASUREMENTS, WARM_UP = 10, 0.03  # measurements during training; share of all steps
# Seconds that a process on a GPU waits for the others before the first step, 7 days: the first one aligns all rows,
# about four hours per billion extracted tokens. If a process dies, torchrun ends all of them.
PATIENCE = 7 * 24 * 3600
LATER = timedelta(minutes=30)  # transformers' default: then NCCL ends a training whose processes do not meet


def train(config: TrainConfig) -> TrainingResult:
    """Train a student, save it in its folder, and return its distance from the teacher before, during and after.

    Raises UsageError and ToolkitError as ``training_dataset`` and ``load_student`` do, and ToolkitError if memory or
    the disk is too small; UsageError if one process has several GPUs; KeyboardInterrupt after a signal, once a
    checkpoint is written. Each process of ``torchrun`` calls it.
    """
    arguments = _arguments(config)
    refuse_several_gpus(arguments)
    _leave_words_to_the_first(arguments)
    if arguments.process_index:
        return _train(config, arguments)
    with locked_folder(Path(config.output_dir)):
        config.check_output_dir()
        return _train(config, arguments)


def _train(config: TrainConfig, arguments: TrainingArguments) -> TrainingResult:
    folder = Path(config.output_dir)
    checkpoint = last_checkpoint(folder) if config.resume else None
    stored = open_dataset(config.logit_dataset_id, config.revision)
    with stage("Reading the student's configuration and tokenizer"):
        tokenizer, student = student_tokenizer(config), find_student(config)
        use_recorded_template(tokenizer, stored.manifest)
    processes = {"rank": arguments.process_index, "processes": arguments.world_size}
    result = TrainingResult(config, TaughtRows.of(stored), student, **processes)
    if checkpoint:
        go_on(result, checkpoint)
    set_seed(config.seed)
    examples = _aligned(config, tokenizer, arguments, stored)
    with explained_failures(config, _longest(examples, config.batch_tokens)):
        model, data = _student_and_data(config, tokenizer, stored, examples)
        _count_steps(arguments, config, data["train_dataset"], checkpoint)
        trainer = MeasuringTrainer(model, arguments, **data, result=result)
        _lose_patience()
        _take_steps(trainer, checkpoint)
        _save(trainer, folder, tokenizer)
    return result


def _take_steps(trainer: MeasuringTrainer, checkpoint: Checkpoint | None) -> None:
    """Measure, take the remaining steps, and measure again."""
    if checkpoint and checkpoint.step == trainer.args.max_steps:  # only saving the student is left
        trainer._load_from_checkpoint(str(checkpoint.path))
        trainer.measure(checkpoint.step)
        return
    if not trainer.result.points:
        with stage("Measuring the student on the held-out conversations, before any step"):
            trainer.measure(0)
    with stopping(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    trainer.measure(trainer.state.global_step)
    trainer.result.tokens_per_second = trainer.tokens_per_second()


def _save(trainer: MeasuringTrainer, folder: Path, tokenizer: Any) -> None:
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # it belongs to the checkpoint
        trainer.result.is_finished = True
        trainer.result.write()


# --- parts ---


def _arguments(config: TrainConfig) -> TrainingArguments:
    """The arguments of transformers' trainer, except the number of steps. Connects the processes to each other."""
    uses_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    # Older GPUs emulate it, slower than float32.
    has_bfloat16 = (
        not uses_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return TrainingArguments(
        output_dir=str(Path(config.output_dir) / CHECKPOINTS),
        use_cpu=uses_cpu,
        bf16=config.dtype == "bfloat16" or (config.dtype == "auto" and has_bfloat16),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        gradient_checkpointing=config.gradient_checkpointing or None,  # None: transformers' newer name has its default
        learning_rate=config.rate,
        seed=config.seed,
        eval_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=1,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=PATIENCE,
        report_to=[],
        remove_unused_columns=False,
    )


def _count_steps(
    arguments: TrainingArguments, config: TrainConfig, taught: Packs, checkpoint: Checkpoint | None
) -> None:
    """Set the numbers of steps in the arguments. Raises UsageError if the checkpoint has already taken more."""
    an_epoch = math.ceil(math.ceil(len(taught) / arguments.world_size) / config.accumulate)
    steps = config.max_steps or an_epoch * config.epochs
    if checkpoint and checkpoint.step > steps:
        raise UsageError(f"`max_steps` {steps}: the checkpoint has taken {checkpoint.step}; expected as many or more")
    arguments.max_steps = steps
    arguments.warmup_steps = int(WARM_UP * steps)
    arguments.eval_steps = config.measure_every or max(1, steps // MEASUREMENTS)
    arguments.logging_steps = max(1, steps // 100)


def _leave_words_to_the_first(arguments: TrainingArguments) -> None:
    """Only the first process reports progress; the others log only errors."""
    if arguments.process_index:
        import datasets
        import transformers

        logging.getLogger("chat_logits").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _lose_patience() -> None:
    """Once all processes are here, they wait for each other for at most ``LATER``."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if set_timeout := getattr(distributed_c10d, "_set_pg_timeout", None):  # private, so it may be gone one day
            set_timeout(LATER)


def _aligned(config: TrainConfig, tokenizer: Any, arguments: TrainingArguments, stored: StoredDataset) -> Any:
    """The examples. The first process aligns the rows; the others read them from the cache."""
    options = {name: getattr(config, name) for name in ("hard_weight", "end_of_turn", "allow_biased")}
    options["max_length"] = longest_taught(config)
    with stage("Aligning the rows of %s", config.logit_dataset_id), arguments.main_process_first(desc="aligning rows"):
        examples = training_dataset(config.logit_dataset_id, tokenizer, stored.revision, **options)
    compare_vocabularies(config, examples, stored.manifest.vocab_size)
    return examples


def _split(examples: Any, config: TrainConfig) -> tuple[Any, Any]:
    """The examples to train on, and the held-out ones, with the teacher's distributions alone as targets: no ends of
    turns that were not extracted, and no share of the text. Raises UsageError if nothing is left to train on."""
    number = config.held_out or max(1, min(256, len(examples) // 20))
    if number >= len(examples):
        count = count_text(len(examples), "conversation")
        raise UsageError(f"`held_out` {number}: the dataset has {count}; expected fewer")
    order = np.random.default_rng(config.seed).permutation(len(examples))
    taught, kept = (examples.select(np.sort(part)) for part in (order[number:], order[:number]))
    measured = kept.with_transform(ExampleMaker(end_of_turn="skip", allow_biased=config.allow_biased))
    return taught, measured


def _lengths(examples: Any) -> list[int]:
    return examples.with_format("arrow")["length"].to_pylist()


def _longest(examples: Any, batch_tokens: int) -> int:
    """The tokens of the longest conversation. Logs how many do not fit into a batch."""
    lengths = _lengths(examples)
    longest, longer = max(lengths), sum(length > batch_tokens for length in lengths)
    if longer:
        logger.warning(
            f"{count_text(longer, 'conversation')} {'has' if longer == 1 else 'have'} more than `batch_tokens` "
            f"{batch_tokens} tokens, the longest {longest:,}: each is a batch of its own; `max_length` skips such"
        )
    return longest


def _student_and_data(
    config: TrainConfig, tokenizer: Any, stored: StoredDataset, examples: Any
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The student to train, and the trainer's data for it."""
    taught, kept = _split(examples, config)
    with stage("Loading the student %s", config.student_id):
        student = load_student(config)
    if config.lora_rank is None:
        stop_at(student, taught_ends(taught, config.end_of_turn, stored.manifest.skipped_token_ids), tokenizer)
    return student, _packs(config, student, tokenizer, taught, kept)


def _packs(config: TrainConfig, student: torch.nn.Module, tokenizer: Any, taught: Any, kept: Any) -> dict[str, Any]:
    """The trainer's packs to train on, held-out packs and collator, by whether the student keeps packed ones apart."""
    collator = _collator(student, tokenizer)
    of_lengths = partial(
        plan_packs, most=config.batch_tokens, seed=config.seed, is_padded=isinstance(collator, PaddingCollator)
    )
    taught, kept = (Packs(part, of_lengths(_lengths(part))) for part in (taught, kept))
    return {"train_dataset": taught, "eval_dataset": kept, "data_collator": OfOnePack(collator)}


def _collator(student: torch.nn.Module, tokenizer: Any) -> PackingCollator | PaddingCollator:
    """Packs conversations one after another if the student keeps them apart, else pads them."""
    try:
        refuse_packing(student)
    except UsageError as error:
        logger.info("%s", error)
        return PaddingCollator(tokenizer.pad_token_id or 0)
    return PackingCollator()
