"""A Hub dataset repository at one branch: what is in it, and commits that change it."""

from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from errors import UsageError
from hub_access import patient_client
from logit_dataset import EXTRACTION_FILE, SHARDS_FILE, check_extraction, read_json, shard_entries
from run_fingerprint import run_fingerprint
from shard_files import ShardEntry

# What makes a repository without a run somebody's dataset; a card, a licence or notes do not.
DATA_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".gz", ".zip", ".zst", ".bin", ".safetensors")


@dataclass
class RemoteState:
    """A branch as it was seen: its newest commit, its files' hashes, and the run that they are of, if any.

    ``files`` maps paths to SHA-256 (large files) or git's hash; ``entries`` are the shards that are listed and there.
    """

    head: str
    files: dict[str, str] = field(default_factory=dict)
    extraction: dict | None = None
    entries: dict[int, ShardEntry] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str | None:
        return run_fingerprint(self.extraction) if self.extraction else None


class Repository:
    """The repository ``repo_id`` at ``branch``; ``private`` if it has to be made."""

    def __init__(self, repo_id: str, branch: str | None, private: bool):
        self.repo_id, self.branch, self.private = repo_id, branch or "main", private
        self._api = huggingface_hub.HfApi()
        self._is_made = False
        huggingface_hub.set_client_factory(patient_client)
        hub_logging.set_verbosity_error()  # its warnings name signed addresses, and break the progress bar
        disable_progress_bars()

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/datasets/{self.repo_id}/tree/{self.branch}"

    def look(self) -> RemoteState:
        """What is there now; makes repository and branch if they are missing. Raises what the Hub's client raises."""
        self._make()
        head = self._api.repo_info(self.repo_id, repo_type="dataset", revision=self.branch).sha
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, repo_type="dataset", revision=head)
        files = {item.path: item.lfs.sha256 if item.lfs else item.blob_id for item in tree if hasattr(item, "blob_id")}
        if EXTRACTION_FILE not in files:
            self._refuse_other_data(files)
            return RemoteState(head, files)
        what = f"--output_repo {self.repo_id}"
        extraction = read_json(self._download(EXTRACTION_FILE, head), f"{what}: {EXTRACTION_FILE}")
        check_extraction(extraction, what)
        listing = self._download(SHARDS_FILE, head) if SHARDS_FILE in files else None
        listed = shard_entries(read_json(listing, f"{what}: {SHARDS_FILE}"), what) if listing else []
        return RemoteState(head, files, extraction, {entry.shard: entry for entry in listed if entry.path in files})

    def commit(self, message: str, additions: dict[str, Path | str], deletions: list[str], parent: str) -> str:
        """One commit on top of ``parent``: files by their paths or texts. Returns its hash.

        Raises what the Hub's client raises; 412 where ``parent`` is not the newest commit any more.
        """
        adds = [
            huggingface_hub.CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
            for name, content in additions.items()
        ]
        deletes = [huggingface_hub.CommitOperationDelete(name) for name in deletions]
        return self._api.create_commit(
            self.repo_id,
            [*deletes, *adds],
            commit_message=message,
            repo_type="dataset",
            revision=self.branch,
            parent_commit=parent,
        ).oid

    def _make(self) -> None:
        if self._is_made:
            return
        self._api.create_repo(self.repo_id, repo_type="dataset", private=self.private, exist_ok=True)
        if self.branch != "main":
            self._api.create_branch(self.repo_id, branch=self.branch, repo_type="dataset", exist_ok=True)
        self._is_made = True

    def _download(self, name: str, commit: str) -> Path:
        return Path(self._api.hf_hub_download(self.repo_id, name, repo_type="dataset", revision=commit))

    def _refuse_other_data(self, files: dict[str, str]) -> None:
        others = [path for path in files if path.endswith(DATA_SUFFIXES) or path.startswith("data/")]
        if others:
            raise UsageError(
                f"--output_repo {self.repo_id}: the repository holds other files, such as {others[0]}. Choose another."
            )
