"""The command's trainer: it measures on held-out conversations, keeps the record and shows its progress."""

import logging
import math
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from chat_logits.errors import ToolkitError
from chat_logits.training.distance import Distance
from chat_logits.training.held_out import held_out
from chat_logits.training.record import TrainingResult
from chat_logits.training.student import StudentTrainer
from chat_logits.words import with_error

logger = logging.getLogger(__name__)


class MeasuringTrainer(StudentTrainer):
    """Evaluates by the distance from the teacher on held-out packs, and keeps the record up to date.

    Each process measures all of them, since all have to take part if weights are sharded. Raises ToolkitError if a loss
    or a distance is not finite: later steps would be wrong, too, and no checkpoint of it is written.
    """

    def __init__(self, *args: Any, result: TrainingResult, **options: Any):
        super().__init__(*args, **options)
        self.result, self._tokens, self.seconds = result, 0, 0.0
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self._progress = Progress(self)
        self.add_callback(self._progress)

    def train(self, *args: Any, **options: Any) -> Any:
        try:
            return super().train(*args, **options)
        finally:
            self._progress.close()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule of the learning rate; transformers' own would take the first step at a rate of 0."""
        share = partial(rate_share, warm_up=self.args.warmup_steps, steps=num_training_steps)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> torch.Tensor:
        self._tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args, **options)
        if not torch.isfinite(loss):
            self._refuse(f"step {self.state.global_step + 1}: the loss is {loss.item()}")
        return loss

    def measure(self, step: int) -> Distance:
        """The student's distance after ``step`` steps, which is added to the result and the record."""
        if self.result.points and self.result.points[-1][0] == step:
            return self.result.points[-1][1]
        batches = (self.data_collator([self.eval_dataset[i]]) for i in range(len(self.eval_dataset)))
        with self.accelerator.autocast():  # the first step wraps the student's forward pass in it as well
            point = held_out(self.accelerator.unwrap_model(self.model), batches)
        if not math.isfinite(point.kl):
            self._refuse(f"step {step}: the held-out KL is {point.kl}")
        self.result.points.append((step, point))
        self.result.losses = [(one["step"], one["loss"]) for one in self.state.log_history if "loss" in one]
        figures = (step, with_error(point.kl, point.error), 100 * point.agreement)
        logger.info("Step %d: held-out KL %s nats a token, agreement %.1f%%", *figures)
        if self.is_world_process_zero():
            self.result.write()
        return point

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        point = self.measure(self.state.global_step)
        return {f"eval_{name}": value for name, value in asdict(point).items() if isinstance(value, float)}

    def tokens_per_second(self) -> float | None:
        """Over the steps since this start, all processes together; None before the first step."""
        tokens = self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device)).item()
        return tokens / self.seconds if self.seconds else None

    def _refuse(self, found: str) -> None:
        if self.state.global_step == 0 and not self.result.points:
            raise ToolkitError(f"{found} before any step: the student's weights are damaged")
        raise ToolkitError(
            f"{found}: training has diverged. Start again with a smaller `learning_rate`, or `resume` the last "
            "checkpoint with one."
        )


def rate_share(step: int, warm_up: int, steps: int) -> float:
    """The share of the learning rate at a step, counted from 0: it rises to 1 at step ``warm_up``, then falls along a
    cosine to 0 at step ``steps``, the one after the last.

    >>> [round(rate_share(step, 2, 6), 2) for step in range(7)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


def _follow(schedule: LambdaLR, rate: float) -> None:
    """Use this start's learning rate for the next step instead of the checkpoint's."""
    schedule.base_lrs = [rate] * len(schedule.base_lrs)
    for group, share in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what is logged


class Progress(TrainerCallback):
    """A progress bar over steps with the last training loss; it also measures the seconds that the steps take."""

    def __init__(self, trainer: MeasuringTrainer):
        self._trainer, self._bar = trainer, tqdm(disable=True)

    def on_train_begin(self, args, state, _control, lr_scheduler, **_):
        _follow(lr_scheduler, args.learning_rate)
        state.compute_steps(args, state.max_steps)  # the checkpoint has those of the start that wrote it
        silent = {} if state.is_world_process_zero else {"disable": True}
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit=" steps", **silent)

    def on_step_begin(self, *_, **__):
        self._began = time.perf_counter()

    def on_step_end(self, _args, state, _control, **_):
        self._trainer.seconds += time.perf_counter() - self._began
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, _args, _state, _control, logs=None, **_):
        if logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.4f}")

    def close(self) -> None:
        """Leave the bar as it is; later output comes below it."""
        self._bar.close()
