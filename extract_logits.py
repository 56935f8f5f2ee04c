"""Run a chat model over a chat dataset and store what it says about every assistant token.

    python extract_logits.py --model_id Qwen/Qwen2.5-0.5B-Instruct --dataset_id MegaScience/MegaScience \\
        --output_repo user/my-logits-dataset --chat_template template.jinja

Data flows one way: source rows -> aligned conversations -> batches -> distributions -> columns -> shards.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from chat_templates import RESERVED_KWARGS
from command_line import leave, run_command
from errors import UsageError
from logit_dataset import EXTRACTION_FILE
from run_folder import RunFolder

LEAST = {
    "top_k": 1,
    "num_sampled": 0,
    "rows_per_shard": 1,
    "push_every": 0,
    "batch_tokens": 1,
    "logit_memory": 1,
    "max_samples": 1,
    "max_length": 2,
    "preview": 1,
}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="extract_logits.py",
        allow_abbrev=False,  # so that the command to go on with can be told from the options as they stand
        description="Store a chat model's token log-probabilities for every assistant token of a chat dataset.",
    )
    source = parser.add_argument_group("what is read").add_argument
    source("--model_id", required=True, metavar="ID", help="the chat model: a Hub id or a folder (required)")
    source("--model_revision", metavar="REV", help="branch, tag or commit of a Hub model (default: its main branch)")
    source("--gguf_file", metavar="NAME", help="the GGUF file within --model_id to load (default: none)")
    source(
        "--dataset_id",
        required=True,
        metavar="ID",
        help="the chat dataset: a Hub id, a folder, or a .jsonl, .json, .parquet or .csv file (required)",
    )
    source("--dataset_config", metavar="NAME", help="configuration of the dataset (default: its only one)")
    source("--dataset_revision", metavar="REV", help="branch, tag or commit of a Hub dataset (default: main branch)")
    source("--split", default="train", metavar="NAME", help="split to read (default: %(default)s)")
    source("--streaming", action="store_true", help="read a dataset too large for the disk row by row (default: off)")
    source("--messages_column", metavar="NAME", help="column with the list of messages (default: found by its name)")
    source("--prompt_column", metavar="NAME", help="column with the question, or messages (default: found by its name)")
    source("--response_column", metavar="NAME", help="column with the answer, or messages (default: found by its name)")
    source("--system_prompt", metavar="TEXT", help="system message for conversations without one (default: none)")
    source("--max_samples", type=int, metavar="N", help="read the first N rows only (default: all)")
    source(
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="skip conversations of more tokens; nothing is truncated (default: the model's positions)",
    )
    chat = parser.add_argument_group("what is extracted").add_argument
    chat(
        "--chat_template",
        metavar="FILE_OR_TEXT",
        help="Jinja chat template, a file or the text (default: the model's own)",
    )
    chat(
        "--template_kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}' or tools (default: none)",
    )
    chat(
        "--skip_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="do not extract these tokens of answers either (default: special tokens and think tags)",
    )
    chat(
        "--keep_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="extract these, such as the end-of-turn token, although they are special (default: none)",
    )
    chat(
        "--preview",
        type=int,
        metavar="N",
        help="print N conversations as they would be extracted, run no model, write nothing (default: off)",
    )
    output = parser.add_argument_group("what is written").add_argument
    output("--output_repo", metavar="USER/NAME", help="Hub dataset to push to (default: none; the folder only)")
    output("--output_revision", metavar="BRANCH", help="its branch, made if it is missing (default: main)")
    output("--private", action="store_true", help="make the Hub dataset private if it is new (default: public)")
    output(
        "--push_every",
        type=float,
        default=300,
        metavar="SECONDS",
        help="time between commits to the Hub (default: %(default)s)",
    )
    output("--output_dir", metavar="FOLDER", help="local folder (default: outputs/NAME of --output_repo)")
    output(
        "--overwrite",
        action="store_true",
        help="replace the run that is in folder and Hub dataset; given again in the same folder, it goes on with that "
        "(default: go on with the run that is there, if it is this one)",
    )
    output(
        "--rows_per_shard",
        type=int,
        default=256,
        metavar="N",
        help="source rows a file; a stopped run goes on with the first one missing (default: %(default)s)",
    )
    output("--top_k", type=int, default=64, metavar="K", help="most probable tokens considered (default: %(default)s)")
    output(
        "--top_p",
        type=float,
        default=0.98,
        metavar="P",
        help="of those, keep up to this total probability, in (0, 1] (default: %(default)s)",
    )
    output(
        "--num_sampled",
        type=int,
        default=16,
        metavar="S",
        help="tokens sampled from outside the nucleus, a position (default: %(default)s)",
    )
    output("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: %(default)s)")
    compute = parser.add_argument_group("how it is computed").add_argument
    compute(
        "--batch_tokens",
        type=int,
        metavar="TOKENS",
        help="padded tokens a forward pass; less needs less memory (default: from free memory, 768 at most on a CPU)",
    )
    compute(
        "--logit_memory",
        type=int,
        metavar="MIB",
        help="memory for logits at once; more rows go in pieces (default: from free memory, 256 at most on a CPU)",
    )
    compute(
        "--no_prefix_cache",
        dest="prefix_cache",
        action="store_false",
        help="compute shared beginnings, such as a system prompt, in every conversation (default: once)",
    )
    compute(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the model's number format (default: float32 on a CPU, else the model's own)",
    )
    compute("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, … (default: the first accelerator, else cpu)")
    compute("--attn_implementation", metavar="NAME", help="eager, sdpa, … (default: transformers' choice)")
    compute(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that model or tokenizer bring along, if they do (default: refuse)",
    )
    compute("--debug", action="store_true", help="show the traceback of an error (default: its message)")
    return parser


def json_object(text: str) -> dict:
    """An option's JSON object; argparse turns the error into one about the option."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r} ({error})") from error
    if not isinstance(value, dict) or RESERVED_KWARGS & set(value):
        raise argparse.ArgumentTypeError(f"expected a JSON object without {', '.join(sorted(RESERVED_KWARGS))}")
    return value


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for a value outside its range, naming option, value and range."""
    if arguments.preview is None and not arguments.output_repo and not arguments.output_dir:
        raise UsageError("nowhere to write: give --output_repo USER/NAME, --output_dir FOLDER, or both")
    if arguments.model_id.endswith(".gguf"):
        name = Path(arguments.model_id).name
        raise UsageError(f"--model_id {arguments.model_id}: give the folder, and the file's name: --gguf_file {name}")
    if arguments.output_repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.output_repo):
        raise UsageError(f"--output_repo {arguments.output_repo}: expected USER/NAME")
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top_p {arguments.top_p}: expected a number above 0 and up to 1")
    if not 0 <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed}: expected 0 or more, below 2**63")
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: expected {least} or more")


def _extract(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    if arguments.preview is not None:
        import extraction_run  # with torch, which takes seconds to import: help and wrong options don't wait for it

        extraction_run.preview(arguments)
        return
    path = Path(arguments.output_dir or Path("outputs") / arguments.output_repo.split("/")[-1])
    with RunFolder(path, arguments.overwrite) as folder:
        try:
            import extraction_run

            extraction_run.extract(arguments, folder)
        except KeyboardInterrupt:
            _tell_stopped(arguments, folder)
            raise


def _tell_stopped(arguments: argparse.Namespace, folder: RunFolder) -> None:
    begun = folder.is_replacing and (folder.path / EXTRACTION_FILE).exists()
    command = [part for part in arguments.command if not (begun and part == "--overwrite")]
    kept = f" The run that it is to replace is kept in {folder.replaced_run}." if folder.replaced_run else ""
    told = f"Stopped. {folder.count_shards()} finished shards are in {folder.path}.{kept}"
    print(f"{told} To go on:\n  {shlex.join(command)}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    arguments.command = ["python", "extract_logits.py", *argv] if argv is not None else sys.orig_argv
    return run_command(_extract, arguments)


if __name__ == "__main__":
    leave(main())
