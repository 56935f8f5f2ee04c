"""Look at a logit dataset: every token of an answer beside what the model predicted in its place.

    python explore_logits.py --logit_dataset_id outputs/demo --sample_index 0

From Python: ``execute_analysis(logit_dataset_id=…, sample_index=0)``, and ``execute_summary``, ``execute_comparison``
and ``execute_verification``; ``unpack_indices`` and ``dequantize_all_logits`` decode a stored row by hand.
"""

import argparse

from chat_alignment import align_row
from command_line import STDOUT, check_place, leave, run_command, write_result
from conversation_analysis import Analysis, Choice
from conversation_comparison import Comparison, compare_analyses
from dataset_comparison import DatasetComparison, compare_datasets
from dataset_summary import DatasetSummary, summarize
from errors import ToolkitError, UsageError
from logit_codec import dequantize_all_logits, unpack_indices
from logit_dataset import open_dataset
from recorded_tokenizer import open_with_tokenizer
from stored_numbers import row_numbers
from token_analysis import TokenAnalysis, label_tokens, with_predictions

SOURCE_OPTIONS = ("logit_dataset_id", "revision", "chat_template", "tokenizer_id", "trust_remote_code")
# What each way of looking at a dataset does not take.
NOT_WITH = {
    "verify": ("sample_index", "compare", "summary", "surprising", "show_prompt", "html"),
    "compare": ("summary", "show_prompt", "model_id"),
    "summary": ("sample_index", "surprising", "show_prompt", "model_id"),
}

__all__ = [
    "analyze_token_probabilities",
    "dequantize_all_logits",
    "execute_analysis",
    "execute_comparison",
    "execute_summary",
    "execute_verification",
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
    _check_counts(top_n, only)
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
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
    return _told(analysis, quiet)


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


def execute_summary(
    logit_dataset_id: str,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> DatasetSummary:
    """Print a whole dataset in numbers, unless ``quiet``, and return them. Options are as in ``execute_analysis``."""
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    return _told(summarize(dataset, tokenizer, chat_template), quiet)


def execute_comparison(
    logit_dataset_id: str,
    compare: str,
    sample_index: int | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    top_n: int = 5,
    only: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Comparison | DatasetComparison:
    """Print two datasets beside each other, unless ``quiet``, and return what was found.

    ``compare`` is the other dataset, a folder or a Hub id at its newest commit, made with the same tokenizer. With a
    ``sample_index`` one conversation token by token, the ``only`` tokens furthest apart; without, all of them.
    """
    _check_counts(top_n, only)
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    other = open_dataset(compare)
    if sample_index is None:
        return _told(compare_datasets(dataset, other, tokenizer, chat_template), quiet)
    return _told(compare_analyses(dataset, other, tokenizer, sample_index, chat_template, top_n, only), quiet)


def execute_verification(
    logit_dataset_id: str,
    verify: int,
    model_id: str | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
):
    """Hold ``verify`` conversations against the model; print and return the ``model_check.Verification``.

    ``model_id`` says where the recorded model lies now, its tokenizer with it unless ``tokenizer_id`` says otherwise.
    """
    from model_check import verify as verify_rows  # loads torch

    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code, model_id)
    return _told(verify_rows(dataset, tokenizer, verify, model_id, chat_template, trust_remote_code), quiet)


def _told(found, quiet: bool):
    if not quiet:
        found.print()
    return found


def _check_counts(top_n: int, only: Choice | None) -> None:
    for option, number in (("top_n", top_n), ("surprising", only)):
        if isinstance(number, int) and number < 1:
            raise UsageError(f"--{option} {number}: expected 1 or more")


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
    add(
        "--sample_index",
        type=int,
        metavar="N",
        help="stored row, negative from the end (default: 0; with --compare: all rows)",
    )
    add("--top_n", type=int, default=5, metavar="N", help="predictions shown a token (default: 5)")
    add(
        "--surprising",
        type=int,
        metavar="N",
        help="show the N most surprising tokens alone; with --compare, the N furthest apart (default: all tokens)",
    )
    add("--show_prompt", action="store_true", help="show the whole prompt in the table (default: its last tokens)")
    add(
        "--summary",
        action="store_true",
        help="show the whole dataset in numbers: perplexity, calibration, histograms, extremes (default: one row)",
    )
    add(
        "--compare",
        metavar="ID",
        help="another logit dataset, over the same conversations and with the same tokenizer: how far the two are "
        "apart, in nats of KL divergence a token (default: none)",
    )
    add(
        "--verify",
        type=int,
        metavar="N",
        help="load the model and hold N conversations against its plain forward; exit status 1 if they do not hold up "
        "(default: load none)",
    )
    add(
        "--model_id",
        metavar="ID",
        help="folder or Hub id of the model for --verify, if the recorded one is not there (default: the recorded one)",
    )
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
    _refuse_combinations(arguments)
    for name in ("html", "json"):
        check_place(name, getattr(arguments, name))
    found = _analyze(arguments)
    if arguments.html:
        write_result(arguments.html, found.to_html())
    if arguments.json and arguments.json != STDOUT:
        write_result(arguments.json, found.to_json())
    if arguments.json == STDOUT:
        print(found.to_json(), end="")
    else:
        found.print()
    if arguments.verify is not None and not found.holds:
        raise ToolkitError(f"{arguments.logit_dataset_id} does not hold up against the model")


def _analyze(arguments: argparse.Namespace):
    """What the options ask for: something that prints itself, and gives itself as JSON and as a page."""
    options = {name: getattr(arguments, name) for name in SOURCE_OPTIONS}
    if arguments.verify is not None:
        return execute_verification(**options, verify=arguments.verify, model_id=arguments.model_id, quiet=True)
    if arguments.compare is not None:
        chosen = {"top_n": arguments.top_n, "only": arguments.surprising, "sample_index": arguments.sample_index}
        return execute_comparison(**options, **chosen, compare=arguments.compare, quiet=True)
    if arguments.summary:
        return execute_summary(**options, quiet=True)
    return execute_analysis(
        **options,
        sample_index=arguments.sample_index or 0,
        top_n=arguments.top_n,
        show_prompt=arguments.show_prompt or None,
        only=arguments.surprising,
        quiet=True,
    )


def _refuse_combinations(arguments: argparse.Namespace) -> None:
    given = {name for name, value in vars(arguments).items() if value is not None and value is not False}
    for mode, others in NOT_WITH.items():
        unfit = [other for other in others if mode in given and other in given]
        if unfit:
            raise UsageError(f"--{mode} does not go with --{unfit[0]}")
    if arguments.model_id and arguments.verify is None:
        raise UsageError("--model_id is for --verify N; the tokenizer's place is --tokenizer_id")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_explore, build_parser().parse_args(argv), closed_pipe=0)


if __name__ == "__main__":
    leave(main())
