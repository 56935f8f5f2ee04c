"""Which columns of a source hold the conversation: found from their names alone, once per run, and recorded.

``columns`` is ``{"messages": NAME}`` or ``{"prompt": NAME, "response": NAME}``, with an optional ``"input"`` and
``"history"`` (Alpaca's), ``"system"`` and ``"tools"``.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence

from chat_logits.errors import UsageError
from chat_logits.words import count_text

# A source may have only one of these. A `reference_answer` next to `answer` is for graders, never the response.
FORMATS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"messages": "conversation"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "instruction", "response": "output"},
    {"prompt": "query", "response": "response"},
)
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOLS_COLUMNS = ("tools", "functions", "tool_defs")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
OVERRIDES = "Name the ones that are meant: `messages_column`, or `prompt_column` and `response_column`."
PREFERENCES = (
    "Of pairs of answers name one: `messages_column` chosen where it holds whole conversations, `prompt_column` prompt "
    "and `response_column` chosen where it holds the answer alone."
)
BATCH = (
    "An OpenAI batch has the questions in one file (body.messages) and the answers in another (response.body.choices): "
    "write a file with the `messages` of both, joined by custom_id."
)


def choose_columns(
    names: list[str],
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    tools: str | None = None,
    first_rows: Sequence[object] = (),
) -> dict[str, str]:
    """The columns that hold the conversation: those given, or those found among all ``names``.

    ``tools`` is "" to use no column of tool definitions. Raises UsageError if a given column is missing, or if no
    format or several fit; ``first_rows`` are used for advice in that error.
    """
    if messages or prompt or response:
        columns = _named_columns(messages, prompt, response)
        _refuse_missing(columns.values(), names)
    else:
        columns = _detect_columns(names, first_rows)
    if columns.get("prompt") == "instruction":
        columns |= {name: name for name in ("input", "history") if name in names}
    system = next((name for name in SYSTEM_COLUMNS if name in names), None)
    columns |= {"system": system} if system else {}
    tools = _tools_column(names) if tools is None else tools
    if tools:
        _refuse_missing([tools], names)
    return columns | ({"tools": tools} if tools else {})


def _tools_column(names: list[str]) -> str | None:
    found = [name for name in TOOLS_COLUMNS if name in names]
    if len(found) > 1:
        raise UsageError(
            f"ambiguous columns: {' and '.join(found)} all hold tools (all columns: {', '.join(names)}).\n"
            "Name the one that is meant, or '' for none: `tools_column`."
        )
    return found[0] if found else None


def _refuse_missing(wanted: Iterable[str], names: list[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UsageError(f"no column {missing[0]!r}; the dataset has: {', '.join(names)}")


def _named_columns(messages: str | None, prompt: str | None, response: str | None) -> dict[str, str]:
    if messages and not (prompt or response):
        return {"messages": messages}
    if prompt and response and not messages:
        return {"prompt": prompt, "response": response}
    raise UsageError("expected `messages_column` alone, or `prompt_column` and `response_column` together")


def _detect_columns(names: list[str], first_rows: Sequence[object]) -> dict[str, str]:
    fitting, listed = _fitting(names), ", ".join(names)
    if not fitting:
        known = "; ".join(" + ".join(columns.values()) for columns in FORMATS)
        advice = _hint(names) or _hint_of_values(first_rows) or OVERRIDES
        raise UsageError(f"no chat columns among: {listed}; expected one of: {known}.\n{advice}")
    if len(fitting) > 1:
        fits = " and ".join(" + ".join(columns.values()) for columns in fitting)
        raise UsageError(f"ambiguous columns: {fits} all hold conversations (all columns: {listed}).\n{OVERRIDES}")
    return dict(fitting[0])


def _fitting(names: Iterable[str]) -> list[dict[str, str]]:
    """The formats whose columns are all among these."""
    return [columns for columns in FORMATS if set(columns.values()) <= set(names)]


def _hint(names: list[str]) -> str | None:
    """Advice for a table without chat columns: its separators, encoding, spaces and capitals, or other forms."""
    if "\0" in "".join(names):
        return "The file seems to be UTF-16: save it as UTF-8."
    if len(names) == 1 and (found := next((each for each in SEPARATORS if each in names[0]), None)):
        return f"Its fields seem to be separated by {SEPARATORS[found]}: save it with commas."
    if {"chosen", "rejected"} <= set(names):
        return PREFERENCES
    if "custom_id" in names:
        return BATCH
    known = {name for columns in FORMATS for name in columns.values()}
    if nearly := [name for name in names if name not in known and name.strip().lower() in known]:
        return f"{nearly[0]!r} is matched exactly, with its spaces and capitals. {OVERRIDES}"
    return None


def _hint_of_values(rows: Sequence[object]) -> str | None:
    """Advice if the first row seems to have the conversations nested within a column."""
    row = next((row for row in rows if isinstance(row, dict)), {})
    lists = {name: value for name, value in row.items() if _is_list_of_objects(value)}
    if chats := [name for name, value in lists.items() if not {"role", "from"}.isdisjoint(value[0])]:
        return f"{chats[0]!r} holds a list of messages: name it, `messages_column` {chats[0]}."
    if lists and len(rows) == 1:
        longest = max(lists, key=lambda name: len(lists[name]))
        found = ", ".join(f"{name!r} has a list of {count_text(len(value), 'object')}" for name, value in lists.items())
        return f"The file is one object, in which {found:.200}. {_written_out(_key(longest) + '[]')}"
    objects = [name for name, value in row.items() if isinstance(value, dict) and _fitting(value)]
    if not objects:
        return None
    key = ".[]" if len(objects) == len(row) > 1 else _key(objects[0])
    return f"{objects[0]!r} is an object with chat columns. {_written_out(key)}"


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _key(name: str) -> str:
    """An object's key for jq."""
    return f".{name}" if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else f".[{json.dumps(name)}]"


def _written_out(path: str) -> str:
    return f"Make them the rows: `jq -c {shlex.quote(path)} FILE > ROWS.jsonl`."
