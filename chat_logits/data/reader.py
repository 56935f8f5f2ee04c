"""Source rows as aligned conversations: everything that decides what a row becomes, before any model runs."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from chat_logits.data import alignment as chat_alignment
from chat_logits.data.config import SourceConfig
from chat_logits.data.conversations import ConversationError, choose_columns, to_conversation, to_stored
from chat_logits.data.source import SourceDataset, open_source
from chat_logits.data.templates import THREE_WAYS, PrefixError, TemplateChoice, TemplateError, choose_template
from chat_logits.data.tokenizer import refuse_wide_vocabulary, skipped_token_ids
from chat_logits.errors import ToolkitError

FIRST_CONVERSATIONS = 32  # if none of these gives a token, the run is stopped before it starts


@dataclass(frozen=True)
class Aligned:
    """A source row that is ready for the model."""

    source_index: int
    messages: list[dict]
    alignment: chat_alignment.Alignment
    positions: np.ndarray

    @property
    def input_ids(self) -> np.ndarray:
        return self.alignment.input_ids


@dataclass(frozen=True)
class Reader:
    """The rows to extract from, and how each becomes tokens; ``num_rows`` are read at most, None if unknown.

    ``tokens_a_row`` is the mean of extracted tokens over the first rows.
    """

    source: SourceDataset
    columns: dict[str, str]
    system_prompt: str | None
    choice: TemplateChoice
    aligner: chat_alignment.Aligner
    max_length: int | None
    vocab_size: int
    num_rows: int | None
    tokens_a_row: float = 0.0

    def align(self, first: int, end: int) -> tuple[list[Aligned], list[dict]]:
        """Rows ``first`` up to ``end``: those ready for the model, and those skipped as ``{"row", "reason"}``.

        Together they are fewer than asked for only where the rows end.
        """
        ready, skipped = [], []
        end = end if self.num_rows is None else min(end, self.num_rows)
        for index, row in enumerate(self.source.read(first, end), start=first):
            try:
                ready.append(self._align_row(index, row))
            except (ConversationError, TemplateError) as reason:
                skipped.append({"row": index, "reason": str(reason)})
        return ready, skipped

    def _align_row(self, index: int, row: dict) -> Aligned:
        conversation = to_conversation(row, self.columns, self.system_prompt)
        self.choice.check(conversation)
        alignment = self.aligner.align(conversation)
        if self.max_length and len(alignment.input_ids) > self.max_length:
            raise ConversationError(f"longer than {self.max_length} tokens")
        if alignment.input_ids.max(initial=0) >= self.vocab_size:
            raise ConversationError(f"a token beyond the model's {self.vocab_size} embeddings")
        positions = alignment.positions
        if not len(positions):
            raise ConversationError("no token to extract: the assistant mask is empty")
        return Aligned(index, to_stored(conversation), alignment, positions)


def open_reader(
    config: SourceConfig,
    tokenizer,
    limits,
    template_date: str | None = None,
    footers: dict | None = None,
) -> Reader:
    """Open the dataset, and prove on the first conversations that there is something to extract.

    ``limits`` has the model's ``vocab_size`` and ``positions``; ``template_date`` is today for templates that ask;
    ``footers`` are those of another process's source.
    """
    source = open_source(
        config.dataset_id, config.dataset_config, config.dataset_revision, config.split, config.streaming, footers
    )
    columns = choose_columns(source.column_names, config.messages_column, config.prompt_column, config.response_column)
    refuse_wide_vocabulary(tokenizer)
    conversations = _first_conversations(source, columns, config)
    choice = choose_template(config.chat_template, tokenizer, config.template_kwargs, template_date, conversations)
    skipped = skipped_token_ids(tokenizer, config.skip_tokens, config.keep_tokens)
    reader = Reader(
        source=source,
        columns=columns,
        system_prompt=config.system_prompt,
        choice=choice,
        aligner=chat_alignment.Aligner(tokenizer, choice.template, skipped),
        max_length=min(filter(None, (config.max_length, limits.positions)), default=None),
        vocab_size=limits.vocab_size,
        num_rows=min((n for n in (source.num_rows, config.max_samples) if n is not None), default=None),
    )
    return replace(reader, tokens_a_row=_prove(reader, conversations))


def _first_conversations(source: SourceDataset, columns: dict, config: SourceConfig) -> list[list[dict]]:
    found = []
    for row in source.read(0, FIRST_CONVERSATIONS):
        try:
            found.append(to_conversation(row, columns, config.system_prompt))
        except ConversationError:
            continue  # the run counts it
    return found


def _prove(reader: Reader, conversations: list[list[dict]]) -> float:
    """Extracted tokens a row over the first conversations.

    Raises PrefixError where the prefixes of one do not nest, ToolkitError where none has anything to extract.
    """
    for conversation in conversations:
        try:
            reader.choice.template.render(conversation)
        except PrefixError:
            raise
        except TemplateError:
            continue  # the run counts it
    ready, skipped = reader.align(0, FIRST_CONVERSATIONS)
    if not ready:
        reasons = Counter(entry["reason"] for entry in skipped).most_common(2)
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons)
        raise ToolkitError(f"nothing to extract in the first {len(skipped)} conversations ({listed}).\n{THREE_WAYS}")
    return sum(len(aligned.positions) for aligned in ready) / (len(ready) + len(skipped))
