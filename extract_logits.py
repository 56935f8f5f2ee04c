"""Run a chat model over a chat dataset and store what it says about every assistant token.

    python extract_logits.py --model_id Qwen/Qwen2.5-0.5B-Instruct --dataset_id MegaScience/MegaScience \\
        --output_repo user/my-logits-dataset --chat_template template.jinja

Data flows one way: source rows -> aligned conversations -> batches -> distributions -> columns -> shards.
"""

import argparse
import shlex
import sys
from pathlib import Path

from chat_logits.cli.command_line import leave, run_command
from chat_logits.cli.extract_options import build_parser, check_arguments, goes_straight
from chat_logits.extraction.folder import RunFolder
from chat_logits.storage.dataset import EXTRACTION_FILE


def _extract(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    if arguments.preview is not None:
        # With torch, which takes seconds to import: help and wrong options don't wait for it.
        from chat_logits.extraction import run as extraction_run

        extraction_run.preview(arguments)
        return
    path = Path(arguments.output_dir or Path("outputs") / arguments.output_repo.split("/")[-1])
    with RunFolder(path, arguments.overwrite) as folder:
        try:
            from chat_logits.extraction import run as extraction_run

            extraction_run.extract(arguments, folder)
        except KeyboardInterrupt:
            _tell_stopped(arguments, folder)
            raise


def _tell_stopped(arguments: argparse.Namespace, folder: RunFolder) -> None:
    begun = folder.is_replacing and (folder.path / EXTRACTION_FILE).exists()
    command = [part for part in arguments.command if not (begun and part == "--overwrite")]
    kept = f" The run that it is to replace is kept in {folder.replaced_run}." if folder.replaced_run else ""
    count = folder.count_shards()
    there = f"{count} finished shards are in {folder.path}." if count else "No shard is finished yet."
    told = f"Stopped. {'What is pushed is kept.' if goes_straight(arguments) else there}{kept}"
    print(f"{told} To go on:\n  {shlex.join(command)}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    arguments.command = ["python", "extract_logits.py", *argv] if argv is not None else sys.orig_argv
    return run_command(_extract, arguments)


def command() -> None:
    """What ``extract-logits`` runs where the package is installed: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
