"""Command lines from options: both spellings, ``--top_k`` and ``--top-k``, and mistakes reported in a line or two."""

import argparse
import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from chat_logits.errors import UsageError
from chat_logits.options import Config, Option, option, options_of

HELP_ALL = "help_all"
NO = "no_"  # prefix that turns a switch off, for example one that a config file turns on


@dataclass(frozen=True, repr=False)
class CommonOptions(Config):
    """Options of every command."""

    log_level: str = option(
        "info",
        help="what is logged to standard error, in addition to the results",
        choices=("debug", "info", "warning", "error"),
    )
    debug: bool = option(False, help="show the traceback of an error", unset="its message")


@dataclass(frozen=True, repr=False)
class RebuildOptions(CommonOptions):
    """Options of the commands that rebuild the tokens of stored rows."""

    chat_template: str | None = option(
        None,
        help="template to rebuild the tokens with; must give the tokens that were extracted from",
        unset="the recorded one",
        metavar="FILE_OR_TEXT",
    )
    tokenizer_id: str | None = option(
        None,
        help="folder or Hub id of the tokenizer, if the recorded model is not available",
        unset="the recorded model",
        metavar="ID",
    )
    revision: str | None = option(
        None, help="branch, tag or commit of a Hub dataset", unset="its main branch", metavar="REV"
    )
    trust_remote_code: bool = option(
        False, help="run Python code that comes with the tokenizer or model", unset="refuse"
    )


class CommandParser(argparse.ArgumentParser):
    """Parses the ``options`` of a command into those that were given, as text. Raises UsageError.

    ``groups`` are the headings of the help, in order. An argument without an option name is the value of
    ``positional``. ``--help`` shows the basic options with an example each, ``--help_all`` all options.
    """

    def __init__(self, options: Iterable[Option], groups: Iterable[str] = (), positional: str = "", **about: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, **about)
        self._positional = positional
        self._names = {"help", HELP_ALL}
        self._advanced: list[argparse.Action] = []
        self.add_argument("-h", "--help", action="help", help="show the basic options")
        shown_whole: dict[str, Any] = {"action": _WholeHelp, "nargs": 0, "dest": HELP_ALL, "help": "show all options"}
        self.add_argument(f"--{HELP_ALL}", **shown_whole)
        sections = {name: self.add_argument_group(name) for name in groups}
        options = list(options)
        self._count = len(options)
        last = (options_of(RebuildOptions), options_of(CommonOptions))
        for one in sorted(options, key=lambda one: sum(not one.group and one.name in names for names in last)):
            self._add(sections.get(one.group, self), one)

    def _add(self, section: argparse._ActionsContainer, one: Option) -> None:
        def add(*names: str, **about: Any) -> None:
            action = section.add_argument(*names, **about)
            if not one.is_basic:
                self._advanced.append(action)

        example = f"; e.g. {example_of(one)}" if one.is_basic else ""
        help_text = f"{one.full_help}{example}".replace("%", "%%")
        self._names.add(one.name)
        if one.kind is bool:
            self._names.add(NO + one.name)
            on, off = (f"--{one.name}", f"--{NO}{one.name}")
            helps = (argparse.SUPPRESS, f"do not {help_text}") if one.default else (help_text, argparse.SUPPRESS)
            add(on, dest=one.name, action="store_const", const=True, help=helps[0])
            add(off, dest=one.name, action="store_const", const=False, help=helps[1])
            return
        more: dict[str, Any] = {"nargs": one.count or "+"} if one.kind is tuple else {}
        metavar = one.metavar or (f"{{{','.join(one.choices)}}}" if one.choices else None)
        parts = tuple(one.metavar.split()) if one.count else metavar
        add(f"--{one.name}", help=help_text, metavar=parts, **more)

    def format_help(self, is_whole: bool = False) -> str:
        """The help for the basic options, or for all of them."""
        helps = {action: action.help for action in self._advanced}
        for action in () if is_whole else self._advanced:
            action.help = argparse.SUPPRESS
        try:
            more = "" if is_whole else f"\n--{HELP_ALL} shows all {self._count} options.\n"
            return super().format_help() + more
        finally:
            for action, text in helps.items():
                action.help = text

    def given(self, argv: list[str]) -> dict[str, str | list[str] | bool]:
        """The options on a command line, by name, with their values as they are written there."""
        argv = self._with_underscores(argv)
        known, rest = self.parse_known_args(argv)
        given = vars(known)
        if rest and self._positional and self._positional not in given:
            given[self._positional] = rest.pop(0)
        if rest:
            raise UsageError(f"{rest[0]}: unexpected; every value follows the name of its option")
        return given

    def _with_underscores(self, argv: list[str]) -> list[str]:
        """The words with option names spelled as in the help. Raises UsageError for an unknown name."""
        end = argv.index("--") if "--" in argv else len(argv)
        return [self._with_underscore(word) for word in argv[:end]] + argv[end:]

    def _with_underscore(self, word: str) -> str:
        (dashes, name, value), *_ = re.findall(r"^(-{0,2})([^=]*)(.*)$", word, re.S)
        spelled = name.replace("-", "_")
        if dashes == "--" and spelled in self._names:
            return f"--{spelled}{value}"
        if not dashes or not name or " " in word or word == "-h" or re.fullmatch(r"-\d*\.?\d+", word):
            return word  # for argparse, a value
        near = difflib.get_close_matches(spelled, self._names, 1)
        meant = f"; did you mean --{near[0]}?" if near else f"; --{HELP_ALL} lists them"
        raise UsageError(f"{dashes}{name}: no such option{meant}")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing argparse's usage page."""
        message = re.sub(r"^argument (-\S+): ", r"\1: ", message)
        raise UsageError(re.sub(r"ignored explicit argument (.*)", r"expected no value, found \1", message))


def example_of(one: Option) -> str:
    """A basic option as it may be typed.

    >>> example_of(Option("top_k", int, 64, "", example="8"))
    '--top_k 8'
    """
    return f"--{one.name} {one.example or ''}".rstrip()


class _WholeHelp(argparse.Action):
    """Prints the help for all options and ends the command, as ``--help`` does for the basic ones."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, CommandParser)
        print(parser.format_help(is_whole=True), end="")
        parser.exit()


def read_options(kind: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that belong to this config, with checked values."""
    return {name: one.read(given[name]) for name, one in options_of(kind).items() if name in given}


def refuse_missing(kind: type[Config], values: dict[str, Any]) -> None:
    """Raise UsageError if a required option of the config has no value."""
    missing = [f"`{name}`" for name, one in options_of(kind).items() if one.is_required and name not in values]
    if missing:
        raise UsageError(f"required: {', '.join(missing)}")


def command_words(option: Option, value: Any) -> list[str]:
    """The words of a command line that give an option this value.

    >>> command_words(Option("top_k", int, 64, ""), 8)
    ['--top_k', '8']
    >>> command_words(Option("max_bad_rows", float, 0.01, ""), 30.0)
    ['--max_bad_rows', '30']
    """
    if option.kind is bool:
        return [f"--{option.name}" if value else f"--{NO}{option.name}"]
    if option.kind is tuple:
        return [f"--{option.name}", *value]
    if option.kind is float and float(value).is_integer():
        value = int(value)
    text = json.dumps(value, ensure_ascii=False) if option.kind is dict else str(value)
    return [f"--{option.name}={text}"] if text.startswith("-") else [f"--{option.name}", text]


def as_typed(text: str, kinds: Iterable[type[Config]]) -> str:
    """A message in which options in backquotes are replaced by the form that is typed on the command line.

    >>> as_typed("`debug` or `nothing`", [CommonOptions])
    '--debug or `nothing`'
    """
    options = {name: one for kind in kinds for name, one in options_of(kind).items()}

    def typed(match: re.Match) -> str:
        one = options.get(match[1])
        return match[0] if one is None else f"--{NO * (one.kind is bool and one.default is True)}{one.name}"

    return re.sub(r"`(\w+)`", typed, text)
