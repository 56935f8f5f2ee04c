"""Finished shards to the Hub, in commits beside the run, through whatever the network and the Hub do meanwhile.

    look at the repository -> the shards that it lacks -> one commit on top of what was seen -> again, when it is due

A failure ends nothing: the next attempt looks anew, so that a commit whose answer was lost is found and not repeated.
"""

import logging
import random
import threading
import time
from collections import deque

from tqdm import tqdm

from chat_logits.errors import ToolkitError
from chat_logits.extraction.folder import RunFolder
from chat_logits.hub import explain_hub_error, is_transient, patiently, redact, retry_after
from chat_logits.storage.card import run_state
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, ShardEntry, another_run
from chat_logits.storage.repository import RemoteState, Repository

logger = logging.getLogger(__name__)

SHARDS_A_COMMIT = 96  # the Hub asks for about 100 files a commit
COMMITS_AN_HOUR, HOUR = 120, 3600  # the Hub allows 128
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between attempts, doubled from one to the next
LONGEST_LAST_WAIT = 600.0  # that the Hub may ask for once the run is over
START_PATIENCE = 60.0  # seconds, where a run cannot begin without the Hub
ATTEMPTS = 5  # in a row: of a push that is refused, or of any once the run is over


class HubSync:
    """Pushes a run's finished shards from a thread of its own.

    ``push_every`` seconds lie between commits. ``remote`` is the repository as it was seen last, None if it never was.
    With ``overwrite``, whatever run is in it is replaced by the first commit. ``straight`` says that the shards are in
    no folder, so that without the Hub there is no run.
    """

    overwrite = False

    def __init__(self, repository: Repository, folder: RunFolder, push_every: float, straight: bool = False):
        self.repository, self.folder = repository, folder
        self.push_every, self.straight = push_every, straight
        self.remote: RemoteState | None = None
        self._is_stale = True
        self._entries: dict[int, ShardEntry] = {}
        self._uploads: dict[int, object] = {}  # shards that are in no folder here: what a commit names them by
        self._resend: set[int] = set()  # shards to send although the repository has their like
        self._commits: deque[float] = deque(maxlen=COMMITS_AN_HOUR)  # when each was begun
        self._pushed_at: float | None = None
        self._changed = threading.Condition()
        self._is_closing = self._is_closed = self._is_done = False
        self._failure: BaseException | None = None
        self._told = ""
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    # --- the run's side ---

    def connect(self) -> None:
        """Look at the repository before the run begins. What the Hub refuses is refused now; its absence is only where
        the shards have no other place."""
        self._unless_transient(self._look)

    def make(self) -> None:
        """Make the repository if it is missing. Raises ToolkitError where that, or what is in it, forbids the run."""
        if self.remote and self.remote.damage and not self.overwrite:
            raise another_run(self.repository.what, [self.remote.damage], "repository")
        if self.remote and self.remote.head is None:
            self._is_stale = True
            self._unless_transient(self.repository.make)

    def adopted(self) -> dict[int, ShardEntry]:
        """The shards of this run that are in the repository, or on their way there, and not in the folder.

        They are not computed again.
        """
        uploaded = {shard: self._entries[shard] for shard in self._uploads}
        if not self.remote:
            return uploaded
        ours = self.folder.entries.keys() | self.folder.recomputed
        there = {shard: entry for shard, entry in self._listed(self.remote, []).items() if shard not in ours}
        return {**there, **uploaded}

    def start(self) -> None:
        """Begin pushing. Raises UsageError where the repository holds another run that is not to be replaced."""
        if self.remote:
            self._refuse_another_run(self.remote)
        self._entries = dict(self.folder.entries)
        self._resend = set(self.folder.recomputed)
        self._thread.start()

    def add(self, entry: ShardEntry, upload=None) -> None:
        """Tell of a shard that has been finished: in the folder, or already sent (``Repository.upload``).

        Raises ToolkitError where nothing keeps what was sent: the Hub has refused its commit for good.
        """
        with self._changed:
            self._entries[entry.shard] = entry
            if upload is not None:
                self._uploads[entry.shard] = upload
            self._changed.notify()
        if upload is not None and self._failure:
            raise ToolkitError("The run ends, as its shards have no place any more.") from self._failure

    def finish(self) -> None:
        """Push what is left. Raises ToolkitError, with what to do, where that cannot be done."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        with tqdm(total=len(self._entries), desc="Pushing", unit=" shards", leave=False, delay=1) as bar:
            while self._thread.is_alive():
                self._thread.join(0.2)
                bar.update(len(self._entries) - self.left - bar.n)
        if not self._is_done:
            why = explain_hub_error(self._failure or RuntimeError("stopped"), self.repository.what)
            raise ToolkitError(f"{why}\n{self._told_left()}") from self._failure

    def _told_left(self) -> str:
        apart = sum(entry.shard in self._uploads for entry in self._missing())
        told = f"{self.left} of {len(self._entries)} shards are not on the Hub yet; "
        if apart:
            return f"{told}{apart} of them are nowhere else. The same command goes on, and computes those again."
        where = f"all are in {self.folder.path}"
        return f"{told}{where}. The same command pushes what is missing, and computes nothing again."

    def close(self) -> None:
        """Push no more, whatever is left."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    @property
    def left(self) -> int:
        """Finished shards that are not on the Hub yet."""
        return len(self._missing())

    @property
    def holds_uploads(self) -> bool:
        """Whether there are shards that only a commit keeps from being lost."""
        return any(entry.shard in self._uploads for entry in self._missing())

    def _unless_transient(self, step) -> None:
        if self.straight:
            patiently(step, f"{self.repository.what}, where the shards go without `output_dir`", START_PATIENCE)
            return
        try:
            step()
        except Exception as error:
            explained = explain_hub_error(error, self.repository.what)
            if not is_transient(error):
                raise explained from error
            self._say(f"{explained}\nRows go to {self.folder.path}, and from there to the Hub as soon as it answers.")

    # --- the thread ---

    def _work(self) -> None:
        try:
            failures = 0
            while not (self._is_closed or self._is_done):
                if not failures:
                    self._wait_until_due()
                failures = self._attempt(failures)
        except BaseException as error:  # whatever it is: the run must not take the rest for pushed
            self._failure = error
            self._say(str(explain_hub_error(error, self.repository.what)))

    def _attempt(self, failures: int) -> int:
        """Push once. Returns the attempts that have failed in a row; raises the last error where there were enough."""
        closing = self._is_closing
        try:
            everything = self._push(closing)
        except Exception as error:
            is_final = isinstance(error, ToolkitError) and not is_transient(error)
            if is_final or (failures >= ATTEMPTS and (closing or not is_transient(error))):
                raise
            self._pause(error, failures, closing)
            return 1 if self._is_closing and not closing else failures + 1
        self._is_done = closing and everything
        return 0

    def _wait_until_due(self) -> None:
        """Until a commit is due: the first shard at once, then by ``push_every``, a full commit, or the end."""
        with self._changed:
            while not (self._is_closing or self._is_closed):
                since = time.monotonic() - self._pushed_at if self._pushed_at else self.push_every
                left = self.left
                if left >= SHARDS_A_COMMIT or (left and since >= self.push_every):
                    break
                self._changed.wait(max(0.1, self.push_every - since) if left else None)

    def _look(self) -> RemoteState:
        self.remote, self._is_stale = self.repository.look(), False
        return self.remote

    def _push(self, closing: bool) -> bool:
        """One commit at most. Returns whether all that there is now is on the Hub."""
        remote = self._look() if self._is_stale or self.remote is None else self.remote
        if remote.head is None:
            self.repository.make()
            remote = self._look()
        self._refuse_another_run(remote)
        missing = self._missing()
        chosen, is_last = missing[:SHARDS_A_COMMIT], closing and len(missing) <= SHARDS_A_COMMIT
        if not chosen and (self.overwrite or not is_last or self._is_described(remote)):
            return True  # nothing to put in the place of what is there, nothing to add to it
        self._keep_to_the_limit()
        self._is_stale = True  # until the answer is here
        state = self._commit(remote, chosen, is_last)
        if self.overwrite:
            self.folder.note_replaced(self.repository.at)
        self.remote, self.overwrite = state, False
        self._resend -= {entry.shard for entry in chosen}
        self._pushed_at, self._is_stale = time.monotonic(), False
        self._say("")
        return is_last

    def _commit(self, remote: RemoteState, chosen: list[ShardEntry], is_last: bool) -> RemoteState:
        """Send these shards and the files around, to the repository as it was seen. Gives what it is then."""
        is_first = not self._is_ours(remote)
        listed = self._listed(remote, chosen)
        around = self.folder.files_around(list(listed.values()))
        if is_first:
            around[EXTRACTION_FILE] = self.folder.manifest.text
        elif not is_last:
            del around[CARD_FILE]
        sent = {entry.path: self._uploads.get(entry.shard, self.folder.path / entry.path) for entry in chosen}
        replaced = [path for path in sorted(remote.files) if is_first and path.startswith("data/") and path not in sent]
        head = self.repository.commit(_message(chosen), {**sent, **around}, replaced, remote.head)
        card = around.get(CARD_FILE, remote.card)
        return RemoteState(head, manifest=self.folder.manifest, entries=listed, card=card)

    def _is_ours(self, remote: RemoteState) -> bool:
        """Whether the run on the Hub is this one, and not to be replaced by it."""
        return remote.fingerprint == self.folder.manifest.fingerprint and not self.overwrite

    def _listed(self, remote: RemoteState, chosen: list[ShardEntry]) -> dict[int, ShardEntry]:
        """The shards that are on the Hub after a commit of those chosen."""
        there = remote.entries if self._is_ours(remote) else {}
        return {**there, **{entry.shard: entry for entry in chosen}}

    def _is_described(self, remote: RemoteState) -> bool:
        """Whether the card on the Hub is that of these shards; what its owner has written into it is left alone."""
        listed = list(self._listed(remote, []).values())
        return run_state(self.folder.manifest.fingerprint, listed) in remote.card

    def _missing(self) -> list[ShardEntry]:
        """The finished shards that the repository, as it was seen last, lacks, in order."""
        there = self._listed(self.remote, []) if self.remote else {}
        ours = sorted(self._entries.items())
        return [entry for shard, entry in ours if shard not in there or shard in self._resend]

    def _refuse_another_run(self, remote: RemoteState) -> None:
        if self.overwrite or remote.fingerprint == self.folder.manifest.fingerprint:
            return
        reasons = remote.manifest.differences(self.folder.manifest) if remote.manifest else [remote.damage]
        if any(reasons):
            raise another_run(self.repository.what, reasons, "repository")

    def _keep_to_the_limit(self) -> None:
        """Begin no more commits within an hour than the Hub takes."""
        if len(self._commits) == COMMITS_AN_HOUR:
            wait = self._commits[0] + HOUR - time.monotonic()
            if wait > 0:
                self._say(f"{self.repository.what}: {COMMITS_AN_HOUR} commits in an hour; the next in {wait:.0f} s")
                self._sleep(wait, until_closing=False)
        self._commits.append(time.monotonic())

    def _pause(self, error: Exception, failures: int, closing: bool) -> None:
        """Before the next attempt: as long as the Hub asks for, else longer from one to the next, with jitter."""
        asked = retry_after(error)
        if asked is not None and closing and asked > LONGEST_LAST_WAIT:
            raise error
        going_on = "Trying again" if closing else "The run goes on, and the Hub is asked again"
        after = f" in {asked:.0f} s" if asked else ""
        self._say(f"{explain_hub_error(error, self.repository.what)}\n{going_on}{after}.")
        if asked is not None:
            self._sleep(asked + random.uniform(0, 1), until_closing=False)
        else:
            self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**failures) * random.uniform(0.5, 1), until_closing=not closing)

    def _sleep(self, seconds: float, until_closing: bool) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            while time.monotonic() < until and not (self._is_closed or (until_closing and self._is_closing)):
                self._changed.wait(until - time.monotonic())

    def _say(self, text: str) -> None:
        """Tell what is wrong once, and not again while it stays so."""
        if text and text != self._told:
            logger.warning(redact(text))
        self._told = text


def _message(chosen: list[ShardEntry]) -> str:
    if not chosen:
        return "Describe the extraction"
    first, last = chosen[0].shard, chosen[-1].shard
    return f"Add shard {first}" if first == last else f"Add {len(chosen)} shards, {first} to {last}"
