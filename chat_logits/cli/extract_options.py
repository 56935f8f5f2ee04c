"""The options of ``extract_logits.py``: those of ``ExtractConfig``, and a few of the command itself."""

import logging
from dataclasses import dataclass

from chat_logits.cli.command_line import called_as
from chat_logits.cli.config_file import read_config_file
from chat_logits.cli.parser import CommandParser, CommonOptions, command_words, read_options, refuse_missing
from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.model.cards import CARDS, DEFAULT_CARD, card_named
from chat_logits.model.config import ModelConfig
from chat_logits.options import COMPUTED, EXTRACTED, READ, SPREAD, WRITTEN, option, options_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class ExtractOptions(CommonOptions):
    """The options of the command that are not part of a run."""

    config: str | None = option(
        None,
        help="YAML file with a run's options by name, such as top_k: 64; those given here win",
        unset="none",
        metavar="FILE",
    )
    preview: int | None = option(
        None,
        help="print N conversations as they would be extracted; run no model, write nothing",
        unset="off",
        group=EXTRACTED,
        metavar="N",
        least=1,
        example="2",
    )
    plan: bool = option(
        False,
        help="print what the run would need and take: bytes on a card, cards, tokens, bytes of output, hours; load no "
        "weights, write nothing; without a dataset, only the model's part",
        unset="off",
        group=COMPUTED,
    )
    plan_for: str | None = option(
        None,
        help=f"with a plan, the card: {', '.join(CARDS)}, or its memory such as 80GiB",
        unset=f"the accelerator here; if there is none, {DEFAULT_CARD}",
        group=COMPUTED,
        metavar="CARD",
        check_value=card_named,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan_for is not None and not self.plan:
            raise UsageError(f"`plan_for` {self.plan_for}: it goes with `plan`")
        if self.plan and self.preview is not None:
            raise UsageError("`plan` and `preview`: one at a time")


KINDS = (ExtractConfig, ExtractOptions)


def build_parser() -> CommandParser:
    """The parser of all options."""
    return CommandParser(
        [one for kind in KINDS for one in options_of(kind).values()],
        groups=(READ, EXTRACTED, WRITTEN, SPREAD, COMPUTED),
        prog=called_as("extract_logits.py"),
        description="Store a chat model's token log-probabilities for every assistant token of a chat dataset.",
    )


def read_config(options: ExtractOptions, given: dict) -> ExtractConfig:
    """The run that command line and config file describe together. Raises UsageError."""
    values = _read_values(options, given)
    refuse_missing(ExtractConfig, values)
    return ExtractConfig(**values)


def read_plan_config(options: ExtractOptions, given: dict) -> ModelConfig:
    """As ``read_config``, but only the model's options if no dataset is named."""
    values = _read_values(options, given)
    if "dataset_id" in values:
        refuse_missing(ExtractConfig, values)
        return ExtractConfig(**values)
    refuse_missing(ModelConfig, values)
    of_model = {name: value for name, value in values.items() if name in options_of(ModelConfig)}
    if without := ", ".join(f"`{name}`" for name in values if name not in of_model):
        logger.warning("No `dataset_id`: the plan is only the model's part, without %s", without)
    return ModelConfig(**of_model)


def _read_values(options: ExtractOptions, given: dict) -> dict:
    chosen = read_options(ExtractConfig, given)
    in_file = read_config_file(options.config, ExtractConfig) if options.config else {}
    against = [
        f"`{name}` {chosen[name]} (line {entry.line} has {entry.value})"
        for name, entry in in_file.items()
        if name in chosen and chosen[name] != entry.value
    ]
    if against:
        logger.info("The command line wins over %s: %s", options.config, ", ".join(against))
    return {name: entry.value for name, entry in in_file.items()} | chosen


def config_words(config: ExtractConfig) -> list[str]:
    """The words of a command line that give this config."""
    options = options_of(ExtractConfig)
    return [word for name, value in config.chosen().items() for word in command_words(options[name], value)]
