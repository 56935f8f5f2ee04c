"""The options of ``extract_logits.py``, and their ranges."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from chat_logits.cli.command_line import called_as
from chat_logits.data.templates import RESERVED_KWARGS
from chat_logits.errors import UsageError
from chat_logits.extraction.ray_address import check_address

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
    "num_workers": 1,
    "gpus_per_worker": 1,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all options."""
    parser = argparse.ArgumentParser(
        prog=called_as("extract_logits.py"),
        allow_abbrev=False,  # so that the command to go on with can be told from the options as they stand
        description="Store a chat model's token log-probabilities for every assistant token of a chat dataset.",
    )
    _add_source(parser.add_argument_group("what is read").add_argument)
    _add_chat(parser.add_argument_group("what is extracted").add_argument)
    _add_output(parser.add_argument_group("what is written").add_argument)
    _add_many(parser.add_argument_group("more than one accelerator").add_argument)
    _add_compute(parser.add_argument_group("how it is computed").add_argument)
    return parser


def _add_source(add: Callable) -> None:
    add("--model_id", required=True, metavar="ID", help="the chat model: a Hub id or a folder (required)")
    add("--model_revision", metavar="REV", help="branch, tag or commit of a Hub model (default: its main branch)")
    add("--gguf_file", metavar="NAME", help="the GGUF file within --model_id to load (default: none)")
    add(
        "--dataset_id",
        required=True,
        metavar="ID",
        help="the chat dataset: a Hub id, a folder, or a .jsonl, .json, .parquet or .csv file (required)",
    )
    add("--dataset_config", metavar="NAME", help="configuration of the dataset (default: its only one)")
    add("--dataset_revision", metavar="REV", help="branch, tag or commit of a Hub dataset (default: main branch)")
    add("--split", default="train", metavar="NAME", help="split to read (default: %(default)s)")
    add("--streaming", action="store_true", help="read a dataset too large for the disk row by row (default: off)")
    add("--messages_column", metavar="NAME", help="column with the list of messages (default: found by its name)")
    add("--prompt_column", metavar="NAME", help="column with the question, or messages (default: found by its name)")
    add("--response_column", metavar="NAME", help="column with the answer, or messages (default: found by its name)")
    add("--system_prompt", metavar="TEXT", help="system message for conversations without one (default: none)")
    add("--max_samples", type=int, metavar="N", help="read the first N rows only (default: all)")
    add(
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="skip conversations of more tokens; nothing is truncated (default: the model's positions)",
    )


def _add_chat(add: Callable) -> None:
    add(
        "--chat_template",
        metavar="FILE_OR_TEXT",
        help="Jinja chat template, a file or the text (default: the model's own)",
    )
    add(
        "--template_kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}' or tools (default: none)",
    )
    add(
        "--skip_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="do not extract these tokens of answers either (default: special tokens and think tags)",
    )
    add(
        "--keep_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="extract these, such as the end-of-turn token, although they are special (default: none)",
    )
    add(
        "--preview",
        type=int,
        metavar="N",
        help="print N conversations as they would be extracted, run no model, write nothing (default: off)",
    )


def _add_output(add: Callable) -> None:
    add("--output_repo", metavar="USER/NAME", help="Hub dataset to push to (default: none; the folder only)")
    add("--output_revision", metavar="BRANCH", help="its branch, made if it is missing (default: main)")
    add("--private", action="store_true", help="make the Hub dataset private if it is new (default: public)")
    add(
        "--push_every",
        type=float,
        default=300,
        metavar="SECONDS",
        help="time between commits to the Hub (default: %(default)s)",
    )
    add("--output_dir", metavar="FOLDER", help="local folder (default: outputs/NAME of --output_repo)")
    add(
        "--overwrite",
        action="store_true",
        help="replace the run that is in folder and Hub dataset; given again in the same folder, it goes on with that "
        "(default: go on with the run that is there, if it is this one)",
    )
    add(
        "--rows_per_shard",
        type=int,
        default=256,
        metavar="N",
        help="source rows a file; a stopped run goes on with the first one missing (default: %(default)s)",
    )
    add(
        "--check_shards",
        action="store_true",
        help="going on, read all finished shards against their checksums (default: those that changed since written)",
    )
    add("--top_k", type=int, default=64, metavar="K", help="most probable tokens considered (default: %(default)s)")
    add(
        "--top_p",
        type=float,
        default=0.98,
        metavar="P",
        help="of those, keep up to this total probability, in (0, 1] (default: %(default)s)",
    )
    add(
        "--num_sampled",
        type=int,
        default=16,
        metavar="S",
        help="tokens sampled from outside the nucleus, a position (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: %(default)s)")


def _add_many(add: Callable) -> None:
    add(
        "--num_workers",
        type=int,
        default=1,
        metavar="N",
        help="processes on Ray, each with a model on an accelerator of its own (default: %(default)s, without Ray)",
    )
    add(
        "--ray_address",
        metavar="HOST:PORT",
        help="the Ray cluster that they run on, or auto for the one this machine is part of; without --output_dir, "
        "their shards go straight to --output_repo (default: this machine alone)",
    )
    add(
        "--gpus_per_worker",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that one worker's model is spread over, with --device_map (default: %(default)s)",
    )


def _add_compute(add: Callable) -> None:
    add(
        "--batch_tokens",
        type=int,
        metavar="TOKENS",
        help="padded tokens a forward pass; less needs less memory (default: by the memory that the device has in all, "
        "whatever is free of it; 768 at most on a CPU)",
    )
    add(
        "--logit_memory",
        type=int,
        metavar="MIB",
        help="memory for logits at once; more rows go in pieces (default: 1/16 of what the device has in all, "
        "whatever is free of it; 256 at most on a CPU)",
    )
    add(
        "--no_prefix_cache",
        dest="prefix_cache",
        action="store_false",
        help="compute shared beginnings, such as a system prompt, in every conversation (default: once)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the model's number format (default: float32 on a CPU, else the model's own)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, … (default: the first accelerator, else cpu)")
    add(
        "--device_map",
        choices=("auto", "balanced", "sequential"),
        help="spread a model that is too large for one device over all there are, the CPU and the disk among them; "
        "needs accelerate (default: one device)",
    )
    add(
        "--max_memory",
        type=json_object,
        metavar="JSON",
        help='with --device_map, memory for weights by device, such as \'{"0": "60GiB", "cpu": "200GiB"}\' '
        "(default: accelerate's choice)",
    )
    add("--attn_implementation", metavar="NAME", help="eager, sdpa, … (default: transformers' choice)")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that model or tokenizer bring along, if they do (default: refuse)",
    )
    add("--debug", action="store_true", help="show the traceback of an error (default: its message)")


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
    _check_devices(arguments)
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top_p {arguments.top_p}: expected a number above 0 and up to 1")
    if not 0 <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed}: expected 0 or more, below 2**63")
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: expected {least} or more")


def uses_ray(arguments: argparse.Namespace) -> bool:
    """Whether the options ask for workers on Ray."""
    return arguments.num_workers > 1 or arguments.ray_address is not None


def goes_straight(arguments: argparse.Namespace) -> bool:
    """Whether workers send their shards straight to the Hub: they need not share a folder with anybody."""
    return bool(arguments.ray_address and not arguments.output_dir)


def _check_devices(arguments: argparse.Namespace) -> None:
    device, gpus = arguments.device, arguments.gpus_per_worker
    if device and arguments.device_map:
        raise UsageError(f"--device {device}: --device_map chooses the devices; leave one of the two out")
    if uses_ray(arguments) and device not in (None, "cpu"):
        raise UsageError(f"--device {device}: each worker gets its own accelerator; leave it out, or give cpu")
    if arguments.ray_address is not None:
        check_address(arguments.ray_address)
    if gpus > 1 and not (uses_ray(arguments) and arguments.device_map):
        raise UsageError(f"--gpus_per_worker {gpus}: it goes with --num_workers and --device_map")
    if arguments.max_memory is not None and not arguments.device_map:
        raise UsageError("--max_memory: it goes with --device_map; batches have --batch_tokens and --logit_memory")
