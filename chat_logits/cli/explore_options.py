"""The options of ``explore_logits.py``, and which of them go together."""

from dataclasses import dataclass

from chat_logits.cli.command_line import called_as, check_output_files
from chat_logits.cli.parser import CommandParser, RebuildOptions
from chat_logits.errors import UsageError
from chat_logits.model.config import DEVICE_MAPS
from chat_logits.options import option, options_of

# The options that each mode does not take, as they have no meaning for it.
_ROWS = ("sample_index", "surprising", "show_prompt", "top_n")
_TOKENS = ("chat_template", "tokenizer_id", "trust_remote_code")  # not for modes that rebuild no tokens
NOT_WITH = {
    "browse": ("thin", "budget", "student", "verify", "summary", *_ROWS, "html", "json"),
    "where": ("thin", "budget", "student", "verify", "compare", "summary", *_ROWS, *_TOKENS, "html"),
    "thin": ("budget", "student", "verify", "compare", "summary", *_ROWS, *_TOKENS, "html"),
    "budget": ("student", "verify", "compare", "summary", *_ROWS, *_TOKENS, "html"),
    "student": ("verify", "compare", "summary", *_ROWS),
    "verify": ("sample_index", "compare", "summary", "surprising", "show_prompt", "top_n", "html"),
    "compare": ("summary", "show_prompt"),
    "summary": _ROWS,
}
# Options that need another option.
NEEDS = {
    "model_id": ("verify",),
    "device": ("verify", "student"),
    "device_map": ("verify",),
    "budget_rows": ("budget",),
    "save": ("where",),
    "compare_revision": ("compare",),
    "compare_tokenizer_id": ("compare",),
    "student_revision": ("student",),
    "student_rows": ("student",),
    "port": ("browse",),
    "no_open": ("browse",),
}


@dataclass(frozen=True, repr=False)
class ExploreOptions(RebuildOptions):
    """What to look at, and where to write it."""

    logit_dataset_id: str = option(
        help="the logit dataset, a folder or a Hub id; the name of this option may be left out",
        metavar="ID",
        example="outputs/chats",
    )
    sample_index: int | None = option(
        None,
        help="stored row, negative from the end",
        unset="0; with --compare: all rows",
        metavar="N",
        example="-1",
    )
    top_n: int | None = option(None, help="predictions shown a token", unset="5", metavar="N", least=1)
    surprising: int | None = option(
        None,
        help="show only the N most surprising tokens; with --compare and --sample_index, the N tokens or spans "
        "furthest apart",
        unset="all tokens",
        metavar="N",
        least=1,
        example="20",
    )
    show_prompt: bool = option(False, help="show the whole prompt in the table", unset="its last tokens")
    summary: bool = option(
        False,
        help="show the whole dataset in numbers: perplexity, calibration, histograms, extremes",
        unset="one row",
        example="",
    )
    compare: str | None = option(
        None,
        help="another logit dataset over the same conversations: how far the two are apart, in nats of KL divergence a "
        "token, or where their tokenizers differ in bits per byte",
        unset="none",
        metavar="ID",
        example="outputs/other",
    )
    compare_revision: str | None = option(
        None, help="branch, tag or commit of the other dataset", unset="its main branch", metavar="REV"
    )
    compare_tokenizer_id: str | None = option(
        None,
        help="folder or Hub id of the other dataset's tokenizer, if it differs and the recorded model is not available",
        unset="its recorded model",
        metavar="ID",
    )
    verify: int | None = option(
        None,
        help="recompute N conversations with the model and compare; exit status 1 if they differ",
        unset="load none",
        metavar="N",
        least=1,
        example="8",
    )
    model_id: str | None = option(
        None,
        help="folder or Hub id of the model for --verify, if the recorded one is not available",
        unset="the recorded one",
        metavar="ID",
    )
    device: str | None = option(
        None,
        help="where the model of --verify or --student computes: cpu, cuda, cuda:1, mps, …",
        unset="the first accelerator, else cpu",
        metavar="NAME",
    )
    device_map: str | None = option(
        None,
        help="spread the model of --verify over all devices, including the CPU and the disk; needs accelerate",
        unset="one device",
        choices=DEVICE_MAPS,
    )
    student: str | None = option(
        None,
        help="load a student, a folder or a Hub id, and show how far it is from the stored distributions, and where; "
        "the teacher is not loaded",
        unset="load none",
        metavar="ID",
    )
    student_revision: str | None = option(
        None, help="branch, tag or commit of a student on the Hub", unset="its main branch", metavar="REV"
    )
    student_rows: int | None = option(
        None, help="conversations that --student looks at, spread over the dataset", unset="all", metavar="N", least=1
    )
    budget: bool = option(
        False,
        help="show how many bytes fewer stored entries would take, and how far a student's gradient would deviate",
        unset="show none of it",
    )
    budget_rows: int | None = option(
        None, help="conversations that --budget looks at, spread over the dataset", unset="64", metavar="N", least=1
    )
    thin: tuple[str, ...] | None = option(
        None,
        help="write the dataset with at most K most probable tokens, S draws and a total of P a position to FOLDER",
        unset="write none",
        metavar="K S P FOLDER",
        count=4,
    )
    where: str | None = option(
        None,
        help="list the conversations for which a condition is true, such as 'mean_nll > 4', with their numbers",
        unset="list none",
        metavar="CONDITION",
        example='"mean_nll > 4"',
    )
    save: str | None = option(
        None,
        help="write the conversations of --where: FILE.jsonl gets their messages, FILE.txt their rows in the source, "
        "any other name is a new folder, with a logit dataset of these rows",
        unset="write none",
        metavar="PLACE",
    )
    browse: bool = option(
        False,
        help="open the dataset in the browser, with --compare next to the other one: sort, filter, search and mark its "
        "conversations; served only to this machine, until Ctrl-C",
        unset="print",
        example="",
    )
    port: int | None = option(
        None,
        help="port of --browse; 0 for any free port",
        unset="8765, or the next free port",
        metavar="N",
        least=0,
        most=65535,
    )
    no_open: bool = option(False, help="with --browse, only print the address", unset="open the browser")
    html: str | None = option(
        None,
        help="write a page that needs nothing else",
        unset="none",
        metavar="FILE",
        example="page.html",
    )
    json: str | None = option(
        None,
        help="write what is shown as JSON; - prints only the JSON",
        unset="none",
        metavar="FILE",
        example="-",
    )


KINDS = (ExploreOptions,)


def build_parser() -> CommandParser:
    """The command's options."""
    return CommandParser(
        options_of(ExploreOptions).values(),
        positional="logit_dataset_id",
        prog=called_as("explore_logits.py"),
        usage="%(prog)s ID [--sample_index N] [--summary] [--compare ID] [--where CONDITION] [--verify N] …",
        description="Look at a logit dataset: each token of one answer next to what the model predicted in its place, "
        "or all of it with --summary, --where, --compare, --verify, --student or --budget.",
    )


def mode_of(chosen: dict) -> str:
    """The mode that the chosen options ask for: a key of ``NOT_WITH``, or "row"."""
    return next((mode for mode in NOT_WITH if mode in chosen), "row")


def check_options(options: ExploreOptions) -> None:
    """Raise UsageError for options that do not go together, and for files that cannot be written."""
    chosen = options.chosen()
    for mode, others in NOT_WITH.items():
        unfit = [other for other in others if mode in chosen and other in chosen]
        if unfit:
            raise UsageError(f"`{mode}` does not go with `{unfit[0]}`")
    for name, needed in NEEDS.items():
        if name in chosen and chosen.keys().isdisjoint(needed):
            raise UsageError(f"`{name}` is for {' and '.join(f'`{each}`' for each in needed)}")
    of_rows = [name for name in ("top_n", "surprising") if name in chosen]
    if of_rows and "compare" in chosen and "sample_index" not in chosen:
        raise UsageError(f"`{of_rows[0]}` with `compare` is for one conversation: name it with `sample_index` N")
    check_output_files(html=options.html, json=options.json)
