"""Run a chat model over a chat dataset and store what it predicts at every assistant token.

    python extract_logits.py --model_id Qwen/Qwen2.5-0.5B-Instruct --dataset_id MegaScience/MegaScience \\
        --output_repo user/my-logits-dataset --chat_template template.jinja

From Python: ``chat_logits.extract(chat_logits.ExtractConfig(model_id=…, dataset_id=…, output_repo=…))``.

Data flows one way: source rows -> aligned conversations -> batches -> distributions -> columns -> shards.
"""

import functools
import logging
import shlex
import shutil
import sys
from pathlib import Path

from chat_logits.cli.command_line import leave, leave_torch_out, run_command
from chat_logits.cli.extract_options import (
    KINDS,
    ExtractOptions,
    build_parser,
    config_words,
    read_config,
    read_plan_config,
)
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import is_being_replaced

logger = logging.getLogger("chat_logits.extract_logits")


def _run(options: ExtractOptions, given: dict, command: list[str]) -> None:
    """``command`` is the command line that started this, including the options in ``given``."""
    if options.plan:
        from chat_logits.cli.extract_report import show_plan

        show_plan(read_plan_config(options, given), options.plan_for)
        return
    config = read_config(options, given)
    if options.preview is None:
        _extract(config, command)
        return
    if command == sys.orig_argv and not (config.gguf_file or config.trust_remote_code):
        leave_torch_out()
    # It imports transformers, which takes seconds: --help and wrong options do not wait for it.
    from chat_logits.cli.extract_report import preview

    preview(config, options.preview)


def _extract(config: ExtractConfig, command: list[str]) -> None:
    folder = config.folder
    try:
        from chat_logits.extraction.run import extract

        done = extract(config)
    except KeyboardInterrupt:
        begun = is_being_replaced(folder)
        program, words = _program(command)
        resuming = [word for word in words if not (begun and word == "--overwrite")]
        logger.info("To resume:\n  %s", shlex.join([*program, *resuming]))
        raise
    from chat_logits.cli.extract_report import looking_commands, print_extraction

    print_extraction(done, config)
    program, _ = _program(command)
    logger.info("To look at it:\n  %s", "\n  ".join(looking_commands(done, program)))
    logger.info("To repeat:\n  %s", shlex.join([*program, *config_words(done.config)]))


def _program(command: list[str]) -> tuple[list[str], list[str]]:
    """How this command is called, and the arguments after that: the interpreter, its own options and the script; for
    an installed command its name, or its path if it is not found by its name."""
    ends = [place for place, word in enumerate(command) if "extract_logits" in word or "extract-logits" in word]
    if not ends:
        return ["python", "extract_logits.py"], sys.argv[1:]
    script, words = command[ends[0]], command[ends[0] + 1 :]
    if Path(script).stem != "extract-logits":
        return command[: ends[0] + 1], words
    found = shutil.which("extract-logits")
    return [Path(script).stem if found and Path(found).samefile(script) else script], words


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = sys.orig_argv if argv is None else ["python", "extract_logits.py", *argv]
    return run_command(
        functools.partial(_run, command=command), KINDS, build_parser(), sys.argv[1:] if argv is None else argv
    )


def command() -> None:
    """Entry point of the installed ``extract-logits``: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
