"""What the toolkit raises when it can say what was wrong and what to do about it.

Both commands print such an error as its message alone and leave with its ``exit_status``; anything else is a
bug, and keeps its traceback under ``debug``.
"""


class ToolkitError(Exception):
    """A failure that the message explains: what was found, what was expected, what to do next."""

    exit_status = 1


class UsageError(ToolkitError):
    """Wrong use: an option, a template or a dataset that the caller has to change."""

    exit_status = 2
