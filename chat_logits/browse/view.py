"""What the list shows, and in which order: reads, checks and writes the query of its address."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from urllib.parse import urlencode

from chat_logits.analysis.condition import Condition
from chat_logits.errors import UsageError

PAGE_ROWS = 50
# Columns of the index that the list can be sorted by.
SORTS = (
    "row",
    "source_index",
    "num_tokens",
    "mean_nll",
    "mean_entropy",
    "top1_rate",
    "max_surprisal",
    "question",
    "note",
)
RANGES = ("mean_nll", "mean_entropy", "num_tokens", "top1_rate", "max_surprisal", "source_index")
OF_TEXTS = {"num_messages", "question", "tools"}  # columns of a condition that are not numbers of the rows
LONGEST = 1000  # characters of a text in the address


@lru_cache(64)
def condition_of(text: str) -> Condition:
    """A text as a condition, cached, as the check takes a moment. Raises UsageError if it is not a condition."""
    return Condition(text)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; None for an open end."""

    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, name: str, text: str) -> "Range":
        low, dots, high = text.partition("..")
        if not dots:
            raise UsageError(f"{name}={text}: expected two numbers, as in {name}=1.5..3; one of them may be missing")
        return cls(_number(name, low), _number(name, high))

    def __str__(self) -> str:
        return "..".join("" if end is None else f"{end:.9g}" for end in (self.low, self.high))


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}: {text!r} is not a number")
    return number


@dataclass(frozen=True)
class View:
    """The rows that are chosen, their order, and the page of them that is shown, from 1.

    ``text`` is searched in the messages, ``where`` is a condition on the columns, ``ranges`` are those of columns in
    ``RANGES``, ``roles`` those of the number of messages by role; ``marked`` rows have a note or a tag, and ``tag`` is
    a tag that they have.
    """

    text: str = ""
    where: str = ""
    ranges: dict[str, Range] = field(default_factory=dict)
    roles: dict[str, Range] = field(default_factory=dict)
    marked: bool = False
    tag: str = ""
    sort: str = "row"
    down: bool = False
    page: int = 1

    @classmethod
    def read(cls, query: Iterable[tuple[str, str]]) -> "View":
        """The view of an address. Raises UsageError for an unknown or invalid part."""
        given: dict = {"ranges": {}, "roles": {}}
        for name, value in query:
            if len(value) > LONGEST:
                raise UsageError(f"{name}: {len(value):,} characters, expected {LONGEST:,} at most")
            if value == "":
                continue
            _take(given, name, value)
        return cls(**given)

    def query(self, **changes) -> str:
        """The query of this view's address, or of one that differs by ``changes``; defaults are left out."""
        view = replace(self, **changes) if changes else self
        parts = [("q", view.text), ("where", view.where)]
        parts += [(name, str(view.ranges[name])) for name in RANGES if name in view.ranges]
        parts += [("role", f"{role}:{span}") for role, span in sorted(view.roles.items())]
        parts += [("marked", "1" * view.marked), ("tag", view.tag)]
        parts += [("sort", view.sort if view.sort != "row" else ""), ("down", "1" * view.down)]
        parts += [("page", str(view.page) if view.page > 1 else "")]
        return urlencode([(name, value) for name, value in parts if value])

    @property
    def is_whole(self) -> bool:
        """Whether all rows are chosen."""
        return not (self.text or self.where or self.ranges or self.roles or self.marked or self.tag)

    @property
    def is_where_alone(self) -> bool:
        """Whether ``where`` is the only filter."""
        return bool(self.where) and replace(self, where="").is_whole

    @property
    def needs_texts(self) -> bool:
        """Whether the messages are needed. Raises UsageError if ``where`` is not a condition."""
        columns = condition_of(self.where).columns if self.where else set()
        return bool(self.text or self.roles or self.sort == "question" or columns & OF_TEXTS)

    def without(self, name: str) -> "View":
        """The view without one of its ranges."""
        return replace(self, ranges={other: span for other, span in self.ranges.items() if other != name}, page=1)


def _take(given: dict, name: str, value: str) -> None:
    texts = {"q": "text", "where": "where", "tag": "tag"}
    if name in texts:
        given[texts[name]] = value
    elif name in RANGES:
        given["ranges"][name] = Range.read(name, value)
    elif name == "role":
        role, _, span = value.rpartition(":")
        given["roles"][role] = Range.read(name, span)
    elif name in ("marked", "down") and value in ("0", "1"):
        given[name] = value == "1"
    elif name == "sort" and value in SORTS:
        given["sort"] = value
    elif name == "page" and value.isascii() and value.isdecimal() and int(value[:9]) > 0:
        given["page"] = int(value[:9])
    else:
        expected = {"sort": f"one of {', '.join(SORTS)}", "page": "a number from 1", "marked": "1", "down": "1"}
        raise UsageError(
            f"{name}={value[:40]}: " + (f"expected {expected[name]}" if name in expected else "no such filter")
        )


def view_of(query: Mapping) -> View:
    """The view of a request's query, a multi-dict."""
    return View.read(query.multi_items())  # type: ignore[attr-defined]
