"""How a training ends early: by a signal, out of memory, or with a full disk."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

from chat_logits.errors import ToolkitError
from chat_logits.machine import ignore_if_repeated, stopping_signals
from chat_logits.model.out_of_memory import is_out_of_memory
from chat_logits.storage.disk import FULL
from chat_logits.training.config import TrainConfig

NO_ROOM = ("no space left", "file too large", "quota exceeded")  # errors of safetensors and torch, which have no errno


@contextmanager
def stopping(trainer: Trainer) -> Iterator[None]:
    """Within, the first stop signal to any process ends the training in all of them, after the current step and with a
    checkpoint; then the signal is raised again for the handler that was there before."""
    received: list[int] = []
    stopped: list[bool] = []

    class Stop(TrainerCallback):
        def on_step_end(self, _args, _state, control, **_):
            if received:
                trainer.accelerator.set_trigger()
            if trainer.accelerator.check_trigger():  # in any process
                stopped.append(True)
                control.should_save = control.should_training_stop = True

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])  # a second one stops at once
        ignore_if_repeated(number)

    trainer.add_callback(Stop())
    numbers = stopping_signals() if threading.current_thread() is threading.main_thread() else ()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped or received:
        signal.raise_signal(received[0] if received else signal.SIGTERM)


@contextmanager
def explained_failures(config: TrainConfig) -> Iterator[None]:
    """Within, running out of memory or disk space raises a ToolkitError that says what to do."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise ToolkitError(
                f"out of memory with `batch_tokens` {config.batch_tokens}; give fewer, and to keep the size of a step "
                f"raise `accumulate` {config.accumulate} by the same factor"
            ) from error
        if getattr(error, "errno", None) in FULL or any(words in str(error).lower() for words in NO_ROOM):
            raise ToolkitError(
                f"the disk of {config.output_dir} is full. Make room; the same command with `resume` continues "
                "from the last complete checkpoint."
            ) from error
        raise
