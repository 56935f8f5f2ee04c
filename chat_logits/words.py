"""Numbers in words, and an error in one line."""

import math


def count_text(count: int, noun: str) -> str:
    """A count with its noun, such as "1 token" or "1,024 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def with_error(value: float, error: float) -> str:
    """A mean with its standard error, such as "1.2345 ± 0.0123"; alone where none is known (nan)."""
    return f"{value:.4f}{error_text(error, ' ± ')}"


def error_text(error: float, before: str = "") -> str:
    """A standard error; "" where none is known (nan)."""
    return "" if math.isnan(error) else f"{before}{error:.4f}"


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line goes: some go on with whole schemas, or lists of what they know."""
    return str(error).strip().partition("\n")[0][:300]
