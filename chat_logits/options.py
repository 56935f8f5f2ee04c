"""Options, each defined in one place: a dataclass field with its type, default, range and one-line help.

The command line, config files, checks and docs are made from these. Messages name an option in backquotes, as in
"`top_k` 0: expected 1 or more"; the commands print it as it is typed there.
"""

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from chat_logits.errors import UsageError
from chat_logits.paths import expanded

PLACES = ("ID", "FOLDER")  # metavars of options that may be a folder
READ, EXTRACTED, WRITTEN = "what is read", "what is extracted", "what is written"
SPREAD, COMPUTED = "more than one accelerator", "how it is computed"
KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
    dict: "a JSON object",
}


@dataclass(frozen=True)
class Option:
    """One option of a config: its name, its ``kind`` (a key of ``KINDS``), its default, and the limits of its values.

    ``unset`` describes the default in the help if the value itself does not.
    """

    name: str
    kind: type
    default: Any  # dataclasses.MISSING if the option is required
    help: str
    unset: str = ""
    group: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    check_value: Callable[[Any], None] | None = None
    count: int | None = None  # texts of a tuple, None for any number
    example: str | None = None  # a value as it is typed, "" for a switch; options with one are basic and come first

    @property
    def is_basic(self) -> bool:
        return self.example is not None

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def full_help(self) -> str:
        """The help, ending with the default."""
        default = f"{self.default:g}" if isinstance(self.default, float) else self.default
        return f"{self.help} ({'required' if self.is_required else f'default: {self.unset or default}'})"

    @property
    def range(self) -> str:
        """The allowed values in words; empty if all of the kind are allowed."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.above is not None:
            return f"a number above {self.above} and up to {self.most}"
        if self.most is not None:
            return f"{self.least} to {self.most}"
        return f"{self.least} or more" if self.least is not None else ""

    def check(self, value: Any) -> Any:
        """The value as a config stores it. Raises UsageError for a wrong type or a value out of range."""
        if value is None and self.default is None:
            return None
        value = self._as_kind(value)
        inside = not self.choices or value in self.choices
        inside = inside and (self.least is None or value >= self.least)
        inside = inside and (self.above is None or value > self.above) and (self.most is None or value <= self.most)
        if not inside:
            raise UsageError(f"`{self.name}` {value}: expected {self.range}")
        if self.check_value:
            self.check_value(value)
        # A shell does not expand ~ in --output_dir=~/out, nor does YAML.
        is_in_home = self.metavar in PLACES and isinstance(value, str) and value.startswith("~")
        return expanded(value, self.name) if is_in_home else value

    def _as_kind(self, value: Any) -> Any:
        if self.kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.kind is tuple and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
        if self.kind is dict and isinstance(value, dict):
            return {str(name): part for name, part in value.items()}
        if isinstance(value, self.kind) and self.kind is not tuple and isinstance(value, bool) == (self.kind is bool):
            return value
        raise self._not_of_kind(value)

    def _not_of_kind(self, value: Any) -> UsageError:
        of_range = f", {self.range}" if self.range and self.above is None else ""
        return UsageError(f"`{self.name}` {value!r}: expected {KINDS[self.kind]}{of_range}")

    def read(self, text: str | list[str] | bool) -> Any:
        """The checked value of a command-line argument: a text, texts for a tuple, True or False for a switch.

        >>> Option("top_k", int, 64, "", least=1).read("8")
        8
        """
        try:
            readers: dict[type, Callable] = {int: int, float: float, dict: json.loads}
            value = readers.get(self.kind, lambda same: same)(text)
        except ValueError as error:
            raise self._not_of_kind(text) from error
        return self.check(value)


def option(default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A field of a config, required if it has no default; ``about`` has the fields of ``Option`` from ``help`` on."""
    made = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(**made, kw_only=True, metadata=about)


def options_of(config: type) -> dict[str, Option]:
    """The options of a config class by name, in its order."""
    return _options_of(config)


@functools.cache
def _options_of(config: type) -> dict[str, Option]:
    hints = typing.get_type_hints(config)
    return {
        field.name: Option(
            name=field.name,
            kind=_kind(hints[field.name]),
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            **field.metadata,
        )
        for field in dataclasses.fields(config)
    }


def _kind(hint: Any) -> type:
    """The key of ``KINDS`` for an annotation such as ``int | None`` or ``tuple[str, ...]``."""
    kinds = [part for part in typing.get_args(hint) if part is not types.NoneType]
    hint = kinds[0] if isinstance(hint, types.UnionType) else hint
    return typing.get_origin(hint) or hint


class Config:
    """Base of dataclasses of options: values are checked on creation, and ``repr`` shows those that are not defaults.

    ``given`` are the names of the options that were given a value, even the default one; None counts as not given.
    Raises UsageError, which names option, value and range.
    """

    given: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *_: Any, **options: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "given", frozenset(name for name, value in options.items() if value is not None))
        return made

    def __post_init__(self) -> None:
        for name, one in options_of(type(self)).items():
            object.__setattr__(self, name, one.check(getattr(self, name)))

    def chosen(self) -> dict[str, Any]:
        """The options whose values are not their defaults."""
        values = {name: (getattr(self, name), one.default) for name, one in options_of(type(self)).items()}
        return {name: value for name, (value, default) in values.items() if value != default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.chosen().items())})"
