"""The options of ``extract_logits.py``: those of ``ExtractConfig``, and a few of the command's own."""

import logging
from dataclasses import dataclass

from chat_logits.cli.command_line import called_as
from chat_logits.cli.config_file import read_config_file
from chat_logits.cli.parser import CommandParser, CommonOptions, command_words, read_options, refuse_missing
from chat_logits.extraction.config import ExtractConfig
from chat_logits.options import COMPUTED, EXTRACTED, READ, SPREAD, WRITTEN, option, options_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class ExtractOptions(CommonOptions):
    """The options of the command that are no part of a run."""

    config: str | None = option(
        None,
        help="YAML file with any of these options by name, such as top_k: 64; those given here win",
        unset="none",
        metavar="FILE",
    )
    preview: int | None = option(
        None,
        help="print N conversations as they would be extracted, run no model, write nothing",
        unset="off",
        group=EXTRACTED,
        metavar="N",
        least=1,
        example="2",
    )


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
    chosen = read_options(ExtractConfig, given)
    in_file = read_config_file(options.config, ExtractConfig) if options.config else {}
    against = [
        f"`{name}` {chosen[name]} (line {entry.line} has {entry.value})"
        for name, entry in in_file.items()
        if name in chosen and chosen[name] != entry.value
    ]
    if against:
        logger.info("The command line wins over %s: %s", options.config, ", ".join(against))
    values = {name: entry.value for name, entry in in_file.items()} | chosen
    refuse_missing(ExtractConfig, values)
    return ExtractConfig(**values)


def config_words(config: ExtractConfig) -> list[str]:
    """The options, as words of a command line, that give this config."""
    options = options_of(ExtractConfig)
    return [word for name, value in config.chosen().items() for word in command_words(options[name], value)]
