"""The run: shards of source rows through the model into files, with progress on the way and a summary at the end."""

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

import chat_alignment
import dataset_card
import logit_codec
import logit_dataset
import teacher_model
from batching import plan_batches
from content_hash import hash_files
from conversation_reader import Aligned, Reader, open_reader
from errors import UsageError
from hub_access import HubUnreachable, resolve_commit
from token_analysis import label_tokens
from token_report import print_preview

ROWS_PER_SHARD = 256
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "numpy", "pyarrow")


@dataclass
class Tally:
    """What a run has done so far."""

    written: int = 0
    tokens: int = 0
    input_tokens: int = 0
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
    teacher_model.probe(model)
    extraction = describe_run(arguments, reader, model, commit)
    logit_dataset.set_aside(folder)
    logit_dataset.write_json(folder, logit_dataset.EXTRACTION_FILE, extraction)
    logit_dataset.write_json(folder, logit_dataset.SHARDS_FILE, {"shards": []})
    logit_dataset.write_text(folder, logit_dataset.CARD_FILE, dataset_card.render_card(extraction))
    tally = run_shards(folder, extraction, reader, model)
    logit_dataset.write_text(folder, logit_dataset.CARD_FILE, dataset_card.render_card(extraction, vars(tally)))
    logit_dataset.drop_replaced(folder)
    print_summary(tally, folder)
    if arguments.output_repo:
        print(f"Pushed: {logit_dataset.push_folder(folder, arguments.output_repo, arguments.private)}")


def describe_run(arguments: argparse.Namespace, reader: Reader, model, commit: str | None) -> dict:
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
        "batch_tokens": arguments.batch_tokens,
    }


def run_shards(folder: Path, extraction: dict, reader: Reader, model) -> Tally:
    """Compute and write one shard after another, with a progress bar over the conversations."""
    tally, started = Tally(), time.monotonic()
    replaced = (folder / logit_dataset.REPLACED).exists()
    with tqdm(total=reader.num_rows, unit=" conversations", dynamic_ncols=True) as progress:
        try:
            for shard in itertools.count():
                ready, skipped = reader.align(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
                if not ready and not skipped:
                    break
                progress.update(len(skipped))
                rows = []
                for batch_rows, input_tokens in encode_batches(ready, extraction, model):
                    rows += batch_rows
                    count_rows(tally, batch_rows, input_tokens)
                    progress.set_postfix_str(f"{tally.input_tokens / (time.monotonic() - started):,.0f} tokens/s")
                    progress.update(len(batch_rows))
                finish_shard(folder, extraction, shard, rows, skipped, tally)
        except KeyboardInterrupt:
            kept = f" The run that it was to replace is in {folder / logit_dataset.REPLACED}." if replaced else ""
            progress.write(f"Interrupted. {len(tally.shards)} finished shards are in {folder}.{kept}", file=sys.stderr)
            raise
    return tally


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
    rows = sorted(rows, key=lambda row: row["source_index"])
    path = logit_dataset.write_shard(folder, extraction["split"], shard, rows, described)
    tally.disk_bytes += path.stat().st_size
    tally.skipped.update(entry["reason"] for entry in skipped)
    tally.shards.append({"path": path.relative_to(folder).as_posix(), "num_rows": len(rows)})
    logit_dataset.write_json(folder, logit_dataset.SHARDS_FILE, {"shards": tally.shards})


def encode_batches(ready: list[Aligned], extraction: dict, model) -> Iterator[tuple[list[dict], int]]:
    """The stored rows of a batch of conversations and the tokens the model read for it, batch after batch."""
    lengths = [len(aligned.alignment.input_ids) for aligned in ready]
    for batch in plan_batches(lengths, extraction["batch_tokens"]):
        members = [ready[i] for i in batch]
        requests = [_request(aligned, extraction["seed"]) for aligned in members]
        sizes = [extraction[key] for key in ("top_k", "top_p", "num_sampled")]
        found = teacher_model.distributions(model, requests, *sizes)
        encoded = logit_codec.encode_rows(found, [len(request.positions) for request in requests])
        rows = [_stored_row(aligned, columns) for aligned, columns in zip(members, encoded, strict=True)]
        yield rows, sum(lengths[i] for i in batch)


def _request(aligned: Aligned, seed: int):
    positions = aligned.alignment.positions
    uniforms = logit_codec.draw_uniforms(seed, aligned.source_index, len(positions))
    return teacher_model.Request(aligned.alignment.input_ids, positions, uniforms)


def _stored_row(aligned: Aligned, columns: dict) -> dict:
    return {
        **columns,
        "messages": aligned.messages,
        "source_index": aligned.source_index,
        "alignment_checksum": aligned.alignment.checksum,
    }


def count_rows(tally: Tally, rows: list[dict], input_tokens: int) -> None:
    """Add a batch's rows to the tally."""
    tally.input_tokens += input_tokens
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
