"""The run: shards of source rows through the model into files, with progress on the way and a summary at the end."""

import argparse
import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

import chat_alignment
import dataset_card
import logit_codec
import logit_dataset
import teacher_model
from batching import Budget
from content_hash import hash_files
from conversation_reader import Aligned, Reader, open_reader
from errors import UsageError
from hub_access import HubUnreachable, resolve_commit
from memory_budget import choose_budget
from model_batches import Batches
from token_analysis import label_tokens
from token_report import print_preview
from token_selection import OnTheWay

ROWS_PER_SHARD = 256
BACKLOG = 2  # batches whose results wait to be encoded and written
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "numpy", "pyarrow")


@dataclass
class Tally:
    """What a run has done so far."""

    written: int = 0
    tokens: int = 0
    nll: float = 0.0
    disk_bytes: int = 0
    skipped: Counter = field(default_factory=Counter)
    shards: list[dict] = field(default_factory=list)


def open_conversations(arguments: argparse.Namespace) -> tuple[Reader, str | None]:
    """The conversations as the model will read them, and the model's Hub commit (None for a folder)."""
    is_local = Path(arguments.model_id).exists()
    commit = None if is_local else resolve_commit(arguments.model_id, "model", arguments.model_revision)
    if is_local and arguments.model_revision:
        raise UsageError(f"--model_revision: {arguments.model_id} is a local folder, which has no revisions")
    config = teacher_model.load_config(arguments.model_id, commit, arguments.gguf_file)
    limits = teacher_model.input_limits(config)
    if arguments.top_k > limits.vocab_size:
        raise UsageError(f"--top_k {arguments.top_k}: the model has {limits.vocab_size} tokens, expected no more")
    reader = open_reader(arguments, commit, limits)
    print(f"Assistant tokens: {reader.choice.mask_source}", file=sys.stderr)
    return reader, commit


def preview(arguments: argparse.Namespace) -> None:
    """Print the first conversations as they would be extracted; runs no model and writes nothing."""
    reader, _ = open_conversations(arguments)
    ready, skipped = reader.align(0, arguments.preview)
    for aligned in ready:
        tokens = label_tokens(aligned.alignment, reader.aligner.tokenizer)
        print_preview(f"Source row {aligned.source_index}", tokens)
    for entry in skipped:
        print(f"Source row {entry['row']} would be skipped: {entry['reason']}")


def extract(arguments: argparse.Namespace, folder: Path) -> None:
    """The command's work, from its checked arguments to the pushed dataset."""
    device = teacher_model.choose_device(arguments.device)
    reader, commit = open_conversations(arguments)
    if arguments.output_repo:
        try:  # what the Hub refuses, it refuses before the night and not after it
            logit_dataset.make_repository(arguments.output_repo, arguments.private)
        except HubUnreachable:
            print(f"The Hub cannot be reached now; rows go to {folder}, and are pushed at the end.", file=sys.stderr)
    print(f"Loading {arguments.model_id} on {device} …", file=sys.stderr)
    model = teacher_model.load_teacher(
        arguments.model_id,
        commit,
        arguments.gguf_file,
        arguments.dtype,
        device,
        arguments.attn_implementation,
    )
    cache_agrees = teacher_model.probe(model)
    if not cache_agrees and arguments.prefix_cache:
        print("Shared beginnings are not cached: this model's cache does not give the plain logits", file=sys.stderr)
    budget = choose_budget(model, arguments.batch_tokens, arguments.logit_memory)
    prefix_cache = arguments.prefix_cache and cache_agrees
    extraction = describe_run(arguments, reader, model, commit, budget, prefix_cache)
    logit_dataset.set_aside(folder)
    logit_dataset.write_json(folder, logit_dataset.EXTRACTION_FILE, extraction)
    tell_shards(folder, extraction, Tally())
    tally = run_shards(folder, extraction, reader, model)
    logit_dataset.drop_replaced(folder)
    print_summary(tally, folder)
    if arguments.output_repo:
        print(f"Pushed: {logit_dataset.push_folder(folder, arguments.output_repo, arguments.private)}")


def describe_run(
    arguments: argparse.Namespace, reader: Reader, model, commit: str | None, budget: Budget, prefix_cache: bool
) -> dict:
    """``extraction.json``: what is needed to decode, align and repeat the run."""
    options = vars(arguments)
    return {
        "format_version": logit_dataset.FORMAT_VERSION,
        **{name: options[name] for name in ("top_k", "top_p", "num_sampled", "seed")},
        "vocab_size": model.get_output_embeddings().weight.shape[0],
        "rows_per_shard": ROWS_PER_SHARD,
        "model_id": arguments.model_id,
        "model_revision": commit or hash_files(arguments.model_id),
        "gguf_file": arguments.gguf_file,
        "tokenizer_fingerprint": chat_alignment.tokenizer_fingerprint(reader.aligner.tokenizer),
        **{name: options[name] for name in ("dataset_id", "dataset_config", "split")},
        "dataset_revision": reader.source.revision,
        "max_samples": arguments.max_samples,
        "max_length": reader.max_length,
        "columns": reader.columns,
        "system_prompt": reader.system_prompt,
        "chat_template": reader.choice.template.text,
        "template_kwargs": reader.choice.template.kwargs,
        "template_date": reader.choice.template.date,
        "mask_source": reader.choice.mask_source,
        "skipped_token_ids": sorted(reader.aligner.skipped_ids),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "versions": {name: metadata.version(name) for name in VERSIONED},
        "batch_tokens": budget.tokens,
        "batch_logit_rows": budget.logit_rows,
        "prefix_cache": prefix_cache,
    }


def run_shards(folder: Path, extraction: dict, reader: Reader, model) -> Tally:
    """Compute and write one shard after another, with a progress bar over the conversations.

    While the model computes, one thread reads and aligns the next shard, and one encodes and writes the last batches.
    """
    tally, started = Tally(), time.monotonic()
    replaced = (folder / logit_dataset.REPLACED).exists()
    batches = Batches(model, extraction)
    bar = tqdm(total=reader.num_rows, unit=" conversations", dynamic_ncols=True, smoothing=0)
    try:
        with bar as progress, Side() as side:
            for shard, (ready, skipped) in enumerate(side.read_ahead(reader)):
                rows: list[dict] = []
                progress.update(len(skipped))
                for members, on_the_way in batches.compute(ready):
                    side.write(encode_batch, members, on_the_way, rows, tally)
                    progress.set_postfix_str(f"{batches.input_tokens / (time.monotonic() - started):,.0f} tokens/s")
                    progress.update(len(members))
                side.write(finish_shard, folder, extraction, shard, rows, skipped, tally)
            side.finish()
    except KeyboardInterrupt:
        kept = f" The run that it was to replace is in {folder / logit_dataset.REPLACED}." if replaced else ""
        print(f"Interrupted. {len(tally.shards)} finished shards are in {folder}.{kept}", file=sys.stderr)
        raise
    return tally


class Side:
    """The two threads beside the model's: one reads a shard ahead, one writes, at most ``BACKLOG`` batches behind.

    What either raises is raised in the caller at its next step. After a failure nothing more is written, so that no
    shard is finished with rows missing; after a failure to read, what was read before is.
    """

    def __enter__(self) -> "Side":
        self._reading = ThreadPoolExecutor(1, "read")
        self._writing = ThreadPoolExecutor(1, "write")
        self._backlog: deque[Future] = deque()
        self._stopped = False
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown()

    def read_ahead(self, reader: Reader) -> Iterator[tuple[list[Aligned], list[dict]]]:
        """The reader's shards in order, the next one under way."""
        upcoming = self._reading.submit(reader.align, 0, ROWS_PER_SHARD)
        for first in itertools.count(ROWS_PER_SHARD, ROWS_PER_SHARD):
            try:
                ready, skipped = upcoming.result()
            except Exception:
                self.finish()
                raise
            if not ready and not skipped:
                return
            upcoming = self._reading.submit(reader.align, first, first + ROWS_PER_SHARD)
            yield ready, skipped

    def write(self, task, *arguments) -> None:
        """Do ``task(*arguments)`` after all that was given before."""
        self._backlog.append(self._writing.submit(self._unless_stopped, task, arguments))
        while len(self._backlog) > BACKLOG or (self._backlog and self._backlog[0].done()):
            self._backlog.popleft().result()

    def finish(self) -> None:
        """Wait for all that was given."""
        while self._backlog:
            self._backlog.popleft().result()

    def _unless_stopped(self, task, arguments) -> None:
        if self._stopped:
            return
        try:
            task(*arguments)
        except BaseException:
            self._stopped = True
            raise


def encode_batch(members: list[Aligned], on_the_way: OnTheWay, rows: list[dict], tally: Tally) -> None:
    """Append a batch's stored rows to those of its shard."""
    encoded = logit_codec.encode_rows(on_the_way.wait(), [len(aligned.positions) for aligned in members])
    found = [
        {
            **columns,
            "messages": aligned.messages,
            "source_index": aligned.source_index,
            "alignment_checksum": aligned.alignment.checksum,
        }
        for aligned, columns in zip(members, encoded, strict=True)
    ]
    rows += found
    count_rows(tally, found)


def finish_shard(
    folder: Path, extraction: dict, shard: int, rows: list[dict], skipped: list[dict], tally: Tally
) -> None:
    """Write a shard's rows in the order of the source, and what the folder says about its shards."""
    first = shard * ROWS_PER_SHARD
    described = {
        "fingerprint": logit_dataset.run_fingerprint(extraction),
        "first_row": first,
        "end_row": first + len(rows) + len(skipped),
        "skipped": skipped,
    }
    rows.sort(key=lambda row: row["source_index"])
    path = logit_dataset.write_shard(folder, extraction["split"], shard, rows, described)
    tally.disk_bytes += path.stat().st_size
    tally.skipped.update(entry["reason"] for entry in skipped)
    tally.shards.append({"path": path.relative_to(folder).as_posix(), "num_rows": len(rows)})
    tell_shards(folder, extraction, tally)


def tell_shards(folder: Path, extraction: dict, tally: Tally) -> None:
    """Write what the folder says about its shards: the list, and the card."""
    logit_dataset.write_json(folder, logit_dataset.SHARDS_FILE, {"shards": tally.shards})
    card = dataset_card.render_card(extraction, logit_dataset.run_fingerprint(extraction), vars(tally))
    logit_dataset.write_text(folder, logit_dataset.CARD_FILE, card)


def count_rows(tally: Tally, rows: list[dict]) -> None:
    """Add a batch's rows to the tally."""
    for row in rows:
        tally.written += 1
        tally.tokens += row["num_tokens"]
        tally.nll -= float(row["token_log_probs"].sum(dtype=float))


def print_summary(tally: Tally, folder: Path) -> None:
    """The closing lines: what was written, what was skipped and why, how large and how likely it is."""
    mean = tally.nll / tally.tokens
    print(f"Conversations  {tally.written:,} written, {tally.skipped.total():,} skipped")
    for reason, count in tally.skipped.most_common():
        print(f"               {count:,} × {reason}")
    print(f"Tokens         {tally.tokens:,} extracted")
    print(f"Disk           {tally.disk_bytes / tally.tokens:.1f} bytes a token, {tally.disk_bytes:,} bytes in {folder}")
    print(f"Real tokens    mean NLL {mean:.4f} nats, perplexity {math.exp(mean):.2f}")
