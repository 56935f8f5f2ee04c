"""Look at a logit dataset: every token of an answer, and what the model predicted in its place.

    python explore_logits.py outputs/demo --sample_index 0

From Python: ``open_logits(…)`` gives the whole dataset as one object; there are also
``execute_analysis(logit_dataset_id=…, sample_index=0)``, ``execute_summary``, ``execute_comparison``,
``execute_verification``, ``execute_student``, ``execute_budget``, ``execute_thinning`` and ``execute_filtering``;
``unpack_indices`` and ``dequantize_all_logits`` decode a stored row by hand.
"""

import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import chat_logits.cli  # noqa: F401 - first, so that Ctrl-C during the other imports ends in a line
from chat_logits.analysis.bars import bars_kept_back
from chat_logits.analysis.budget import BUDGET_ROWS, measure_budget
from chat_logits.analysis.conversation import Selection, analyze_token_probabilities
from chat_logits.analysis.filtering import filter_rows
from chat_logits.analysis.logits import Conversation
from chat_logits.analysis.opening import open_beside, open_given, open_with_tokenizer
from chat_logits.analysis.thinning import read_setting, thin_dataset
from chat_logits.cli.command_line import STDOUT, leave, run_command, write_result
from chat_logits.cli.explore_options import KINDS, ExploreOptions, build_parser, check_options, mode_of
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.display.logits import open_logits
from chat_logits.display.results import (
    Shown,
    ShownAnalysis,
    ShownBudget,
    ShownComparison,
    ShownCrossComparison,
    ShownDatasetComparison,
    ShownFiltering,
    ShownSpanComparison,
    ShownStudent,
    ShownSummary,
    ShownThinning,
    ShownVerification,
    shown,
)
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.paths import expanded
from chat_logits.stages import stage
from chat_logits.training.dataset import open_for_student
from logit_codec import dequantize_all_logits, unpack_indices

__all__ = [
    "analyze_token_probabilities",
    "browse_dataset",
    "dequantize_all_logits",
    "execute_analysis",
    "execute_budget",
    "execute_comparison",
    "execute_filtering",
    "execute_student",
    "execute_summary",
    "execute_thinning",
    "execute_verification",
    "open_logits",
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
    only: Selection | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> ShownAnalysis:
    """Print the token table of one stored row, unless ``quiet``, and return its analysis.

    ``logit_dataset_id`` is a folder or a Hub id (at ``revision``), ``sample_index`` counts stored rows, negative ones
    from the end. ``chat_template`` (a path or text) replaces the recorded one and must give the same tokens;
    ``tokenizer_id`` says where the recorded tokenizer is now; with ``trust_remote_code`` it may run its own code.
    ``top_n``, ``show_prompt`` and ``only`` are as in ``Analysis``. Raises ToolkitError, which says what to do.
    """
    _check_counts(top_n=top_n, **({} if only is None or callable(only) else {"only": only}))
    _check_row(sample_index)
    logits = open_logits(logit_dataset_id, revision, chat_template, tokenizer_id, trust_remote_code)
    conversation = Conversation(logits, logits.dataset.row_number(sample_index))
    return _printed(lambda: conversation.analyze(top_n, show_prompt=show_prompt, only=only), quiet)


def execute_summary(
    logit_dataset_id: str,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> ShownSummary:
    """Print a whole dataset in numbers, unless ``quiet``, and return them. Options are as in ``execute_analysis``."""
    logits = open_logits(logit_dataset_id, revision, chat_template, tokenizer_id, trust_remote_code)
    return _printed(logits.summary, quiet)


def execute_comparison(
    logit_dataset_id: str,
    compare: str,
    sample_index: int | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    compare_revision: str | None = None,
    compare_tokenizer_id: str | None = None,
    top_n: int | None = None,
    only: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> ShownComparison | ShownDatasetComparison | ShownSpanComparison | ShownCrossComparison:
    """Compare two datasets, print the comparison, unless ``quiet``, and return it.

    ``compare`` is the other dataset, a folder or a Hub id (at ``compare_revision``). With the same tokenizer they are
    compared token by token; with different ones (``compare_tokenizer_id`` says where the other's is now) by their text,
    in bits per byte over the spans between boundaries of both tokenizations. With a ``sample_index`` one conversation
    is compared, and ``only`` shows the n tokens or spans furthest apart; without it, all conversations. ``top_n`` is
    for datasets with the same tokenizer, None for 5.
    """
    given = {"top_n": top_n, "only": only}
    _check_counts(**{name: count for name, count in given.items() if count is not None})
    if sample_index is not None:
        _check_row(sample_index)
    logits = open_logits(logit_dataset_id, revision, chat_template, tokenizer_id, trust_remote_code)
    if sample_index is None:
        return _printed(lambda: logits.compare(compare, compare_revision, compare_tokenizer_id), quiet)
    conversation = Conversation(logits, logits.dataset.row_number(sample_index))
    return _printed(lambda: conversation.compare(compare, compare_revision, compare_tokenizer_id, top_n, only), quiet)


def execute_verification(
    logit_dataset_id: str,
    verify: int,
    model_id: str | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    device: str | None = None,
    device_map: str | None = None,
) -> ShownVerification:
    """Recompute ``verify`` conversations with the model and compare; print the verification, unless ``quiet``, and
    return it.

    ``model_id`` says where the recorded model is now, and its tokenizer unless ``tokenizer_id`` is given. It runs on
    ``device``, by default the first accelerator, or spread over all devices by ``device_map``.
    """
    _check_counts(verify=verify)
    from chat_logits.analysis.verification import verify as verify_rows  # loads torch

    option = "model_id" if tokenizer_id is None else "tokenizer_id"
    with stage("Opening %s and its tokenizer", logit_dataset_id):
        named = (tokenizer_id, trust_remote_code, model_id, option)
        dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, *named)
    options = (model_id, chat_template, trust_remote_code, device, device_map)
    return _printed(lambda: verify_rows(dataset, tokenizer, verify, *options), quiet)


def execute_student(
    logit_dataset_id: str,
    student: str,
    student_revision: str | None = None,
    student_rows: int | None = None,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    device: str | None = None,
) -> ShownStudent:
    """Compare a student with the stored distributions; print how far it is from them and where, unless ``quiet``, and
    return the report.

    ``student`` is a folder or a Hub id (at ``student_revision``), with the extraction's tokenizer; ``student_rows`` are
    spread over the dataset, None for all. It runs on ``device``, by default the first accelerator. Raises UsageError
    for another tokenizer, naming the first token that differs.
    """
    if student_rows is not None:
        _check_counts(student_rows=student_rows)
    with stage("Importing torch and transformers"):
        from chat_logits.model.devices import choose_device
        from chat_logits.model.loading import load_model
        from chat_logits.training.student_pass import measure_student
    with stage("Opening %s and the student's tokenizer", logit_dataset_id):
        own = load_tokenizer(str(student), student_revision, trust_remote_code=trust_remote_code)
        dataset, tokenizer = open_for_student(logit_dataset_id, own, revision, trust_remote_code, tokenizer_id)
    found = choose_device(device)
    with stage("Loading %s on %s", student, found):
        model = load_model(str(student), student_revision, device=found, trust_remote_code=trust_remote_code)
    measured = (dataset, model, tokenizer, student_rows, chat_template, str(student))
    return _printed(lambda: measure_student(*measured), quiet)


def execute_budget(
    logit_dataset_id: str, budget_rows: int = BUDGET_ROWS, revision: str | None = None, quiet: bool = False
) -> ShownBudget:
    """Print the size and error of settings with fewer entries, on ``budget_rows`` rows, unless ``quiet``, and return
    them."""
    _check_counts(budget_rows=budget_rows)
    return _printed(lambda: measure_budget(open_given(logit_dataset_id, revision), budget_rows), quiet)


def execute_thinning(
    logit_dataset_id: str, thin: Sequence, revision: str | None = None, quiet: bool = False
) -> ShownThinning:
    """Write a thinned dataset; print its size, unless ``quiet``, and return it.

    ``thin`` is (K, S, P, folder): the numbers of most probable tokens and draws, and the nucleus' total, to keep, none
    of them more than is stored, and a new or an empty folder.
    """
    setting, _ = read_setting(thin)
    for name, count in zip("KS", thin, strict=False):
        if not isinstance(count, str) and not _is_whole(count):
            raise UsageError(f"`thin`: {name} {count!r}: expected a whole number")
    folder = expanded(thin[-1], "thin")
    return _printed(lambda: thin_dataset(open_given(logit_dataset_id, revision), setting, folder), quiet)


def execute_filtering(
    logit_dataset_id: str, where: str, save: str | None = None, revision: str | None = None, quiet: bool = False
) -> ShownFiltering:
    """Print the rows for which the condition ``where`` is true, with their numbers, unless ``quiet``, and return them.

    ``where`` is as for ``Logits.where``. ``save`` is where to save them: FILE.jsonl gets their messages, FILE.txt their
    source indices, and a new or an empty folder a logit dataset of these rows.
    """
    place = None if save is None else expanded(save, "save")
    return _printed(lambda: filter_rows(open_given(logit_dataset_id, revision), where, place), quiet)


def browse_dataset(
    logit_dataset_id: str,
    compare: str | None = None,
    port: int | None = None,
    no_open: bool = False,
    chat_template: str | None = None,
    tokenizer_id: str | None = None,
    revision: str | None = None,
    compare_revision: str | None = None,
    compare_tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a dataset's pages on this machine, and open the browser at them unless ``no_open``, until Ctrl-C.

    ``compare`` is a dataset to compare with, as in ``execute_comparison``; the default ``port`` is 8765, or the next
    free one. Raises UsageError if the port is taken, and ToolkitError if the extra ``browse`` is not installed.
    """
    from chat_logits.browse.server import browse, refuse_missing  # DuckDB and a server are optional

    refuse_missing()
    dataset, tokenizer = open_with_tokenizer(logit_dataset_id, revision, tokenizer_id, trust_remote_code)
    other, other_tokenizer = None, None
    if compare is not None:
        named = (compare, compare_revision, compare_tokenizer_id, trust_remote_code)
        other, other_tokenizer = open_beside(dataset, *named)
    browse(dataset, tokenizer, other, other_tokenizer, chat_template, port, not no_open)


def _check_counts(**counts: object) -> None:
    """Raise UsageError for a count that is not a whole number of 1 or more."""
    for name, count in counts.items():
        if not _is_whole(count) or count < 1:  # type: ignore[operator]
            raise UsageError(f"`{name}` {count!r}: expected a whole number, 1 or more")


def _check_row(sample_index: object) -> None:
    if not _is_whole(sample_index):
        raise UsageError(f"`sample_index` {sample_index!r}: expected a whole number, negative from the end")


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _printed(compute: Callable[[], Any], quiet: bool):
    """The computed result, which is printed unless ``quiet``; with ``quiet`` there is no progress bar, either."""
    with bars_kept_back(quiet):
        result = compute()
    result = result if isinstance(result, Shown) else shown(result)
    if not quiet:
        result.print()
    return result


# --- the command ---


SOURCE_OPTIONS = ("logit_dataset_id", "revision", "chat_template", "tokenizer_id", "trust_remote_code")
MODES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "row": (execute_analysis, ("sample_index", "top_n", "surprising", "show_prompt")),
    "summary": (execute_summary, ()),
    "compare": (
        execute_comparison,
        ("compare", "compare_revision", "compare_tokenizer_id", "sample_index", "top_n", "surprising"),
    ),
    "verify": (execute_verification, ("verify", "model_id", "device", "device_map")),
    "student": (execute_student, ("student", "student_revision", "student_rows", "device")),
    "budget": (execute_budget, ("budget_rows",)),
    "thin": (execute_thinning, ("thin",)),
    "where": (execute_filtering, ("where", "save")),
}


def _explore(options: ExploreOptions, _given: dict) -> None:
    check_options(options)
    if options.browse:
        chosen = options.chosen()
        names = (*SOURCE_OPTIONS, "compare", "compare_revision", "compare_tokenizer_id", "port", "no_open")
        browse_dataset(**{name: chosen[name] for name in names if name in chosen})
        return
    result = _analyze(options)
    if options.html:
        write_result(options.html, result.to_html())
    if options.json and options.json != STDOUT:
        write_result(options.json, result.to_json())
    if options.json == STDOUT:
        print(result.to_json(), end="")
    else:
        result.print()
    if options.verify is not None and not result.holds:
        raise ToolkitError(f"{options.logit_dataset_id} does not hold up against the model")


def _analyze(options: ExploreOptions):
    """The result that the options ask for, with methods to print it and to convert it to JSON and a page."""
    chosen = options.chosen()
    execute, names = MODES[mode_of(chosen)]
    chosen = {name: chosen[name] for name in (*SOURCE_OPTIONS, *names) if name in chosen}
    if "surprising" in chosen:
        chosen["only"] = chosen.pop("surprising")
    with bars_kept_back(False):  # the command prints the result itself
        return execute(**chosen, quiet=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(_explore, KINDS, build_parser(), sys.argv[1:] if argv is None else argv, closed_pipe=0)


def command() -> None:
    """The entry point of ``explore-logits``: the process ends with the command's exit status."""
    leave(main())


if __name__ == "__main__":
    command()
