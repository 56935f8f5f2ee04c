"""The options of ``train_student.py``: those of ``TrainConfig``."""

from dataclasses import dataclass

from chat_logits.cli.command_line import called_as
from chat_logits.cli.parser import CommandParser, CommonOptions
from chat_logits.options import COMPUTED, READ, WRITTEN, options_of
from chat_logits.training.config import TAUGHT, TrainConfig


@dataclass(frozen=True, repr=False)
class TrainOptions(CommonOptions):
    """The options of the command that are not part of the training."""


KINDS = (TrainConfig, TrainOptions)


def build_parser() -> CommandParser:
    """The parser of all options."""
    return CommandParser(
        [one for kind in KINDS for one in options_of(kind).values()],
        groups=(READ, TAUGHT, WRITTEN, COMPUTED),
        prog=called_as("train_student.py"),
        description="Train a student on a logit dataset, so that its token probabilities come as close as possible to "
        "the teacher's.",
    )
