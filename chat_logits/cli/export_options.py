"""The options of ``export_targets.py``, and what it prints at the end."""

from dataclasses import dataclass

from chat_logits.cli.command_line import called_as
from chat_logits.cli.parser import CommandParser, RebuildOptions
from chat_logits.options import option, options_of
from chat_logits.training.config import TaughtOptions
from chat_logits.training.export import Exported
from chat_logits.training.export_formats import FORMATS
from chat_logits.words import count_text


@dataclass(frozen=True, repr=False)
class ExportOptions(TaughtOptions, RebuildOptions):
    """What to export, in which format, and where to."""

    logit_dataset_id: str = option(
        help="the logit dataset, a folder or a Hub id; the name of this option may be left out",
        metavar="ID",
        example="outputs/chats",
    )
    format: str = option(
        help="who reads it",
        choices=tuple(FORMATS),
        example="axolotl",
    )
    output_dir: str = option(
        help="a new or an empty folder to write",
        metavar="FOLDER",
        example="outputs/for_axolotl",
    )
    student_vocab_size: int | None = option(
        None,
        help="number of the student's token ids; what the teacher gives to others is dropped, and counted",
        unset="all ids are kept",
        metavar="N",
        least=1,
        example="151936",
    )
    sequence_length: int | None = option(
        None,
        help="tokens to which --format distillkit pads each conversation; longer ones are left out",
        unset="the longest conversation's",
        metavar="N",
        least=2,
        example="4096",
    )
    temperature: float = option(
        1.0, help="of the targets; only 1 is accepted, as draws are not unbiased at any other", metavar="T"
    )


KINDS = (ExportOptions,)


def build_parser() -> CommandParser:
    """The command's options."""
    return CommandParser(
        options_of(ExportOptions).values(),
        positional="logit_dataset_id",
        prog=called_as("export_targets.py"),
        usage="%(prog)s ID --format FORMAT --output_dir FOLDER [--student_vocab_size N] [--hard_weight SHARE] …",
        description="Write a logit dataset's targets, including the draws from the tail, as Parquet files that other "
        "trainers read.",
    )


def report_of(exported: Exported) -> str:
    """What was written and what was left out, as lines of text."""
    size = sum(file.stat().st_size for file in exported.files) / 1e6
    rows, targets = count_text(exported.num_rows, "conversation"), count_text(exported.num_positions, "target")
    lines = [f"Wrote {rows} with {targets} to {exported.folder} ({exported.format}, {size:.1f} MB)"]
    lines += [f"Left out: conversations {reason}: {count:,}" for reason, count in exported.left_out.items()]
    if exported.positions_left_out:
        lines.append(f"Left out: targets with nothing in the student's vocabulary: {exported.positions_left_out:,}")
    if exported.lost:
        share = exported.lost / exported.num_positions
        lines.append(
            f"Dropped: ids beyond the student's vocabulary, {share:.2e} of the targets' weight "
            f"({exported.most_lost:.2e} of one target's at most)"
        )
    return "\n".join(lines)
