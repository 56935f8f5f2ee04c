"""Options of this room: what is read, and how it becomes tokens."""

import json
from dataclasses import dataclass
from datetime import date

from chat_logits.data.templates import RESERVED_KWARGS
from chat_logits.errors import UsageError
from chat_logits.options import EXTRACTED, READ, Config, option


def _check_kwargs(kwargs: dict) -> None:
    if RESERVED_KWARGS & set(kwargs):
        raise UsageError(f"`template_kwargs`: expected a JSON object without {', '.join(sorted(RESERVED_KWARGS))}")
    for name, value in kwargs.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            in_yaml = "; in YAML, a date is text in quotes" if isinstance(value, date) else ""
            raise UsageError(f"`template_kwargs`: {name}: {error}, expected what JSON has{in_yaml}") from error


@dataclass(frozen=True, repr=False)
class SourceConfig(Config):
    """A chat dataset, and the template that renders its conversations."""

    dataset_id: str = option(
        help="the chat dataset: a Hub id, a folder, or a .jsonl, .json, .parquet or .csv file",
        group=READ,
        metavar="ID",
        example="chats.jsonl",
    )
    dataset_config: str | None = option(
        None, help="configuration of the dataset", unset="its only one", group=READ, metavar="NAME"
    )
    dataset_revision: str | None = option(
        None, help="branch, tag or commit of a Hub dataset", unset="its main branch", group=READ, metavar="REV"
    )
    split: str = option("train", help="split to read", group=READ, metavar="NAME")
    streaming: bool = option(
        False, help="read a dataset too large for the disk source row by source row", unset="off", group=READ
    )
    messages_column: str | None = option(
        None, help="column with the list of messages", unset="found by its name", group=READ, metavar="NAME"
    )
    prompt_column: str | None = option(
        None, help="column with the question, or messages", unset="found by its name", group=READ, metavar="NAME"
    )
    response_column: str | None = option(
        None, help="column with the answer, or messages", unset="found by its name", group=READ, metavar="NAME"
    )
    tools_column: str | None = option(
        None,
        help="column with the tools of each conversation, or '' for none",
        unset="found by its name",
        group=READ,
        metavar="NAME",
    )
    system_prompt: str | None = option(
        None, help="system message for conversations without one", unset="none", group=READ, metavar="TEXT"
    )
    max_samples: int | None = option(
        None,
        help="read the first N source rows only",
        unset="all",
        group=READ,
        metavar="N",
        least=1,
        example="1000",
    )
    max_length: int | None = option(
        None,
        help="skip conversations of more tokens; nothing is truncated",
        unset="the model's positions",
        group=READ,
        metavar="TOKENS",
        least=2,
    )
    chat_template: str | None = option(
        None,
        help="Jinja chat template: a file, the text, or the name of a shipped one",
        unset="the model's own",
        group=EXTRACTED,
        metavar="FILE_OR_TEXT",
        example="templates/qwen2_5.jinja",
    )
    template_kwargs: dict = option(
        {},
        help="variables for the template, such as '{\"enable_thinking\": false}' or tools",
        unset="none",
        group=EXTRACTED,
        metavar="JSON",
        check_value=_check_kwargs,
    )
    all_turns: bool = option(
        False,
        help="extract answers marked not to be trained on (weight 0, train or loss false) too",
        unset="they are left out",
        group=EXTRACTED,
    )
    keep_end_of_turn: bool = option(
        False,
        help="extract what ends an answer too, so that a student learns from the teacher when to stop",
        unset="it is skipped, as special tokens are",
        group=EXTRACTED,
    )
    skip_tokens: tuple[str, ...] = option(
        (),
        help="do not extract these tokens of answers either",
        unset="special tokens and think tags",
        group=EXTRACTED,
        metavar="TOKEN",
    )
    keep_tokens: tuple[str, ...] = option(
        (),
        help="extract these, although they are special tokens or think tags",
        unset="none",
        group=EXTRACTED,
        metavar="TOKEN",
    )
