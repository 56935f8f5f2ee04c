"""How a training ends early: by a signal, out of memory, or with a full disk."""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from chat_logits.errors import ToolkitError
from chat_logits.machine import ignore_if_repeated, stopping_signals
from chat_logits.model.out_of_memory import is_out_of_memory
from chat_logits.storage.disk import FULL, TOO_LARGE
from chat_logits.training.config import TrainConfig, checkpoint_states

# In errors of safetensors and torch, which have no errno
NO_ROOM = ("no space left", "quota exceeded")
TOO_LONG = "file too large"


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
def explained_failures(config: TrainConfig, longest: int) -> Iterator[None]:
    """Within, running out of memory or disk space raises a ToolkitError that says what to do. ``longest`` is the number
    of tokens of the longest conversation."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise ToolkitError(f"out of memory with {_too_much(config, longest)}") from error
        if fault := _full(error, config.output_dir):
            raise ToolkitError(f"{fault}; {_how_to_go_on(Path(config.output_dir))}") from error
        raise


def _full(error: Exception, folder: str) -> str:
    """What is full, and what to do about it; "" for any other error."""
    number, words = getattr(error, "errno", None), str(error).lower()
    if number == errno.EFBIG or TOO_LONG in words:
        return TOO_LARGE
    return f"the disk of {folder} is full. Make room" if number in FULL or any(w in words for w in NO_ROOM) else ""


def _how_to_go_on(folder: Path) -> str:
    if checkpoint_states(folder):
        return "the same command with `resume` continues from the last complete checkpoint."
    return "the same command starts again, as no checkpoint is complete."


def _too_much(config: TrainConfig, longest: int) -> str:
    """What needs most of the memory, and what to do."""
    if longest > config.batch_tokens:
        return (
            f"a conversation of {longest:,} tokens, more than `batch_tokens` {config.batch_tokens}; skip such by "
            "`max_length`, or give `gradient_checkpointing`"
        )
    return (
        f"`batch_tokens` {config.batch_tokens}; give fewer, and to keep the size of a step raise `accumulate` "
        f"{config.accumulate} by the same factor, or give `gradient_checkpointing`"
    )
