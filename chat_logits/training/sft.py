"""TRL's trainer on stored distributions. Needs ``pip install trl``."""

from typing import Any

from trl import SFTTrainer

from chat_logits.training.student import StudentTrainer


class StudentSFTTrainer(StudentTrainer, SFTTrainer):
    """``trl.SFTTrainer``, including its handling of adapters, checkpoints and logs, with ``StudentTrainer``'s loss.

    Examples are those of a ``training_dataset``, which TRL must not prepare itself; ``args`` is an ``SFTConfig``.
    """

    def __init__(self, *args: Any, **options: Any):
        config = options.get("args") or (args[1] if len(args) > 1 else None)
        if config is not None:
            config.dataset_kwargs = {**(config.dataset_kwargs or {}), "skip_prepare_dataset": True}
            config.remove_unused_columns = False
        super().__init__(*args, **options)
