"""What the toolkit raises when it can say what was wrong and what to do about it.

All commands print such an error as its message alone and leave with its ``exit_status``; anything else is a
bug, and keeps its traceback under ``debug``.
"""

import importlib.util

ACCELERATE = ("accelerate", "1.15")  # a package that some uses need, and its lowest version
MAX_LISTED = 3  # names listed in a message at most


class ToolkitError(Exception):
    """A failure that the message explains: what was found, what was expected, what to do next."""

    exit_status = 1


class UsageError(ToolkitError):
    """Wrong use: an option, a template or a dataset that the caller has to change."""

    exit_status = 2


def first_names(names: list[str]) -> str:
    """Names in a message, of many the first ones.

    >>> first_names(["seed", "split"]), first_names(["seed", "split", "dtype", "top_k", "top_p"])
    ('seed, split', 'seed, split, dtype and 2 others')
    """
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} other{'s' * (more > 1)}" if more > 0 else "")


def refuse_without(package: str, least: str, what: str) -> None:
    """Raise ToolkitError where a package that only ``what`` needs is not installed; ``least`` is its lowest version."""
    if importlib.util.find_spec(package) is None:
        raise ToolkitError(f"{what} needs {package}, which is not installed: pip install '{package}>={least}'")
