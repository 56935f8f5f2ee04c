"""Which columns of a source hold the conversation: found from their names alone, once a run, and recorded.

``columns`` is ``{"messages": NAME}`` or ``{"prompt": NAME, "response": NAME}``, with an optional ``"input"`` and
``"history"`` (Alpaca's), ``"system"`` and ``"tools"``.
"""

from collections.abc import Iterable

from chat_logits.errors import UsageError

# Of which a source may have one; a `reference_answer` beside `answer` is a grader's column, never the response.
FORMATS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "instruction", "response": "output"},
    {"prompt": "query", "response": "response"},
)
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOLS_COLUMNS = ("tools", "functions", "tool_defs")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
OVERRIDES = "Name the ones that are meant: `messages_column`, or `prompt_column` and `response_column`."


def choose_columns(
    names: list[str],
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    tools: str | None = None,
) -> dict[str, str]:
    """The columns that hold the conversation, those named or those found among all ``names``.

    ``tools`` is "" where no column's definitions of tools are meant. Raises UsageError where a column that was named
    is missing, or where none or several formats fit.
    """
    if messages or prompt or response:
        columns = _named_columns(messages, prompt, response)
        _refuse_missing(columns.values(), names)
    else:
        columns = _detect_columns(names)
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


def _detect_columns(names: list[str]) -> dict[str, str]:
    fitting = [columns for columns in FORMATS if set(columns.values()) <= set(names)]
    listed = ", ".join(names)
    if not fitting:
        known = "; ".join(" + ".join(columns.values()) for columns in FORMATS)
        raise UsageError(f"no chat columns among: {listed}; expected one of: {known}.\n{_hint(names) or OVERRIDES}")
    if len(fitting) > 1:
        fits = " and ".join(" + ".join(columns.values()) for columns in fitting)
        raise UsageError(f"ambiguous columns: {fits} all hold conversations (all columns: {listed}).\n{OVERRIDES}")
    return dict(fitting[0])


def _hint(names: list[str]) -> str | None:
    """What else may be wrong with a table that has no chat columns: separators, an encoding, spaces and capitals."""
    if "\0" in "".join(names):
        return "The file seems to be UTF-16: save it as UTF-8."
    if len(names) == 1 and (found := next((each for each in SEPARATORS if each in names[0]), None)):
        return f"Its fields seem to be separated by {SEPARATORS[found]}: save it with commas."
    known = {name for columns in FORMATS for name in columns.values()}
    if nearly := [name for name in names if name not in known and name.strip().lower() in known]:
        return f"{nearly[0]!r} is taken as it stands, with its spaces and capitals. {OVERRIDES}"
    return None
