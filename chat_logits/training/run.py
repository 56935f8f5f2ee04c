"""A student's training from a stored dataset to a saved model."""

import json
import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.disk import written_whole
from chat_logits.training.collator import PackingCollator, PaddingCollator, refuse_packing
from chat_logits.training.config import TrainConfig
from chat_logits.training.dataset import training_dataset
from chat_logits.training.held_out import HeldOut, held_out
from chat_logits.training.packs import OfOnePack, Packs, plan_packs
from chat_logits.training.student import StudentTrainer

logger = logging.getLogger(__name__)

RECORD = "training.json"
CHECKPOINTS = "checkpoints"
MEASUREMENTS, WARM_UP = 10, 0.03  # on the way; of all steps


@dataclass
class TrainingResult:
    """``points`` are steps and the student's distance from the teacher after them, the first before any."""

    config: TrainConfig
    points: list[tuple[int, HeldOut]] = field(default_factory=list)

    def as_json(self) -> dict:
        measured = [{"step": step, **asdict(point)} for step, point in self.points]
        return {"config": self.config.chosen(), "held_out": measured}


def train(config: TrainConfig) -> TrainingResult:
    """Train a student, save it in its folder, and give how far it was from the teacher before, on the way and after.

    Raises UsageError and ToolkitError as ``training_dataset``; KeyboardInterrupt after a signal, with a checkpoint
    behind it.
    """
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.student_id, revision=config.student_revision)
    options = {name: getattr(config, name) for name in ("hard_weight", "end_of_turn", "allow_biased", "max_length")}
    examples = training_dataset(config.logit_dataset_id, tokenizer, config.revision, **options)
    student = _student(config)
    collator = _collator(student, tokenizer)
    taught, kept = _split(examples, config)
    trainer = _trainer(config, student, collator, taught, kept)
    folder = Path(config.output_dir)
    trainer.result.points = _points_before(folder) if config.resume else []
    if not trainer.result.points:
        trainer.measure(0)
    with _stopping(trainer):
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if config.resume else None)
    trainer.measure(trainer.state.global_step)
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    return trainer.result


class MeasuringTrainer(StudentTrainer):
    """Evaluates by the distance from the teacher on held-out packs, and keeps the record up to date."""

    def __init__(self, *args: Any, result: TrainingResult, **options: Any):
        super().__init__(*args, **options)
        self.result = result

    def measure(self, step: int) -> HeldOut:
        """The student's distance after ``step`` steps, into the result and the record."""
        if self.result.points and self.result.points[-1][0] == step:
            return self.result.points[-1][1]
        batches = (self.data_collator([self.eval_dataset[i]]) for i in range(len(self.eval_dataset)))
        point = held_out(self.accelerator.unwrap_model(self.model), batches)
        self.result.points.append((step, point))
        if self.is_world_process_zero():
            figures = (step, point.kl, point.error, 100 * point.agreement)
            logger.info("Step %d: held-out KL %.4f ± %.4f nats a token, agreement %.1f%%", *figures)
            _write_record(Path(self.result.config.output_dir), self.result)
        return point

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        point = self.measure(self.state.global_step)
        found = {"kl": point.kl, "kl_error": point.error, "kl_tail": point.kl_tail, "agreement": point.agreement}
        return {f"eval_{name}": value for name, value in found.items()}


class Bar(TrainerCallback):
    """A progress bar over steps, with the last KL that was trained on."""

    def on_train_begin(self, _args, state, _control, **_):
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit=" steps")
        self._bar.disable = self._bar.disable or not state.is_world_process_zero

    def on_step_end(self, _args, state, _control, **_):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, _args, _state, _control, logs=None, **_):
        if logs and "loss" in logs:
            self._bar.set_postfix_str(f"KL {float(logs['loss']):.4f}")

    def on_train_end(self, *_, **__):
        self._bar.close()


# --- parts ---


def _student(config: TrainConfig) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        config.student_id, revision=config.student_revision, dtype=torch.float32
    )
    if config.lora_rank is None:
        return model
    try:
        import peft
    except ImportError as error:
        raise UsageError("`lora_rank` needs peft, which is not installed: pip install peft") from error
    return peft.get_peft_model(
        model, peft.LoraConfig(r=config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _collator(student: torch.nn.Module, tokenizer: Any) -> OfOnePack:
    """Packs conversations one behind another where the student keeps them apart, else pads them side by side."""
    try:
        refuse_packing(student)
    except UsageError as error:
        logger.info("%s", error)
        return OfOnePack(PaddingCollator(tokenizer.pad_token_id or 0))
    return OfOnePack(PackingCollator())


def _split(examples: Any, config: TrainConfig) -> tuple[Packs, Packs]:
    """The packs to train on, and the held-out ones. Raises UsageError where nothing is left to train on."""
    number = config.held_out or max(1, min(256, len(examples) // 20))
    if number >= len(examples):
        raise UsageError(f"`held_out` {number}: the dataset has {len(examples)} conversations; expected fewer")
    order = np.random.default_rng(config.seed).permutation(len(examples))
    packs = []
    for part in (np.sort(order[number:]), np.sort(order[:number])):
        chosen = examples.select(part)
        lengths = chosen.with_format("arrow")["length"].to_pylist()
        packs.append(Packs(chosen, plan_packs(lengths, config.batch_tokens, config.seed)))
    return packs[0], packs[1]


def _trainer(config: TrainConfig, student, collator: OfOnePack, taught: Packs, kept: Packs) -> MeasuringTrainer:
    steps = config.max_steps or math.ceil(len(taught) / config.accumulate) * config.epochs
    uses_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    on_gpu = not uses_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(Path(config.output_dir) / CHECKPOINTS),
        use_cpu=uses_cpu,
        bf16=config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        max_steps=steps,
        learning_rate=config.rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP * steps),
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.measure_every or max(1, steps // MEASUREMENTS),
        save_steps=config.save_every,
        save_total_limit=1,
        logging_steps=max(1, steps // 100),
        report_to=[],
        remove_unused_columns=False,
    )
    data = {"train_dataset": taught, "eval_dataset": kept, "data_collator": collator}
    trainer = MeasuringTrainer(student, arguments, **data, result=TrainingResult(config))
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Bar())
    return trainer


# --- stopped and gone on with ---


@contextmanager
def _stopping(trainer: MeasuringTrainer) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM ends the training after the step under way, with a checkpoint; then what
    would have handled the signal does."""
    received: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, _args, _state, control, **_):
            control.should_save = control.should_save or bool(received)
            control.should_training_stop = control.should_training_stop or bool(received)

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])  # the second one is not waited for

    trainer.add_callback(Stop())
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _last_checkpoint(folder: Path) -> str:
    place = folder / CHECKPOINTS
    found = get_last_checkpoint(str(place)) if place.is_dir() else None
    if found is None:
        raise ToolkitError(f"`resume`: no checkpoint in {place}; leave it out to begin anew")
    return found


def _points_before(folder: Path) -> list[tuple[int, HeldOut]]:
    """What was measured up to the checkpoint."""
    last = int(_last_checkpoint(folder).rpartition("-")[2])
    measured = json.loads((folder / RECORD).read_text(encoding="utf-8"))["held_out"]
    points = [(entry.pop("step"), HeldOut(**entry)) for entry in measured]
    return [point for point in points if point[0] <= last]


def _write_record(folder: Path, result: TrainingResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
