"""Pushes finished shards to the Hub during the run, in commits, and copes with failures of the network and the Hub.

    look at the repository -> the shards that it lacks -> one commit on top of what was seen -> again, when it is due

A failure does not end the push: the next attempt looks at the repository again, so that a commit is not repeated if
only its answer was lost. ``RemoteRun`` decides what is to be sent; when, and what to wait for, is decided here.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from tqdm import tqdm

from chat_logits.errors import ToolkitError
from chat_logits.extraction.folder import RunFolder
from chat_logits.extraction.remote_run import RemoteRun
from chat_logits.hub import seconds_of_silence
from chat_logits.hub_errors import BESIDE, LAST, START, explain_hub_error, is_transient, redact, retry_after
from chat_logits.storage.manifest import another_run
from chat_logits.storage.repository import Repository
from chat_logits.storage.shard_list import ShardEntry

logger = logging.getLogger(__name__)

SHARDS_A_COMMIT = 96  # the Hub asks for about 100 files a commit
SILENCE = 900.0  # at the end of a run: seconds without a request or an answer until waiting stops, ...
SLOWEST = 20_000  # ... plus the time for the largest shard at this many bytes a second
CLOSING = 1.0  # seconds for the thread to end once nothing more is to be pushed
COMMITS_AN_HOUR, HOUR = 120, 3600  # the Hub allows 128


class HubSync:
    """Pushes a run's finished shards from a thread of its own.

    There are ``push_every`` seconds between commits. ``without_folder`` says that the shards are not in a folder, so
    that the run cannot do without the Hub.
    """

    def __init__(self, repository: Repository, folder: RunFolder, push_every: float, without_folder: bool = False):
        self.repository, self.folder = repository, folder
        self.push_every, self.without_folder = push_every, without_folder
        self.remote = RemoteRun(repository, folder)
        self._commits: deque[float] = deque(maxlen=COMMITS_AN_HOUR)  # when each was begun
        self._pushed_at: float | None = None
        self._waited_until = 0.0  # until then the thread waits on purpose
        self._failures: Counter[str] = Counter()  # in a row, by kind
        self._changed = threading.Condition()
        self._is_closing = self._is_closed = self._is_done = False
        self._fatal: BaseException | None = None
        self._warning = ""  # the last one, until its cause is gone
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    # --- the run's side ---

    @property
    def left(self) -> int:
        """Finished shards that are not on the Hub yet."""
        return len(self.remote.missing())

    def connect(self) -> None:
        """Look at the repository before the run begins. Refusals of the Hub are raised now; if it does not answer, that
        is an error only if the shards have no other place."""
        self._unless_transient(self.remote.look)

    def make(self, overwrite: bool) -> None:
        """Create the repository if it is missing. Raises ToolkitError if that fails, or its contents forbid the run.

        With ``overwrite``, the first commit replaces any run that is in it.
        """
        self.remote.overwrite, state = overwrite, self.remote.state
        if state and state.damage and not overwrite:
            raise another_run(self.repository.name, [state.damage], "repository")
        if state and state.head is None:
            self._unless_transient(self.remote.make)

    def start(self) -> None:
        """Begin pushing. Raises UsageError if the repository holds another run that is not to be replaced."""
        self.remote.begin()
        self._thread.start()

    def add(self, entry: ShardEntry, upload=None) -> None:
        """Add a finished shard: one in the folder, or one already sent (``Repository.upload``).

        Raises ToolkitError if a shard that was sent would be lost, because the Hub has refused the commit for good.
        """
        with self._changed:
            self.remote.entries[entry.shard] = entry
            if upload is not None:
                self.remote.uploads[entry.shard] = upload
            self._changed.notify()
        if upload is not None and self._fatal:
            raise ToolkitError(
                "Stopping: the Hub refused the commit, and these shards are stored nowhere else."
            ) from self._fatal

    def finish(self, is_all: bool = False) -> None:
        """Push what is left; with ``is_all``, the run then has all of its shards there.

        Raises ToolkitError, with what to do, if that is not possible.
        """
        with self._changed:
            self.remote.is_all = is_all
            self._is_closing = True
            self._changed.notify()
        total = len(self.remote.entries)
        with tqdm(total=total, desc="Pushing", unit=" shards", leave=False, delay=1) as bar:
            while self._thread.is_alive():
                self._thread.join(0.2)
                bar.update(total - self.left - bar.n)
                self._refuse_silence()
        if not self._is_done:
            reason = explain_hub_error(self._fatal or RuntimeError("stopped"), self.repository.name)
            raise ToolkitError(f"{reason}\n{self._rest()}") from self._fatal

    def _refuse_silence(self) -> None:
        """Raise ToolkitError if no request or answer has begun for long: an answer may come one byte at a time.

        After that, the run no longer waits for the thread.
        """
        silent = min(seconds_of_silence(), time.monotonic() - self._waited_until)
        largest = max((entry.num_bytes for entry in self.remote.entries.values()), default=0)
        if silent > SILENCE + largest / SLOWEST:
            self.close()
            raise ToolkitError(f"{self.repository.name}: no answer for {silent:,.0f} s\n{self._rest()}")

    def _rest(self) -> str:
        """A line about what is not on the Hub: how much, where it is, and what to do."""
        rest = f"{self.left} of {len(self.remote.entries)} shards are not on the Hub yet; "
        if uploads := len(self.remote.missing_uploads()):
            return f"{rest}{uploads} of them are nowhere else. The same command continues, and computes those again."
        place = f"all are in {self.folder.path}"
        return f"{rest}{place}. The same command pushes what is missing, and computes nothing again."

    def close(self) -> bool:
        """Stop pushing, even if shards are left. Returns whether no request is in progress any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSING)
        return not self._thread.is_alive()

    def _unless_transient(self, step) -> None:
        name = self.repository.name
        if self.without_folder:
            START.call(step, f"{name}, where the shards go without `output_dir`")
            return
        try:
            step()
        except Exception as error:
            explained = explain_hub_error(error, name)
            if not is_transient(error):
                raise explained from error
            self._warn(f"{explained}\nRows go to {self.folder.path}, and from there to the Hub as soon as it answers.")

    # --- the thread ---

    def _work(self) -> None:
        try:
            while not (self._is_closed or self._is_done):
                if not self._failures:
                    self._wait_until_due()
                self._attempt()
        except BaseException as error:  # of any kind: the run must not believe that the rest was pushed
            self._fatal = error
            self._warn(str(explain_hub_error(error, self.repository.name)))

    def _wait_until_due(self) -> None:
        """Wait until a commit is due: at once for the first shard, then by ``push_every``, a full commit or the end."""
        with self._changed:
            while not (self._is_closing or self._is_closed):
                since = time.monotonic() - self._pushed_at if self._pushed_at else self.push_every
                left = self.left
                if left >= SHARDS_A_COMMIT or (left and since >= self.push_every):
                    break
                self._changed.wait(max(0.1, self.push_every - since) if left else None)

    def _attempt(self) -> None:
        """Push once, and wait after a failure. Raises the last error if there have been too many in a row."""
        closing = self._is_closing
        try:
            is_all = self._push(closing)
        except Exception as error:
            self._pause(error, closing)
            if self._is_closing and not closing:
                self._failures.clear()  # the end has attempts of its own
        else:
            self._is_done = closing and is_all
            self._failures.clear()

    def _push(self, closing: bool) -> bool:
        """Make at most one commit. Returns whether everything finished so far is on the Hub."""
        remote = self.remote.prepare()
        missing = self.remote.missing()
        chosen, is_last = missing[:SHARDS_A_COMMIT], closing and len(missing) <= SHARDS_A_COMMIT
        if not chosen and (not is_last or self.remote.is_complete(remote)):
            return True
        self._keep_to_the_limit()
        self.remote.commit(remote, chosen, is_last)
        self._pushed_at = time.monotonic()
        self._warn("")
        return is_last

    def _keep_to_the_limit(self) -> None:
        """Start no more commits within an hour than the Hub accepts."""
        if len(self._commits) == COMMITS_AN_HOUR:
            wait = self._commits[0] + HOUR - time.monotonic()
            if wait > 0:
                self._warn(f"{self.repository.name}: {COMMITS_AN_HOUR} commits in an hour; the next in {wait:.0f} s")
                self._sleep(wait)
        self._commits.append(time.monotonic())

    def _pause(self, error: Exception, closing: bool) -> None:
        """Wait before the next attempt. Raises the error if there is none; the end of the run cuts short a wait that
        the Hub has not asked for."""
        seconds = (LAST if closing else BESIDE).pause(error, self._failures)
        if seconds is None:
            raise error
        asked = retry_after(error)
        next_step = "Trying again" if closing else "The run continues, and the Hub is asked again"
        when = f" in {asked:.0f} s" if asked else ""
        self._warn(f"{explain_hub_error(error, self.repository.name)}\n{next_step}{when}.")
        if closing:
            self._sleep(seconds)
        elif not self._sleep(asked or 0, until=lambda: self._is_closing and self._left_of_wait > LAST.longest_asked):
            raise error  # a wait that the Hub asked for earlier is limited at the end as one that it asks for then
        else:
            self._sleep(seconds - (asked or 0), until=lambda: self._is_closing)

    @property
    def _left_of_wait(self) -> float:
        return self._waited_until - time.monotonic()

    def _sleep(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait so long, or until the push is closed or ``until()`` is true. Returns whether ``until()`` never was."""
        self._waited_until = time.monotonic() + seconds
        with self._changed:
            while self._left_of_wait > 0 and not self._is_closed:
                if until():
                    return False
                self._changed.wait(self._left_of_wait)
        return True

    def _warn(self, text: str) -> None:
        """Log a warning once, and not again while its cause stays the same."""
        if text and text != self._warning:
            logger.warning(redact(text))
        self._warning = text
