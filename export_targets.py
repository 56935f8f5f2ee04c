"""Write a logit dataset's targets for other trainers, including the draws from the tail, as Parquet files.

    python export_targets.py outputs/demo --format axolotl --output_dir outputs/for_axolotl

From Python: ``export_targets("outputs/demo", "outputs/for_axolotl", "axolotl")``.
"""

import os
import sys
from typing import Any

import chat_logits.cli  # noqa: F401 - first, so that Ctrl-C during the other imports ends in a line
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.cli.command_line import leave, run_command
from chat_logits.cli.export_options import KINDS, ExportOptions, build_parser, report_of
from chat_logits.cli.parser import CommonOptions
from chat_logits.options import options_of
from chat_logits.training.export import Exported
from chat_logits.training.export import export_targets as export_opened

__all__ = ["Exported", "export_targets"]


def export_targets(
    logit_dataset_id: str,
    output_dir: str | os.PathLike,
    format: str = "plain",
    revision: str | None = None,
    tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Exported:
    """Write the targets of a logit dataset, a folder or a Hub id (at ``revision``), to the folder ``output_dir``.

    ``format`` is plain, axolotl, distillkit or trl. ``tokenizer_id`` says where the recorded tokenizer is now; with
    ``trust_remote_code`` it may run its own code. ``options`` are those of ``chat_logits.training.export``:
    ``student_vocab_size``, ``sequence_length``, ``hard_weight``, ``end_of_turn``, ``allow_biased``, ``chat_template``.
    Raises ToolkitError, which says what to do.
    """
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    return export_opened(dataset, tokenizer, output_dir, format, **options)


# --- the command ---


def _export(options: ExportOptions, _given: dict) -> None:
    own = options_of(ExportOptions).keys() - options_of(CommonOptions).keys()
    print(report_of(export_targets(**{name: getattr(options, name) for name in own})))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_export, KINDS, build_parser(), sys.argv[1:] if argv is None else argv)


def command() -> None:
    """The entry point of ``export-targets``: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
