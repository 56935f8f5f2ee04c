"""Run a chat model over a chat dataset and store what it says about every assistant token.

    python extract_logits.py --model_id Qwen/Qwen2.5-0.5B-Instruct --dataset_id MegaScience/MegaScience \\
        --output_repo user/my-logits-dataset --chat_template template.jinja

Data flows one way: source rows -> aligned conversations -> batches -> distributions -> columns -> shards.
"""

import functools
import logging
import shlex
import sys

from chat_logits.cli.command_line import leave, run_command
from chat_logits.cli.extract_options import KINDS, ExtractOptions, build_parser, read_config
from chat_logits.extraction.folder import is_being_replaced

logger = logging.getLogger("chat_logits.extract_logits")


def _extract(options: ExtractOptions, given: dict, command: list[str]) -> None:
    config = read_config(options, given)
    if options.preview is not None:
        # With transformers, which takes seconds to import: help and wrong options don't wait for it.
        from chat_logits.cli.preview import preview

        preview(config, options.preview)
        return
    folder = config.folder
    try:
        from chat_logits.extraction.run import extract

        extract(config)
    except KeyboardInterrupt:
        begun = is_being_replaced(folder)
        resuming = [word for word in command if not (begun and word == "--overwrite")]
        logger.info("To resume:\n  %s", shlex.join(resuming))
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = sys.orig_argv if argv is None else ["python", "extract_logits.py", *argv]
    return run_command(
        functools.partial(_extract, command=command),
        KINDS,
        build_parser(),
        sys.argv[1:] if argv is None else argv,
    )


def command() -> None:
    """What ``extract-logits`` runs where the package is installed: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
