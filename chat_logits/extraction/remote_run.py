"""The run in a Hub repository: which shards are there, which are missing, and the commits that add them."""

from chat_logits.extraction.folder import RunFolder
from chat_logits.storage.card import run_state
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, another_run
from chat_logits.storage.repository import RemoteState, Repository
from chat_logits.storage.shard_list import ShardEntry


class RemoteRun:
    """The run in the repository: which of its shards are there and which are missing, and the commits that add these.

    ``state`` is the repository as it was last seen, None if it has not been looked at. With ``overwrite``, the first
    commit replaces any run that is there; it waits until there is a shard with a row. ``is_all`` is true once the run
    has no more shards to come.
    """

    def __init__(self, repository: Repository, folder: RunFolder):
        self.repository, self.folder, self.overwrite, self.is_all = repository, folder, False, False
        self.state: RemoteState | None = None
        self._is_stale = True
        self._resend: set[int] = set()  # shards to send although the repository has a version of them
        self.entries: dict[int, ShardEntry] = {}
        self.uploads: dict[int, object] = {}  # for shards that are not in the folder: what a commit refers to

    def look(self) -> RemoteState:
        """Look at what is in the repository now. Raises what ``Repository.look`` raises."""
        self.state, self._is_stale = self.repository.look(), False
        return self.state

    def look_if_stale(self) -> RemoteState:
        """The state as it was last seen; looks again if a commit has been tried since."""
        return self.look() if self._is_stale or self.state is None else self.state

    def make(self) -> None:
        """Create the repository, which did not exist when it was last looked at."""
        self._is_stale = True
        self.repository.make()

    def begin(self) -> None:
        """Take over the folder's shards to send. Raises ToolkitError if the repository holds another run."""
        if self.state:
            self._refuse_another_run(self.state)
        self.entries = dict(self.folder.entries)
        self._resend = set(self.folder.recomputed)

    def adopted(self) -> dict[int, ShardEntry]:
        """The shards of this run that are in the repository, or uploaded without a commit yet, and not in the folder.

        They are not computed again.
        """
        uploaded = {shard: self.entries[shard] for shard in self.uploads}
        if not self.state:
            return uploaded
        ours = self.folder.entries.keys() | self.folder.recomputed
        there = {shard: entry for shard, entry in self._listed(self.state, []).items() if shard not in ours}
        return {**there, **uploaded}

    @property
    def is_held_back(self) -> bool:
        """Whether the first commit would replace another run by shards without a single row."""
        return self.overwrite and not any(entry.num_rows for entry in list(self.entries.values()))

    def missing(self) -> list[ShardEntry]:
        """The finished shards to send, in order: those that the repository did not have when it was last seen."""
        if self.is_held_back:
            return []
        there = self._listed(self.state, []) if self.state else {}
        ours = sorted(self.entries.items())
        return [entry for shard, entry in ours if shard not in there or shard in self._resend]

    def missing_uploads(self) -> list[ShardEntry]:
        """The missing shards that are not in the folder: without a commit they would be lost."""
        return [entry for entry in self.missing() if entry.shard in self.uploads]

    def is_complete(self, remote: RemoteState) -> bool:
        """Whether the files around the shards need no commit: the card describes the shards that are there, or the run
        there is still to be replaced.

        What its owner has written into the card is left alone.
        """
        listed = list(self._listed(remote, []).values())
        says_these = run_state(self.folder.manifest.fingerprint, listed) in remote.card
        return self.overwrite or (says_these and (remote.is_finished or not self.is_all))

    def prepare(self) -> RemoteState:
        """The repository's state before a commit; creates it if missing. Raises ToolkitError if it has another run."""
        remote = self.look_if_stale()
        if remote.head is None:
            self.make()
            remote = self.look()
        self._refuse_another_run(remote)
        return remote

    def commit(self, remote: RemoteState, chosen: list[ShardEntry], is_last: bool) -> None:
        """Send these shards and the files around them, on top of the state that was seen."""
        self._is_stale = True  # until the answer has arrived
        is_first = not self._is_ours(remote)
        listed = self._listed(remote, chosen)
        stays = not is_first and remote.is_finished and listed.keys() == remote.entries.keys()
        is_finished = stays or (is_last and self.is_all)
        around = self.folder.files_around(list(listed.values()), is_finished)
        if is_first:
            around[EXTRACTION_FILE] = self.folder.manifest.text
        elif not is_last:
            del around[CARD_FILE]
        sent = {entry.path: self.uploads.get(entry.shard, self.folder.path / entry.path) for entry in chosen}
        replaced = [path for path in sorted(remote.files) if is_first and path.startswith("data/") and path not in sent]
        check = None
        if any(entry.shard not in self.uploads for entry in chosen):
            check = self.folder.check_still_ours  # if another run took its place, its shards have the same names
            check()
        head = self.repository.commit(_message(chosen), {**sent, **around}, replaced, remote.head, check)
        if self.overwrite:
            self.folder.note_replaced(self.repository.at)
        card = around.get(CARD_FILE, remote.card)
        manifest = self.folder.manifest
        self.state = RemoteState(head, manifest=manifest, entries=listed, card=card, is_finished=is_finished)
        self._resend -= {entry.shard for entry in chosen}
        self.overwrite = self._is_stale = False
        self.folder.forget_recomputed([entry.shard for entry in chosen])

    def _is_ours(self, remote: RemoteState) -> bool:
        """Whether the run on the Hub is this one, and is not to be replaced."""
        return remote.fingerprint == self.folder.manifest.fingerprint and not self.overwrite

    def _listed(self, remote: RemoteState, chosen: list[ShardEntry]) -> dict[int, ShardEntry]:
        """The shards that are on the Hub after a commit of the chosen ones."""
        there = remote.entries if self._is_ours(remote) else {}
        return {**there, **{entry.shard: entry for entry in chosen}}

    def _refuse_another_run(self, remote: RemoteState) -> None:
        if self.overwrite or remote.fingerprint == self.folder.manifest.fingerprint:
            return
        reasons = remote.manifest.differences(self.folder.manifest) if remote.manifest else [remote.damage]
        if any(reasons):
            raise another_run(self.repository.name, reasons, "repository")


def _message(chosen: list[ShardEntry]) -> str:
    if not chosen:
        return "Describe the extraction"
    first, last = chosen[0].shard, chosen[-1].shard
    return f"Add shard {first}" if first == last else f"Add {len(chosen)} shards, {first} to {last}"
