"""Source rows as aligned conversations: everything that decides what a row becomes, before any model runs."""

import argparse
from collections import Counter
from dataclasses import dataclass

import chat_alignment
from conversations import ConversationError, detect_columns, to_conversation
from errors import ToolkitError
from source_dataset import SourceDataset, open_source

FIRST_CONVERSATIONS = 32  # if none of these gives a token, the run is stopped before it starts


@dataclass(frozen=True)
class Aligned:
    """A source row that is ready for the model."""

    source_index: int
    conversation: list[dict]
    alignment: chat_alignment.Alignment


@dataclass(frozen=True)
class Reader:
    """The rows to extract from, and how each becomes tokens; ``num_rows`` of them are read."""

    source: SourceDataset
    columns: dict[str, str]
    tokenizer: object
    chat_format: chat_alignment.ChatFormat
    max_length: int | None
    num_rows: int

    def align(self, first: int, end: int) -> tuple[list[Aligned], list[dict]]:
        """Rows ``first`` up to ``end``: those ready for the model, and those skipped as ``{"row", "reason"}``."""
        ready, skipped = [], []
        for index, row in zip(range(first, end), self.source.rows.select(range(first, end)), strict=True):
            try:
                ready.append(self._align_row(index, row))
            except (ConversationError, chat_alignment.AlignmentError) as reason:
                skipped.append({"row": index, "reason": str(reason)})
        return ready, skipped

    def _align_row(self, index: int, row: dict) -> Aligned:
        conversation = to_conversation(row, self.columns)
        alignment = chat_alignment.align_conversation(conversation, self.tokenizer, self.chat_format)
        if self.max_length and len(alignment.input_ids) > self.max_length:
            raise ConversationError(f"longer than {self.max_length} tokens")
        if not len(alignment.positions):
            raise ConversationError("no token to extract: the assistant mask is empty")
        return Aligned(index, conversation, alignment)


def open_reader(arguments: argparse.Namespace, model_commit: str | None, positions: int | None) -> Reader:
    """Open dataset and tokenizer, and prove on the first conversations that there is something to extract."""
    source = open_source(arguments.dataset_id, arguments.dataset_config, arguments.dataset_revision, arguments.split)
    tokenizer = chat_alignment.load_tokenizer(arguments.model_id, model_commit, arguments.gguf_file)
    chat_alignment.refuse_wide_vocabulary(tokenizer)
    template = chat_alignment.choose_template(arguments.chat_template, tokenizer)
    reader = Reader(
        source=source,
        columns=detect_columns(source.rows.column_names),
        tokenizer=tokenizer,
        chat_format=chat_alignment.ChatFormat(
            template=template,
            skipped_token_ids=frozenset(chat_alignment.default_skipped_token_ids(tokenizer)),
            template_kwargs={},
            template_date=chat_alignment.todays_date(template),
        ),
        max_length=min(filter(None, (arguments.max_length, positions)), default=None),
        num_rows=min(len(source.rows), arguments.max_samples or len(source.rows)),
    )
    ready, skipped = reader.align(0, min(FIRST_CONVERSATIONS, reader.num_rows))
    if not ready:
        reasons = _list_reasons(Counter(entry["reason"] for entry in skipped))
        raise ToolkitError(f"nothing to extract in the first {len(skipped)} conversations ({reasons}).")
    return reader


def _list_reasons(reasons: Counter) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
