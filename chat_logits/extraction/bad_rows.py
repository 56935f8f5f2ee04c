"""How many bad records a run puts up with: rows that cannot be read, understood or computed."""

from collections import Counter
from collections.abc import Iterable

from chat_logits.errors import ToolkitError
from chat_logits.storage.shard_list import ShardEntry

NOT_FINITE = "logits that are not finite"
NO_ROOM = "out of memory, even as a batch of one"
LEAST_ROWS = 1000  # that a share is of
ADVICE = {
    NOT_FINITE: "Try `dtype` float32.",
    NO_ROOM: "Such are left out sooner with a lower `max_length`; a smaller dtype or another device may have room.",
}
SHOWN = 3  # reasons


class BadRows:
    """The bad rows of the shards so far, which may be ``limit``: a share, below 1, of the first thousand source rows,
    later of all; or a number."""

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
        """Raise ToolkitError, with the reasons, where there are too many."""
        allowed = self._limit if self._limit >= 1 else self._limit * max(LEAST_ROWS, self._rows)
        if (total := self._reasons.total()) > allowed:
            raise ToolkitError(
                f"{total:,} of {self._rows:,} source rows are bad, more than `max_bad_rows` {self._limit:g} allows: "
                f"{explain_reasons(self._reasons)}\nWhat is finished is kept; with a higher `max_bad_rows` the same "
                "command goes on."
            )


def explain_reasons(reasons: Counter[str]) -> str:
    """The most common reasons in a line, with what to do about them, if that is known."""
    listed = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(SHOWN))
    more = f"; and {len(reasons) - SHOWN} other reasons" if len(reasons) > SHOWN else ""
    return " ".join([f"{listed}{more}.", *(text for reason, text in ADVICE.items() if reason in reasons)])
