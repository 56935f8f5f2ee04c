"""Train a student on a logit dataset.

    python train_student.py --logit_dataset_id outputs/demo --student_id Qwen/Qwen2.5-0.5B-Instruct \\
        --output_dir outputs/student

From Python: ``chat_logits.training.run.train(TrainConfig(logit_dataset_id=…, student_id=…, output_dir=…))``.
"""

import logging
import os
import sys
from pathlib import Path

from chat_logits.cli.command_line import leave, run_command, write_result
from chat_logits.cli.parser import read_options, refuse_missing
from chat_logits.cli.train_options import KINDS, TrainOptions, build_parser
from chat_logits.errors import ACCELERATE, refuse_without
from chat_logits.stages import stage
from chat_logits.training.config import TrainConfig, checkpoint_states

logger = logging.getLogger("chat_logits.train_student")

PAGE = "training.html"  # in the student's folder


def _run(_options: TrainOptions, given: dict) -> None:
    values = read_options(TrainConfig, given)
    refuse_missing(TrainConfig, values)
    config = TrainConfig(**values)
    refuse_without(*ACCELERATE, "training")
    config.check_output_dir()  # ``train`` does this, too, but only after the imports
    if os.environ.get("RANK", "0") != "0":  # set by torchrun: only the first process reports progress
        logging.getLogger("chat_logits").setLevel(logging.ERROR)
    with stage("Importing torch and transformers"):  # late, so that help and wrong options do not wait for them
        from chat_logits.display.tables import default_console
        from chat_logits.display.training_page import training_page
        from chat_logits.display.training_tables import print_training
        from chat_logits.training.run import train

    try:
        result = train(config)
    except KeyboardInterrupt:
        can_resume = checkpoint_states(Path(config.output_dir))
        logger.info("Stopped. The same command %s.", "with --resume continues" if can_resume else "starts again")
        raise
    if result.rank == 0:  # only the first process prints
        print_training(result, default_console())
        write_result(str(Path(config.output_dir) / PAGE), training_page(result))
    logger.info(
        "The student is in %s. Keep its folder `checkpoints` only to train further (`resume` with a larger "
        "`max_steps`).",
        config.output_dir,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_run, KINDS, build_parser(), sys.argv[1:] if argv is None else argv)


def command() -> None:
    """The entry point of ``train-student``: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
