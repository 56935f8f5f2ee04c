"""What the extract command prints: conversations before any model runs, and a finished run in numbers."""

import functools
import shlex
from pathlib import Path

from chat_logits.analysis.row import perplexity_of
from chat_logits.analysis.tokens import label_tokens
from chat_logits.cli.extract_options import KINDS
from chat_logits.cli.parser import as_typed
from chat_logits.display.measures import short_number
from chat_logits.display.tables import default_console
from chat_logits.display.text import visible
from chat_logits.display.token_tables import print_preview
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run import Extraction
from chat_logits.extraction.run_description import open_run
from chat_logits.model.config import ModelConfig
from chat_logits.stages import stage
from chat_logits.words import count_text


def preview(config: ExtractConfig, count: int) -> None:
    """Print the first ``count`` conversations, showing for each token whether it is extracted. Writes nothing."""
    reader = open_run(config).reader
    ready, skipped = reader.align(0, count)
    for aligned in ready:
        tokens = label_tokens(aligned.alignment, reader.aligner.tokenizer)
        print_preview(f"Source row {aligned.source_index}", tokens)
        for remark in aligned.remarks:
            print(f"  It has {remark}")
    for entry in skipped:
        place = f" ({visible(entry['place'])})" if "place" in entry else ""
        print(f"Source row {entry['row']}{place} would be skipped: {visible(entry['reason'])}")


def show_plan(config: ModelConfig, plan_for: str | None) -> None:
    """Print what a run, or only its model, needs and takes on this card. Loads no weights, writes nothing."""
    with stage("Importing torch and transformers"):
        from chat_logits.display.plan_tables import print_plan
        from chat_logits.extraction.plan import plan

    print_plan(plan(config, plan_for), default_console(), functools.partial(as_typed, kinds=KINDS))


def print_extraction(done: Extraction, asked: ExtractConfig) -> None:
    """Print the final lines: what was written, what was skipped and why, its size and likelihood.

    ``asked`` is the config that the run was started or resumed with.
    """
    print(f"Conversations  {done.conversations:,} written, {sum(done.skipped.values()):,} skipped")
    for reason, count in done.skipped.items():
        print(f"               {count:,} × {visible(reason)}")
    if done.turns_left_out:
        turns = count_text(done.turns_left_out, "turn")
        print(f"Left out       {turns} marked not to be trained on (weight, train, loss)")
    for i, (remark, count) in enumerate(done.remarks.items()):
        print(f"{'' if i else 'Remarks':<15}{count_text(count, 'conversation')} with {visible(remark)}")
    print(f"Tokens         {done.tokens:,} extracted")
    if done.tokens:
        _print_size(done)
    if done.url:
        print(f"Pushed         {done.url}")
    if done.config.max_samples is not None and "max_samples" not in asked.given:
        recorded = f"the recorded --max_samples {done.config.max_samples}, which was left out here"
        print(f"Ends           at {recorded}. For all rows give another --output_dir,")
        print("               or --overwrite to replace this run")
    if done.config.part:
        print(f"Part           {done.config.part}; when all are finished, the same command without --part joins them")
    print(f"Time           {_time_text(done)}")


def _print_size(done: Extraction) -> None:
    here = f"{done.bytes_in_folder:,} bytes in {done.folder}"
    where = here if done.bytes_in_folder else f"{done.num_bytes:,} bytes on the Hub"
    print(f"Disk           {done.num_bytes / done.tokens:.1f} bytes a token, {where}")
    print(f"Target tokens  {_likelihood_text(done.mean_nll)}")


def _likelihood_text(mean_nll: float | None) -> str:
    if mean_nll is None:
        return "mean NLL infinite: the model gives one of them no probability at all"
    return f"mean NLL {mean_nll:.4f} nats, perplexity {perplexity_of(mean_nll):.2f}"


def _time_text(done: Extraction) -> str:
    """How long this start took, and how many tokens it extracted per second."""
    whole = duration_text(done.seconds)
    if not done.new_tokens:
        return f"{whole}; nothing was left to compute"
    rate = short_number(done.new_tokens / max(done.computing, 0.01))
    return f"{whole}, {duration_text(done.computing)} of it computing: {rate} tokens extracted a second"


def duration_text(seconds: float) -> str:
    """A time in words; from one minute on, in whole seconds.

    >>> duration_text(8.26), duration_text(83.4), duration_text(7384)
    ('8.3 s', '1 min 23 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def looking_commands(done: Extraction, program: list[str]) -> list[str]:
    """The shell commands that look at what was extracted; ``program`` are this command's own words.

    ``explore-logits`` is in the same folder as ``extract-logits``; the same holds for the two scripts.
    """
    *before, script = program
    path = Path(script)
    other = path.name.replace("extract", "explore", 1)
    explore = [*before, other if path.name == script else str(path.with_name(other))]
    if done.bytes_in_folder or not done.config.output_repo:
        dataset = [str(done.folder)]
    else:
        branch = done.config.output_revision
        dataset = [done.config.output_repo, *(["--revision", branch] if branch else [])]
    return [shlex.join([*explore, *dataset, *more]) for more in ([], ["--browse"])]
