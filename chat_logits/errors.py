"""Errors that the toolkit raises when it can say what was wrong and what to do about it.

The commands print only the message of such an error and exit with its ``exit_status``. Any other exception is a bug;
its traceback is shown with ``debug``.
"""

import importlib.util

ACCELERATE = ("accelerate", "1.15")  # a package that some uses need, and its lowest version
MAX_LISTED = 3  # names listed in a message at most


class ToolkitError(Exception):
    """A failure that the message explains: what was found, what was expected, what to do next."""

    exit_status = 1


class UsageError(ToolkitError):
    """Wrong use: the caller has to change an option, a template or a dataset."""

    exit_status = 2


def first_names(names: list[str]) -> str:
    """Names for a message, only the first ones if there are many.

    >>> first_names(["seed", "split"]), first_names(["seed", "split", "dtype", "top_k", "top_p"])
    ('seed, split', 'seed, split, dtype and 2 others')
    """
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} other{'s' * (more > 1)}" if more > 0 else "")


def refuse_without(package: str, least: str, what: str) -> None:
    """Raise ToolkitError if a package that only ``what`` needs is not installed; ``least`` is its lowest version."""
    if importlib.util.find_spec(package) is None:
        raise ToolkitError(f"{what} needs {package}, which is not installed: pip install '{package}>={least}'")
