"""How many bad rows a run tolerates: source rows that cannot be read, understood or computed."""

from collections import Counter
from collections.abc import Iterable

from chat_logits.errors import ToolkitError
from chat_logits.storage.shard_list import ShardEntry

NOT_FINITE = "logits that are not finite"
NO_ROOM = "out of memory, even as a batch of one"
LEAST_ROWS = 1000  # a share is of at least this many rows
ADVICE = {
    NOT_FINITE: "Try `dtype` float32.",
    NO_ROOM: "A lower `max_length` skips them earlier; a smaller dtype or another device may have room.",
}
SHOWN = 3  # reasons


class BadRows:
    """Counts the bad rows of the shards so far. At most ``limit`` are allowed: a number, or a share (below 1) of the
    first thousand source rows, then of all."""

    def __init__(self, limit: float, entries: Iterable[ShardEntry] = ()):
        self._limit, self._rows = limit, 0
        self._reasons: Counter[str] = Counter()
        for entry in entries:
            self._count(entry)

    def _count(self, entry: ShardEntry) -> None:
        self._rows += entry.source_rows
        self._reasons.update(entry.bad)

    def add(self, entry: ShardEntry) -> None:
        """Count in a finished shard. Raises ToolkitError as ``check`` does."""
        self._count(entry)
        self.check()

    def check(self) -> None:
        """Raise ToolkitError, with the reasons, if there are too many."""
        allowed = self._limit if self._limit >= 1 else self._limit * max(LEAST_ROWS, self._rows)
        if (total := self._reasons.total()) > allowed:
            raise ToolkitError(
                f"{total:,} of {self._rows:,} source rows are bad, more than `max_bad_rows` {self._limit:g} allows: "
                f"{explain_reasons(self._reasons)}\nWhat is finished is kept; with a higher `max_bad_rows` the same "
                "command continues."
            )


def explain_reasons(reasons: Counter[str]) -> str:
    """The most common reasons in one line, with advice if there is any."""
    listed = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(SHOWN))
    more = f"; and {len(reasons) - SHOWN} other reasons" if len(reasons) > SHOWN else ""
    return " ".join([f"{listed}{more}.", *(text for reason, text in ADVICE.items() if reason in reasons)])
