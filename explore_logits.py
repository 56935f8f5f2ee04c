"""Look at a logit dataset: every token of an answer beside what the model predicted in its place.

    python explore_logits.py --logit_dataset_id outputs/demo --sample_index 0

From Python: ``execute_analysis(logit_dataset_id=…, sample_index=0)``; ``unpack_indices`` and
``dequantize_all_logits`` decode a stored row by hand.
"""

import argparse
import sys
from pathlib import Path

from chat_alignment import align_row, load_tokenizer, tokenizer_fingerprint
from command_line import leave, run_command
from conversation_analysis import Analysis, Choice
from errors import ToolkitError, UsageError
from hub_access import is_commit
from logit_codec import dequantize_all_logits, unpack_indices
from logit_dataset import open_dataset
from stored_numbers import row_numbers
from token_analysis import TokenAnalysis, label_tokens, with_predictions

STDOUT = "-"

__all__ = [
    "analyze_token_probabilities",
    "dequantize_all_logits",
    "execute_analysis",
    "unpack_indices",
]


def execute_analysis(
    logit_dataset_id: str,
    sample_index: int = 0,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    top_n: int = 5,
    show_prompt: bool | None = None,
    only: Choice | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Analysis:
    """Print the token table of one stored row, unless ``quiet``, and return its analysis.

    ``logit_dataset_id`` is a folder or a Hub id (at ``revision``), ``sample_index`` counts stored rows, negative
    ones from the end. ``chat_template`` (a path or text) replaces the recorded one and must give the same tokens;
    ``tokenizer_id`` says where the recorded tokenizer lies now; with ``trust_remote_code`` it may run code of its own.
    ``top_n``, ``show_prompt`` and ``only`` are as in ``Analysis``. Raises ToolkitError, with what to do about it.
    """
    for option, number in (("top_n", top_n), ("surprising", only)):
        if isinstance(number, int) and number < 1:
            raise UsageError(f"--{option} {number}: expected 1 or more")
    dataset, tokenizer = _open(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    row = dataset.read_row(sample_index)
    analysis = Analysis(
        tokens=analyze_token_probabilities(row, tokenizer, dataset.extraction, chat_template, top_n),
        messages=row["messages"],
        dataset_id=logit_dataset_id,
        model_id=dataset.extraction["model_id"],
        sample_index=sample_index % dataset.num_rows,
        top_n=top_n,
        show_prompt=show_prompt,
        only=only,
    )
    if not quiet:
        analysis.print()
    return analysis


def analyze_token_probabilities(
    row: dict, tokenizer, extraction: dict, chat_template: str | None = None, top_n: int = 5
) -> list[TokenAnalysis]:
    """Every token of a stored row's conversation, the extracted ones with their predictions.

    Reconstruction and masking are ``align_row``'s, which raises AlignmentError where the tokens are not those
    extracted from; the remaining tokens then match the stored distributions one to one.
    """
    alignment = align_row(row, tokenizer, extraction, chat_template)
    numbers = row_numbers(row, alignment.input_ids[alignment.positions])
    return with_predictions(label_tokens(alignment, tokenizer), numbers, tokenizer, top_n)


def _open(dataset_id: str, revision: str | None, tokenizer_id: str | None, trust_remote_code: bool):
    dataset = open_dataset(dataset_id, revision)
    return dataset, _recorded_tokenizer(dataset.extraction, tokenizer_id, trust_remote_code)


def _recorded_tokenizer(extraction: dict, tokenizer_id: str | None, trust_remote_code: bool):
    """The tokenizer that the extraction used, from its recorded place or from ``tokenizer_id``."""
    source = tokenizer_id or extraction["model_id"]
    recorded, on_hub = tokenizer_id is None, is_commit(extraction["model_revision"])
    if recorded and not on_hub and not Path(source).exists():
        raise ToolkitError(
            f"the model was the local folder {source}, which is not here. Say where it lies now: --tokenizer_id FOLDER"
        )
    revision = extraction["model_revision"] if recorded and on_hub else None
    tokenizer = load_tokenizer(source, revision, extraction.get("gguf_file") if recorded else None, trust_remote_code)
    found = tokenizer_fingerprint(tokenizer)
    if found != extraction["tokenizer_fingerprint"]:
        raise ToolkitError(
            f"tokenizer of {source}: fingerprint {found[:12]}, expected {extraction['tokenizer_fingerprint'][:12]}; "
            "it is not the tokenizer that the extraction used. Name another with --tokenizer_id."
        )
    return tokenizer


# --- the command ---


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="explore_logits.py",
        allow_abbrev=False,
        description="Print each token of a stored answer beside what the model predicted in its place.",
    )
    add = parser.add_argument
    add(
        "--logit_dataset_id",
        required=True,
        metavar="ID",
        help="the logit dataset: a folder or a Hub id (required)",
    )
    add("--sample_index", type=int, default=0, metavar="N", help="stored row, negative from the end (default: 0)")
    add("--top_n", type=int, default=5, metavar="N", help="predictions shown a token (default: 5)")
    add("--surprising", type=int, metavar="N", help="show the N most surprising tokens alone (default: all tokens)")
    add("--show_prompt", action="store_true", help="show the whole prompt in the table (default: its last tokens)")
    add("--html", metavar="FILE", help="write a page that needs nothing else (default: none)")
    add("--json", metavar="FILE", help="write all of it as JSON; - prints that alone (default: none)")
    add(
        "--chat_template",
        metavar="FILE_OR_TEXT",
        help="template to rebuild the tokens with; must give those extracted from (default: the recorded one)",
    )
    add(
        "--tokenizer_id",
        metavar="ID",
        help="folder or Hub id of the tokenizer, if the recorded model is not there (default: the recorded model)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub dataset (default: its main branch)")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the tokenizer brings along, if it does (default: refuse)",
    )
    add("--debug", action="store_true", help="show the traceback of an error (default: its message)")
    return parser


def _explore(arguments: argparse.Namespace) -> None:
    for name in ("html", "json"):
        _check_place(name, getattr(arguments, name))
    found = _analyze(arguments)
    if arguments.json == STDOUT:
        print(found.to_json(), end="")
    else:
        found.print()
    if arguments.html:
        _write(arguments.html, found.to_html())
    if arguments.json and arguments.json != STDOUT:
        _write(arguments.json, found.to_json())


def _analyze(arguments: argparse.Namespace):
    """What the options ask for: something that prints itself, and gives itself as JSON and as a page."""
    names = ("logit_dataset_id", "sample_index", "chat_template", "tokenizer_id", "revision", "top_n")
    return execute_analysis(
        **{name: getattr(arguments, name) for name in names},
        show_prompt=arguments.show_prompt or None,
        only=arguments.surprising,
        trust_remote_code=arguments.trust_remote_code,
        quiet=True,
    )


def _check_place(option: str, file: str | None) -> None:
    """Raise UsageError where a file cannot be written, before any work is done for it."""
    if file is None or (option == "json" and file == STDOUT):
        return
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"the folder {path.parent} is missing"
        raise UsageError(f"--{option} {file}: {found}, expected a file to write")


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ToolkitError(f"{file}: it cannot be written: {error.strerror}") from error
    print(f"Wrote {file}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_explore, build_parser().parse_args(argv), closed_pipe=0)


if __name__ == "__main__":
    leave(main())
