"""Numbers as text, and an error in one line."""

import math


def count_text(count: int, noun: str) -> str:
    """A count with its noun, such as "1 token" or "1,024 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def with_error(value: float, error: float) -> str:
    """A mean with its standard error, such as "1.2345 ± 0.0123"; the mean alone if the error is not known (nan)."""
    return f"{value:.4f}{error_text(error, ' ± ')}"


def error_text(error: float, before: str = "") -> str:
    """A standard error; "" if it is not known (nan)."""
    return "" if math.isnan(error) else f"{before}{error:.4f}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message: some continue with whole schemas, or lists of known values."""
    return str(error).strip().partition("\n")[0][:300]
