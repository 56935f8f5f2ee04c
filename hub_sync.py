"""Finished shards to the Hub, in commits beside the run, through whatever the network and the Hub do meanwhile.

    look at the repository -> the shards that it lacks -> one commit on top of what was seen -> again, when it is due

A failure ends nothing: the next attempt looks anew, so that a commit whose answer was lost is found and not repeated.
"""

import hashlib
import random
import sys
import threading
import time
from collections import deque

from tqdm import tqdm

from errors import ToolkitError, UsageError
from hub_access import explain_hub_error, is_transient, redact, retry_after
from hub_repository import RemoteState, Repository
from logit_dataset import CARD_FILE, EXTRACTION_FILE
from run_fingerprint import differences
from run_folder import RunFolder, as_json
from shard_files import ShardEntry

SHARDS_A_COMMIT = 96  # the Hub asks for about 100 files a commit
COMMITS_AN_HOUR = 120  # the Hub allows 128
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between attempts, doubled from one to the next
LAST_ATTEMPTS = 5  # in a row, once the run is over


class HubSync:
    """Pushes a run's finished shards from a thread of its own.

    ``push_every`` seconds lie between commits. ``remote`` is the repository as it was seen last, None if it never was.
    With ``overwrite``, another run that is in it is replaced by the first commit.
    """

    def __init__(self, repository: Repository, folder: RunFolder, push_every: float, overwrite: bool):
        self.repository, self.folder = repository, folder
        self.push_every, self.overwrite = push_every, overwrite
        self.remote: RemoteState | None = None
        self._is_stale = True
        self._entries: dict[int, ShardEntry] = {}
        self._hashes: dict[str, str] = {}
        self._commits: deque[float] = deque(maxlen=COMMITS_AN_HOUR)  # when each was begun
        self._pushed_at: float | None = None
        self._changed = threading.Condition()
        self._is_closing = self._is_closed = False
        self._failure, self._told = None, ""
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    @property
    def what(self) -> str:
        return f"--output_repo {self.repository.repo_id}"

    # --- the run's side ---

    def connect(self) -> None:
        """Look at the repository before the run begins. What the Hub refuses is refused now; its absence is not."""
        try:
            self._look()
        except Exception as error:
            explained = explain_hub_error(error, self.what)
            if not is_transient(error):
                raise explained from error
            self._say(f"{explained}\nRows go to {self.folder.path}, and from there to the Hub as soon as it answers.")

    def adopted(self) -> dict[int, ShardEntry]:
        """The shards of this run that are in the repository and not in the folder; they are not computed again."""
        if self.overwrite or not self.remote or self.remote.fingerprint != self.folder.fingerprint:
            return {}
        here = self.folder.entries
        return {
            shard: entry
            for shard, entry in self.remote.entries.items()
            if shard not in here and not self.folder.was_damaged(shard)
        }

    def start(self) -> None:
        """Begin pushing. Raises UsageError where the repository holds another run that may not be replaced."""
        if self.remote:
            self._refuse_another_run(self.remote)
        self._entries = dict(self.folder.entries)
        self._thread.start()

    def add(self, entry: ShardEntry) -> None:
        """Tell of a shard that has been finished."""
        with self._changed:
            self._entries[entry.shard] = entry
            self._hashes.pop(entry.path, None)
            self._changed.notify()

    def finish(self) -> None:
        """Push what is left. Raises ToolkitError, with what to do, where that cannot be done."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        with tqdm(total=len(self._entries), desc="Pushing", unit=" shards", leave=False, delay=1) as bar:
            while self._thread.is_alive():
                self._thread.join(0.2)
                bar.update(len(self._entries) - len(self._missing()) - bar.n)
        if self._failure:
            missing, there = len(self._missing()), len(self._entries)
            raise ToolkitError(
                f"{explain_hub_error(self._failure, self.what)}\n{missing} of {there} shards are not on the Hub yet; "
                f"all are in {self.folder.path}. The same command pushes what is missing, and computes nothing again."
            ) from self._failure

    def close(self) -> None:
        """Push no more, whatever is left."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    # --- the thread ---

    def _work(self) -> None:
        failures = 0
        while not self._is_closed:
            try:
                if not failures:
                    self._wait_until_due()
                closing = self._is_closing
                is_done = self._push(closing)
                failures = 0
            except Exception as error:
                closing, failures = self._is_closing, failures + 1
                if not is_transient(error) or (closing and failures > LAST_ATTEMPTS):
                    self._give_up(error)
                    return
                self._pause(error, failures)
                failures = 0 if self._is_closing and not closing else failures
                continue
            if closing and is_done:
                return

    def _wait_until_due(self) -> None:
        """Until a commit is due: the first shard at once, then by ``push_every``, a full commit, or the end."""
        with self._changed:
            while not (self._is_closing or self._is_closed):
                missing = len(self._missing())
                since = time.monotonic() - self._pushed_at if self._pushed_at else self.push_every
                if missing >= SHARDS_A_COMMIT or (missing and since >= self.push_every):
                    break
                self._changed.wait(max(0.1, self.push_every - since) if missing else None)

    def _look(self) -> RemoteState:
        self.remote, self._is_stale = self.repository.look(), False
        return self.remote

    def _push(self, closing: bool) -> bool:
        """One commit at most. Returns whether all that there is now is on the Hub."""
        remote = self._look() if self._is_stale else self.remote
        self._refuse_another_run(remote)
        missing = self._missing()
        chosen, is_last = missing[:SHARDS_A_COMMIT], closing and len(missing) <= SHARDS_A_COMMIT
        if not chosen and not is_last:
            return True
        additions, deletions, kept = self._changes(remote, chosen, is_last)
        self._keep_to_the_limit()
        self._is_stale = True  # until the answer is here
        head = self.repository.commit(_message(chosen), additions, deletions, remote.head)
        self.remote = RemoteState(head, kept, self.folder.extraction, self._listed(remote, chosen))
        self._is_stale = False
        self._pushed_at = time.monotonic()
        self._say("")
        return is_last

    def _keep_to_the_limit(self) -> None:
        """Begin no more commits within an hour than the Hub takes."""
        if len(self._commits) == COMMITS_AN_HOUR:
            time.sleep(max(0.0, self._commits[0] + 3600 - time.monotonic()))
        self._commits.append(time.monotonic())

    def _changes(self, remote: RemoteState, chosen: list[ShardEntry], is_last: bool) -> tuple[dict, list[str], dict]:
        """What a commit adds and deletes, and the hashes of the shards that are there after it."""
        is_first = remote.fingerprint != self.folder.fingerprint
        around = self.folder.files_around(list(self._listed(remote, chosen).values()))
        if is_first:
            around[EXTRACTION_FILE] = as_json(self.folder.extraction)
        elif not is_last:
            del around[CARD_FILE]
        sent = {entry.path: self._hashes[entry.path] for entry in chosen}
        deletions = [path for path in remote.files if is_first and path.startswith("data/") and path not in sent]
        kept = {path: oid for path, oid in remote.files.items() if path not in deletions}
        additions = {**{path: self.folder.path / path for path in sent}, **around}
        return additions, deletions, {**kept, **sent}

    def _listed(self, remote: RemoteState, chosen: list[ShardEntry]) -> dict[int, ShardEntry]:
        """The shards that are on the Hub after a commit."""
        there = remote.entries if remote.fingerprint == self.folder.fingerprint else {}
        ours = [entry for entry in list(self._entries.values()) if remote.files.get(entry.path) == self._hash(entry)]
        return {**there, **{entry.shard: entry for entry in (*ours, *chosen)}}

    def _missing(self) -> list[ShardEntry]:
        """The finished shards that the repository, as it was seen last, lacks."""
        there = self.remote.files if self.remote else {}
        ours = sorted(self._entries.values(), key=lambda entry: entry.shard)
        return [entry for entry in ours if there.get(entry.path) != self._hash(entry)]

    def _hash(self, entry: ShardEntry) -> str:
        if entry.path not in self._hashes:
            with (self.folder.path / entry.path).open("rb") as file:
                self._hashes[entry.path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[entry.path]

    def _refuse_another_run(self, remote: RemoteState) -> None:
        if remote.extraction is None or self.overwrite or remote.fingerprint == self.folder.fingerprint:
            return
        told = "; ".join(differences(remote.extraction, self.folder.extraction))
        raise UsageError(
            f"{self.what}: holds another run ({told}). Choose another repository, or replace that run with --overwrite."
        )

    def _pause(self, error: Exception, failures: int) -> None:
        """Before the next attempt: as long as the Hub asks for, else longer from one to the next, with jitter."""
        asked = retry_after(error)
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1)
        self._say(f"{explain_hub_error(error, self.what)}\nThe run goes on, and the Hub is asked again.")
        if asked is not None:
            time.sleep(asked + random.uniform(0, 1))
            return
        was_closing, until = self._is_closing, time.monotonic() + wait
        with self._changed:
            while self._is_closing == was_closing and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())

    def _give_up(self, error: Exception) -> None:
        self._say(str(explain_hub_error(error, self.what)))
        self._failure = error

    def _say(self, text: str) -> None:
        """Tell what is wrong once, and not again while it stays so."""
        if text and text != self._told:
            tqdm.write(redact(text), file=sys.stderr)
        self._told = text


def _message(chosen: list[ShardEntry]) -> str:
    if not chosen:
        return "Describe the finished extraction"
    first, last = chosen[0].shard, chosen[-1].shard
    return f"Add shard {first}" if first == last else f"Add {len(chosen)} shards, {first} to {last}"
