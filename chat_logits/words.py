"""Numbers in words."""


def count_text(count: int, noun: str) -> str:
    """A count with its noun, such as "1 token" or "1,024 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
