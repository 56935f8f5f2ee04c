"""Look at a logit dataset: every token of an answer beside what the model predicted in its place.

    python explore_logits.py outputs/demo --sample_index 0

From Python: ``execute_analysis(logit_dataset_id=…, sample_index=0)``, and ``execute_summary``, ``execute_comparison``
and ``execute_verification``; ``unpack_indices`` and ``dequantize_all_logits`` decode a stored row by hand.
"""

import sys

from chat_logits.analysis.comparison import DatasetComparison, compare_datasets
from chat_logits.analysis.conversation import Analysis, Choice
from chat_logits.analysis.conversation_comparison import Comparison, compare_analyses
from chat_logits.analysis.recorded_tokenizer import open_with_tokenizer
from chat_logits.analysis.row import row_numbers
from chat_logits.analysis.summary import DatasetSummary, summarize
from chat_logits.analysis.tokens import TokenAnalysis, label_tokens, with_predictions
from chat_logits.cli.command_line import STDOUT, leave, run_command, write_result
from chat_logits.cli.explore_options import KINDS, ExploreOptions, build_parser, check_options, mode_of
from chat_logits.data.alignment import align_row
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import open_dataset
from logit_codec import dequantize_all_logits, unpack_indices

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
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    row = dataset.read_row(sample_index)
    analysis = Analysis(
        tokens=analyze_token_probabilities(row, tokenizer, dataset.extraction, chat_template, top_n),
        messages=row["messages"],
        dataset_id=dataset.dataset_id,
        model_id=dataset.extraction["model_id"],
        sample_index=sample_index % dataset.num_rows,
        top_n=top_n,
        show_prompt=show_prompt,
        only=only,
    )
    return _unless_quiet(analysis, quiet)


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
    return _unless_quiet(summarize(dataset, tokenizer, chat_template), quiet)


def execute_comparison(
    logit_dataset_id: str,
    compare: str,
    sample_index: int | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    compare_revision: str | None = None,
    top_n: int = 5,
    only: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Comparison | DatasetComparison:
    """Print two datasets beside each other, unless ``quiet``, and return what was found.

    ``compare`` is the other dataset, a folder or a Hub id (at ``compare_revision``), made with the same tokenizer. With
    a ``sample_index`` one conversation token by token, the ``only`` tokens furthest apart; without, all of them.
    """
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    other = open_dataset(str(compare), compare_revision)
    if sample_index is None:
        return _unless_quiet(compare_datasets(dataset, other, tokenizer, chat_template), quiet)
    return _unless_quiet(compare_analyses(dataset, other, tokenizer, sample_index, chat_template, top_n, only), quiet)


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
    from chat_logits.analysis.verification import verify as verify_rows  # loads torch

    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code, model_id)
    return _unless_quiet(verify_rows(dataset, tokenizer, verify, model_id, chat_template, trust_remote_code), quiet)


def _unless_quiet(found, quiet: bool):
    if not quiet:
        found.print()
    return found


# --- the command ---


SOURCE_OPTIONS = ("logit_dataset_id", "revision", "chat_template", "tokenizer_id", "trust_remote_code")
MODES = {
    "row": (execute_analysis, ("sample_index", "top_n", "surprising", "show_prompt")),
    "summary": (execute_summary, ()),
    "compare": (execute_comparison, ("compare", "compare_revision", "sample_index", "top_n", "surprising")),
    "verify": (execute_verification, ("verify", "model_id")),
}


def _explore(options: ExploreOptions, _given: dict) -> None:
    check_options(options)
    found = _analyze(options)
    if options.html:
        write_result(options.html, found.to_html())
    if options.json and options.json != STDOUT:
        write_result(options.json, found.to_json())
    if options.json == STDOUT:
        print(found.to_json(), end="")
    else:
        found.print()
    if options.verify is not None and not found.holds:
        raise ToolkitError(f"{options.logit_dataset_id} does not hold up against the model")


def _analyze(options: ExploreOptions):
    """What the options ask for: something that prints itself, and gives itself as JSON and as a page."""
    chosen = options.chosen()
    execute, names = MODES[mode_of(chosen)]
    chosen = {name: chosen[name] for name in (*SOURCE_OPTIONS, *names) if name in chosen}
    if "surprising" in chosen:
        chosen["only"] = chosen.pop("surprising")
    return execute(**chosen, quiet=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_explore, KINDS, build_parser(), sys.argv[1:] if argv is None else argv, closed_pipe=0)


def command() -> None:
    """What ``explore-logits`` runs where the package is installed: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
