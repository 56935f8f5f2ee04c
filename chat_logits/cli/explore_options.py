"""The options of ``explore_logits.py``, and which of them go together."""

import argparse

from chat_logits.cli.command_line import called_as, check_places
from chat_logits.errors import UsageError

# What each way of looking at a dataset does not take, as what it would say of it is said otherwise or not at all.
NOT_WITH = {
    "verify": ("sample_index", "compare", "summary", "surprising", "show_prompt", "top_n", "html"),
    "compare": ("summary", "show_prompt"),
    "summary": ("sample_index", "surprising", "show_prompt", "top_n"),
}
# What is of use beside another option alone.
NEEDS = {"model_id": "verify", "compare_revision": "compare"}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=called_as("explore_logits.py"),
        allow_abbrev=False,
        description="Look at a logit dataset: each token of one answer beside what the model predicted in its place, "
        "or all of it with --summary, --compare or --verify.",
    )
    _add_options(parser.add_argument)
    return parser


def _add_options(add) -> None:
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
    add("--top_n", type=int, metavar="N", help="predictions shown a token (default: 5)")
    add(
        "--surprising",
        type=int,
        metavar="N",
        help="show the N most surprising tokens alone; with --compare and --sample_index, the N furthest apart "
        "(default: all tokens)",
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
        "--compare_revision",
        metavar="REV",
        help="branch, tag or commit of the other dataset (default: its main branch)",
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
    add("--json", metavar="FILE", help="write what is shown as JSON; - prints that alone (default: none)")
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
        help="run Python code that tokenizer or model bring along (default: refuse)",
    )
    add("--debug", action="store_true", help="show the traceback of an error (default: its message)")


def given_options(arguments: argparse.Namespace) -> dict:
    """The options that were given, with their values."""
    return {name: value for name, value in vars(arguments).items() if value is not None and value is not False}


def mode_of(given: dict) -> str:
    """What is to be looked at by the options given: "verify", "compare", "summary" or "row"."""
    return next((mode for mode in NOT_WITH if mode in given), "row")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together, counts below 1, and files that cannot be written."""
    given = given_options(arguments)
    for mode, others in NOT_WITH.items():
        unfit = [other for other in others if mode in given and other in given]
        if unfit:
            raise UsageError(f"--{mode} does not go with --{unfit[0]}")
    for option, needed in NEEDS.items():
        if option in given and needed not in given:
            raise UsageError(f"--{option} is for --{needed}")
    of_rows = [name for name in ("top_n", "surprising") if name in given]
    if of_rows and "compare" in given and "sample_index" not in given:
        raise UsageError(f"--{of_rows[0]} with --compare is for one conversation: name it with --sample_index N")
    for option in ("top_n", "surprising"):
        if option in given and given[option] < 1:
            raise UsageError(f"--{option} {given[option]}: expected 1 or more")
    check_places(html=arguments.html, json=arguments.json)
