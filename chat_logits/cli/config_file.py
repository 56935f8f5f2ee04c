"""A run's options from a YAML file, under the same names; mistakes name the file, the line and what was expected."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chat_logits.cli.parser import CommonOptions
from chat_logits.errors import UsageError
from chat_logits.options import Config, Option, options_of

# Options of the commands that are not part of a run
COMMAND_LINE_ALONE = {"config", "preview", "plan", "plan_for", *options_of(CommonOptions)}


@dataclass(frozen=True)
class FileOption:
    """A checked value, and its line in the file."""

    value: Any
    line: int


def read_config_file(path: str, kind: type[Config]) -> dict[str, FileOption]:
    """The options of a config that a file sets. Raises UsageError if it is not such a file."""
    root = _parse(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line {_line(root)}: expected lines such as top_k: 64")
    options: dict[str, FileOption] = {}
    for key, value in root.value:
        where, typed = f"{path}, line {_line(key)}", str(key.value)
        name = typed.replace("-", "_")
        if name in options:
            raise UsageError(f"{where}: {name} is in line {options[name].line} already; leave one of the two out")
        options[name] = FileOption(_read(where, typed, value, kind), _line(key))
    return options


def _parse(path: str) -> yaml.Node | None:
    try:
        return yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"`config` {path}: {error.strerror}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"`config` {path}: expected UTF-8 text ({error})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{path}, line {mark.line + 1 if mark else 1}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"`config` {path}: not YAML ({error})") from error


def _read(where: str, typed: str, node: yaml.Node, kind: type[Config]) -> Any:
    options, name = options_of(kind), typed.replace("-", "_")
    if name not in options:
        raise UsageError(f"{where}: {typed}: {_unknown(name, options)}")
    try:
        return _checked(options[name], _value(node))
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).replace('`', '')}") from error
    except (yaml.YAMLError, ValueError) as error:  # an impossible date, for example
        raise UsageError(f"{where}: {name}: {getattr(error, 'problem', error)}") from error


def _unknown(name: str, options: dict[str, Option]) -> str:
    if name in COMMAND_LINE_ALONE:
        return f"for the command line only; give it there, as --{name}"
    near = difflib.get_close_matches(name, options, 1)
    return "no such option" + (f"; did you mean {near[0]}?" if near else "")


def _checked(one: Option, value: Any) -> Any:
    """The checked value. YAML 1.1 reads some numbers as text, such as 1e-1: these are parsed as on the command line."""
    return one.read(value) if isinstance(value, str) and one.kind in (int, float) else one.check(value)


def _value(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
