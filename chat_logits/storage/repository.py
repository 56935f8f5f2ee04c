"""One branch of a Hub dataset repository: its contents, and commits to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import UPLOAD
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, Manifest
from chat_logits.storage.shard_list import SHARDS_FILE, ShardEntry, ShardList, read_shard_list

# Files that show that a repository without a run holds another dataset; a card, a licence or notes do not.
DATA_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".gz", ".zip", ".zst", ".bin", ".safetensors")


@dataclass
class RemoteState:
    """The state of a branch when it was read: its newest commit, its files' paths, and the run in it, if any.

    ``files`` are for the first commit of a run and are not updated after it. ``entries`` are the shards that are both
    listed and present, ``card`` is the card's text; ``is_finished`` is what the list says about the run. ``head`` is
    None if repository or branch are missing; ``damage`` says why ``extraction.json`` cannot be read.
    """

    head: str | None
    files: frozenset[str] = frozenset()
    manifest: Manifest | None = None
    entries: dict[int, ShardEntry] = field(default_factory=dict)
    card: str = ""
    damage: str = ""
    is_finished: bool = True

    @property
    def fingerprint(self) -> str | None:
        return self.manifest.fingerprint if self.manifest else None


class Repository:
    """The repository ``repo_id`` at ``branch``; if it has to be created, it is ``private`` or not."""

    def __init__(self, repo_id: str, branch: str | None, private: bool):
        self.repo_id, self.branch, self.private = repo_id, branch or "main", private
        self.name = f"`output_repo` {repo_id}"
        self._api = huggingface_hub.HfApi()

    @property
    def at(self) -> str:
        """A text that identifies repository and branch."""
        return f"{self.repo_id}@{self.branch}"

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/datasets/{self.repo_id}/tree/{self.branch}"

    def look(self) -> RemoteState:
        """The current state. Raises what the Hub's client raises, and UsageError for a repository with other data."""
        try:
            head = self._api.repo_info(self.repo_id, repo_type="dataset", revision=self.branch).sha
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return RemoteState(None)
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, repo_type="dataset", revision=head)
        files = frozenset(item.path for item in tree if hasattr(item, "blob_id"))
        if EXTRACTION_FILE not in files:
            self._refuse_other_data(files)
            return RemoteState(head, files)
        try:
            manifest = Manifest.read(self._download(EXTRACTION_FILE, head), self.name)
        except ToolkitError as error:
            return RemoteState(head, files, damage=str(error))
        card = self._download(CARD_FILE, head).read_text(encoding="utf-8") if CARD_FILE in files else ""
        listed, is_finished = self._shard_list(files, head)
        entries = {entry.shard: entry for entry in listed if entry.path in files}
        return RemoteState(head, files, manifest, entries, card, is_finished=is_finished)

    def make(self) -> None:
        """Create repository and branch if missing; a new branch starts at main's first commit, without main's data."""
        self._api.create_repo(self.repo_id, repo_type="dataset", private=self.private, exist_ok=True)
        branches = self._api.list_repo_refs(self.repo_id, repo_type="dataset").branches
        if self.branch not in [branch.name for branch in branches]:
            first = self._api.list_repo_commits(self.repo_id, repo_type="dataset")[-1].commit_id
            self._api.create_branch(
                self.repo_id, branch=self.branch, revision=first, repo_type="dataset", exist_ok=True
            )

    def _shard_list(self, files: frozenset[str], head: str) -> ShardList:
        """The list of shards; empty if the file is missing or damaged, as it will be rewritten."""
        if SHARDS_FILE not in files:
            return ShardList([], False)
        try:
            return read_shard_list(self._download(SHARDS_FILE, head), self.name)
        except ToolkitError:
            return ShardList([], False)

    def upload(self, name: str, file: Path) -> huggingface_hub.CommitOperationAdd:
        """Upload a file without a commit; returns the operation for a commit, which any process may then make.

        Retries if the network or the Hub fails. Raises ToolkitError if the retries fail, too.
        """
        addition = huggingface_hub.CommitOperationAdd(name, file)
        arguments = {"repo_type": "dataset", "revision": self.branch}
        step = partial(self._api.preupload_lfs_files, self.repo_id, [addition], **arguments)
        UPLOAD.call(step, self.name)
        addition._remote_oid = None  # the client would omit a file that is there, but an earlier commit may delete it
        if addition._is_uploaded:
            return addition
        return huggingface_hub.CommitOperationAdd(name, file.read_bytes())  # the branch stores such files in git itself

    def commit(
        self,
        message: str,
        additions: dict[str, object],
        deletions: list[str],
        parent: str | None,
        check: Callable[[], None] | None = None,
    ) -> str:
        """Make one commit on top of ``parent`` and return its hash. ``additions`` are paths, texts, or what ``upload``
        returned, by their names in the repository.

        ``check`` is called once the files' checksums are known; the Hub compares what is sent with these. Raises what
        ``check`` and the Hub's client raise; 412 if ``parent`` is no longer the newest commit.
        """
        adds = [_addition(name, content) for name, content in additions.items()]
        if check:
            check()
        disable_progress_bars()
        deletes = [huggingface_hub.CommitOperationDelete(name) for name in deletions]
        return self._api.create_commit(
            self.repo_id,
            [*deletes, *adds],
            commit_message=message,
            repo_type="dataset",
            revision=self.branch,
            parent_commit=parent,
        ).oid

    def _download(self, name: str, commit: str) -> Path:
        return Path(self._api.hf_hub_download(self.repo_id, name, repo_type="dataset", revision=commit))

    def _refuse_other_data(self, files: frozenset[str]) -> None:
        others = [path for path in files if path.endswith(DATA_SUFFIXES) or path.startswith("data/")]
        if others:
            raise UsageError(f"{self.name}: the repository holds other files, such as {min(others)}. Choose another.")


def _addition(name: str, content) -> huggingface_hub.CommitOperationAdd:
    if isinstance(content, huggingface_hub.CommitOperationAdd):
        return content
    return huggingface_hub.CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
