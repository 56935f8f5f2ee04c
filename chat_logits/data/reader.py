"""Source rows as aligned conversations: all that determines a row's content before the model runs."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from chat_logits.data.alignment import Aligner, Alignment
from chat_logits.data.columns import choose_columns
from chat_logits.data.config import SourceConfig
from chat_logits.data.conversations import NO_ANSWER, ConversationError, NothingToExtract, TellOnce, to_conversation
from chat_logits.data.marks import ALL_LEFT_OUT
from chat_logits.data.remarks import Remarks
from chat_logits.data.roles import refuse_vanished, roles_named_in, words_of
from chat_logits.data.source import FIRST_ROWS, SourceDataset, open_source
from chat_logits.data.stored_messages import to_stored
from chat_logits.data.template_choice import TemplateChoice, choose_template
from chat_logits.data.templates import THREE_WAYS, PrefixError, TemplateError, template_text
from chat_logits.data.text_rows import BadRow
from chat_logits.data.tokenizer import refuse_wide_vocabulary, skipped_token_ids
from chat_logits.data.tools import refuse_vanished_tools, to_stored_tools, to_tools
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.stages import stage
from chat_logits.words import count_text
from logit_codec import MAX_TOKEN_ID

logger = logging.getLogger(__name__)

TOLD = 10  # bad rows that are named in the log
MOST_FIRST_ROWS = 4096  # searched for a row to extract, if most of the first ones are valid but not wanted
NO_MASK = "no token to extract: the assistant mask is empty"


@dataclass(frozen=True)
class Aligned:
    """A source row that is ready for the model; ``messages`` and ``tools`` have their stored form."""

    source_index: int
    messages: list[dict]
    alignment: Alignment
    positions: np.ndarray
    tools: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def input_ids(self) -> np.ndarray:
        return self.alignment.input_ids


@dataclass(frozen=True)
class Reader:
    """The source rows to extract from, and how each becomes tokens; at most ``num_rows`` are read, None if unknown.

    ``convert`` gives a source row's messages and tools, as ``to_conversation`` and ``to_tools`` do. ``first_ready`` and
    ``first_skipped`` are the first source rows, which were aligned when the reader was opened.
    """

    source: SourceDataset
    columns: dict[str, str]
    system_prompt: str | None
    convert: Callable[[dict], tuple[list[dict], list[dict] | None]]
    choice: TemplateChoice
    aligner: Aligner
    max_length: int | None
    vocab_size: int
    num_rows: int | None
    remarks: Remarks
    first_ready: list[Aligned] = field(default_factory=list)
    first_skipped: list[dict] = field(default_factory=list)
    _shown: dict[str, str | bool | None] = field(default_factory=dict, repr=False)  # roles and tools
    _told: list[int] = field(default_factory=list, repr=False)  # bad rows

    @property
    def tokens_a_row(self) -> float:
        """Mean number of extracted tokens per row, over the first source rows."""
        return sum(len(aligned.positions) for aligned in self.first_ready) / max(1, self._num_first)

    @property
    def _num_first(self) -> int:
        return len(self.first_ready) + len(self.first_skipped)

    @property
    def too_long(self) -> str:
        """The skip reason of a conversation with more tokens than ``max_length``."""
        return f"longer than {self.max_length} tokens"

    def align(self, first: int, end: int, is_proof: bool = False) -> tuple[list[Aligned], list[dict]]:
        """Source rows ``first`` up to ``end``: those ready for the model, and those skipped as ``{"row", "reason"}``;
        bad records also have a "place".

        Together they are fewer than requested only at the end of the rows. Rows whose prefixes do not nest are skipped;
        with ``is_proof`` (the first rows, which show that the dataset can be extracted) they raise PrefixError.
        """
        return self.complete(first, end, *self.align_rows(*self.read(first, end), is_proof))

    def read(self, first: int, end: int) -> tuple[int, list[dict | BadRow]]:
        """Those of the source rows ``first`` up to ``end`` that were not aligned when the reader was opened: the number
        of the first one, and the rows, fewer at the end of the source."""
        first, end = max(first, self._num_first), end if self.num_rows is None else min(end, self.num_rows)
        return first, self.source.read(first, end)

    def complete(
        self, first: int, end: int, ready: list[Aligned], skipped: list[dict]
    ) -> tuple[list[Aligned], list[dict]]:
        """The result of ``align``, from that of ``align_rows`` for the rows that ``read`` gave."""
        self.remarks.tell(ready)
        end = end if self.num_rows is None else min(end, self.num_rows)
        at_first = [aligned for aligned in self.first_ready if first <= aligned.source_index < end]
        skipped_at_first = [entry for entry in self.first_skipped if first <= entry["row"] < end]
        return at_first + ready, skipped_at_first + self._placed(skipped)

    def align_rows(self, first: int, rows: list, is_proof: bool = False) -> tuple[list[Aligned], list[dict]]:
        """As ``align``, for the source's ``rows`` from ``first`` on; their texts are tokenized together.

        This does not use the source itself, so bad records do not have a place yet.
        """
        template, stored, rendered, skipped = self.choice.template, {}, {}, []
        for index, row in enumerate(rows, start=first):
            try:
                conversation, tools = self.convert(_readable(row))
                text, spans = self.choice.render(conversation, tools)
                refuse_vanished(conversation, tools, text, template, self._shown)
                refuse_vanished_tools(conversation, tools, text, template, self._shown)
                rendered[index] = self.aligner.marked(conversation, text, spans)
                remarks = self.remarks.on(conversation, text)
                stored[index] = to_stored(conversation), to_stored_tools(tools), remarks
            except (ConversationError, TemplateError) as error:
                if isinstance(error, PrefixError) and is_proof:
                    raise
                is_bad = isinstance(error, ConversationError) and not isinstance(error, NothingToExtract)
                skipped.append({"row": index, "reason": str(error)} | ({"place": None} if is_bad else {}))
        ready = []
        for index, alignment in zip(rendered, self.aligner.align_rendered(list(rendered.values())), strict=True):
            if reason := self._refuse(alignment):
                skipped.append({"row": index, "reason": reason})
            else:
                messages, definitions, remarks = stored[index]
                ready.append(Aligned(index, messages, alignment, alignment.positions, definitions, remarks))
        return ready, sorted(skipped, key=lambda entry: entry["row"])

    def _placed(self, skipped: list[dict]) -> list[dict]:
        """The entries of skipped source rows, with the places of bad records filled in."""
        return [self.bad_row(entry["row"], entry["reason"]) if "place" in entry else entry for entry in skipped]

    def bad_row(self, row: int, reason: str) -> dict:
        """The entry of a skipped source row that is a bad record, with its place. The first ones are logged."""
        place = self.source.place(row)
        self._told.append(row)
        if len(self._told) <= TOLD:
            logger.warning("Skipped: %s: %s", place, reason)
        if len(self._told) == TOLD:
            logger.warning("Further bad rows are counted, but named only in the shards")
        return {"row": row, "reason": reason, "place": place}

    def _refuse(self, alignment: Alignment) -> str | None:
        """Why an aligned conversation is skipped, None if it is not."""
        if self.max_length and len(alignment.input_ids) > self.max_length:
            return self.too_long
        if alignment.input_ids.max(initial=0) >= self.vocab_size:
            return f"a token beyond the model's {self.vocab_size} embeddings"
        return None if len(alignment.positions) else NO_MASK


def open_reader(
    config: SourceConfig, tokenizer, limits, template_date: str | None = None, footers: dict | None = None
) -> Reader:
    """Open the dataset, and check on the first conversations that there is something to extract.

    ``limits`` has the model's ``vocab_size`` and ``positions``; ``template_date`` is the date given to templates that
    ask for today's; ``footers`` are those of another process's source.
    """
    source, columns = _open_source(config, footers)
    _refuse_two_sets_of_tools(config, columns)
    refuse_wide_vocabulary(tokenizer)
    _tell_unstored_ids(limits.vocab_size)
    with stage("Choosing the chat template on the first conversations"):
        convert = _converter(source, columns, config, tokenizer)
        talks = _first_conversations(source, convert)
        choice = choose_template(config.chat_template, tokenizer, config.template_kwargs, template_date, *talks)
    skipped = skipped_token_ids(tokenizer, config.skip_tokens, config.keep_tokens)
    reader = Reader(
        source=source,
        columns=columns,
        system_prompt=config.system_prompt,
        convert=convert,
        choice=choice,
        aligner=Aligner(tokenizer, choice.template, skipped, config.all_turns, config.keep_end_of_turn),
        max_length=_least(config.max_length or None, limits.positions or None),
        vocab_size=limits.vocab_size,
        num_rows=_least(source.num_rows, config.max_samples),
        remarks=Remarks(tokenizer),
    )
    with stage("Aligning the first conversations"):
        return _proven(reader, limits.positions)


def _open_source(config: SourceConfig, footers: dict | None) -> tuple[SourceDataset, dict[str, str]]:
    """The source, and its columns by role; columns that are not read are logged."""
    choose = partial(
        choose_columns,
        messages=config.messages_column,
        prompt=config.prompt_column,
        response=config.response_column,
        tools=config.tools_column,
    )
    with stage("Opening the dataset"):
        source = open_source(
            config.dataset_id,
            config.dataset_config,
            config.dataset_revision,
            config.split,
            config.streaming,
            footers,
            needed=lambda names: choose(names).values(),
        )
    columns = choose(source.column_names, first_rows=source.first_rows)
    if unread := [name for name in source.column_names if name not in columns.values()]:
        logger.info("Columns: %s; not read: %s", ", ".join(columns.values()), ", ".join(unread))
    return source, columns


def _refuse_two_sets_of_tools(config: SourceConfig, columns: dict[str, str]) -> None:
    """Raise UsageError if both the option and a column have tools."""
    if "tools" in columns and "tools" in config.template_kwargs:
        raise UsageError(
            f"`template_kwargs`: it has tools, and so has the column {columns['tools']!r}; for those of the option "
            "alone, leave the column out: `tools_column` ''"
        )


def _tell_unstored_ids(vocab_size: int) -> None:
    """Log which ids of a large vocabulary cannot be stored."""
    if vocab_size > MAX_TOKEN_ID:
        logger.info(
            "Token ids from %s on (of %s) cannot be stored; only special tokens, if any, have such ids. Their "
            "probability is counted in the tail.",
            f"{MAX_TOKEN_ID:,}",
            f"{vocab_size:,}",
        )


def _least(*limits: int | None) -> int | None:
    """The smallest of the limits that are not None; None without any."""
    return min((limit for limit in limits if limit is not None), default=None)


def _converter(
    source: SourceDataset, columns: dict[str, str], config: SourceConfig, tokenizer
) -> Callable[[dict], tuple[list[dict], list[dict] | None]]:
    """``to_conversation`` and ``to_tools`` for the rows of this source and the roles of a tokenizer's template."""
    features = source.rows.features or {}
    texts = {template_text(config.chat_template, tokenizer, has_tools) for has_tools in (False, True)}
    to_messages = partial(
        to_conversation,
        columns=columns,
        system_prompt=config.system_prompt,
        template_roles=frozenset().union(*map(roles_named_in, texts)),
        number_columns=source.number_columns & set(columns.values()),
        has_arrow_nulls=source.has_arrow_nulls,
        features=features,
        template_words=frozenset().union(*map(words_of, texts)),
        tell=TellOnce(),
    )
    name = columns.get("tools")
    its_tools = partial(to_tools, has_arrow_nulls=source.has_arrow_nulls, feature=features.get(name) if name else None)
    return partial(_convert, to_messages, its_tools, name)


def _convert(
    to_messages: Callable[[dict], list[dict]], its_tools: Callable[..., list[dict] | None], name: str | None, row: dict
) -> tuple[list[dict], list[dict] | None]:
    return to_messages(row), its_tools(row.get(name)) if name else None


def _readable(row: dict | BadRow) -> dict:
    """The row. Raises ConversationError if the source could not read it."""
    if isinstance(row, BadRow):
        raise ConversationError(row.reason)
    return row


def _first_conversations(source: SourceDataset, convert: Callable) -> tuple[list[list[dict]], list[list[dict] | None]]:
    """Messages and tools of the first rows that are conversations."""
    conversations, their_tools = [], []
    for row in source.first_rows:
        try:
            conversation, tools = convert(_readable(row))
        except ConversationError:
            continue  # the run will count it
        conversations.append(conversation)
        their_tools.append(tools)
    return conversations, their_tools


def _proven(reader: Reader, positions: int | None) -> Reader:
    """The reader with its first source rows, aligned: ``FIRST_ROWS``, or more while most are valid but not wanted.

    ``positions`` are the model's. Raises PrefixError if the prefixes of a row do not nest, ToolkitError if no row has
    anything to extract.
    """
    ready, skipped = reader.align(0, FIRST_ROWS, is_proof=True)
    while not ready and len(skipped) < MOST_FIRST_ROWS and _are_mostly_unwanted(reader, skipped):
        first = len(skipped)
        if first == FIRST_ROWS:
            logger.info("None of the first %d rows is wanted (%s): looking further", first, _listed(skipped))
        ready, more = reader.align(first, first + FIRST_ROWS, is_proof=True)
        skipped += more
        if not ready and not more:
            break
    if not ready:
        raise _nothing_to_extract(reader, skipped, positions)
    if reader.aligner.keep_end_of_turn and not any(one.alignment.turn_ends for one in ready):
        raise UsageError(
            f"`keep_end_of_turn`: no special token ends an answer of the first {len(ready)} conversations; expected "
            "one within its turn, or right after it. Leave the option out."
        )
    return replace(reader, first_ready=ready, first_skipped=skipped)


def _are_mostly_unwanted(reader: Reader, skipped: list[dict]) -> bool:
    """Whether more than half of them are too long, or have no answer that is to be extracted; the dataset is not
    refused for such rows."""
    unwanted = {reader.too_long, NO_ANSWER, ALL_LEFT_OUT}
    return sum(entry["reason"] in unwanted for entry in skipped) > len(skipped) / 2


def _nothing_to_extract(reader: Reader, skipped: list[dict], positions: int | None) -> ToolkitError:
    """The error if all of the first rows are skipped, with advice for the reasons."""
    reasons, advice = {entry["reason"] for entry in skipped}, ""
    if NO_MASK in reasons:
        advice += f"\n{THREE_WAYS}"
    if reader.too_long in reasons and reader.max_length == positions:
        advice += f"\nThe model has {positions} positions; expected conversations that fit into them."
    elif reader.too_long in reasons:
        advice += "\nA larger `max_length` includes those that are too long."
    if "tools" in reader.columns and any(reason.startswith("tools") for reason in reasons):
        advice += f"\nWithout the tools of the column {reader.columns['tools']!r}: `tools_column` ''."
    first = count_text(len(skipped), "conversation")
    return ToolkitError(f"nothing to extract in the first {first} ({_listed(skipped)}).{advice}")


def _listed(skipped: list[dict]) -> str:
    """The two most frequent reasons, with their counts."""
    reasons = Counter(entry["reason"] for entry in skipped).most_common(2)
    return "; ".join(f"{count:,} × {reason}" for reason, count in reasons)
