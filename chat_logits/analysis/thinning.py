"""Thin stored rows to fewer entries, without the model.

FORMAT.md, "Thinned datasets", is the specification, and says why the tail stays unbiased.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chat_logits.errors import UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import refuse_filled
from chat_logits.storage.manifest import Manifest
from chat_logits.words import count_text
from logit_codec import (
    CODE_PROBS,
    MAX_TOKEN_ID,
    draw_uniforms,
    entry_columns,
    nucleus_cut,
    position_entropies,
    row_entries,
)


class Setting(NamedTuple):
    """How much of each position is stored: K, S and the nucleus' total."""

    top_k: int
    num_sampled: int
    top_p: float


@dataclass(frozen=True)
class Entries:
    """What is stored at n positions: ids int32 and codes uint8, (n, K) of the nucleus and (n, S) of the draws."""

    top_ids: np.ndarray
    top_codes: np.ndarray
    sampled_ids: np.ndarray
    sampled_codes: np.ndarray

    @classmethod
    def of(cls, row: dict) -> "Entries":
        """The entries of a stored row."""
        return cls(*row_entries(row, "top"), *row_entries(row, "sampled"))

    @property
    def tail_mass(self) -> np.ndarray:
        """The probability outside the nucleus, float64 (n,)."""
        return np.maximum(0.0, 1.0 - CODE_PROBS[self.top_codes].sum(axis=1))

    @property
    def mean_entropy(self) -> float:
        """The row's mean entropy, as in its column."""
        return float(np.float32(position_entropies(self.top_codes, self.sampled_codes).mean()))

    def columns(self) -> dict:
        """A row's six columns of ids and codes."""
        return {
            **entry_columns("top", self.top_codes, self.top_ids),
            **entry_columns("sampled", self.sampled_codes, self.sampled_ids),
        }


class TailList(NamedTuple):
    """The items that a thinned tail is drawn from, in id order, (n, K + S): ids, codes, and ``weights`` float64.

    Empty places come last, with weight 0 and code 0.
    """

    ids: np.ndarray
    codes: np.ndarray
    weights: np.ndarray


def kept_entries(entries: Entries, setting: Setting, top_p: float) -> np.ndarray:
    """Which entries of the nucleus a setting keeps, bool (n, K); ``top_p`` is the total that it was cut at."""
    kept = entries.top_codes > 0
    kept[:, setting.top_k :] = False
    return kept & nucleus_cut(CODE_PROBS[entries.top_codes], setting.top_p) if setting.top_p < top_p else kept


def tail_list(entries: Entries, kept: np.ndarray) -> TailList:
    """The new tail if these entries are ``kept``: the dropped ones with their probabilities, the draws with equal
    shares."""
    dropped, drawn = (entries.top_codes > 0) & ~kept, entries.sampled_codes > 0
    share = entries.tail_mass / max(1, entries.sampled_codes.shape[1])
    weights = np.hstack([CODE_PROBS[entries.top_codes] * dropped, share[:, None] * drawn])
    present = np.hstack([dropped, drawn])
    weights = np.where(weights.any(axis=1, keepdims=True), weights, present)
    ids = np.hstack([entries.top_ids, entries.sampled_ids])
    codes = np.hstack([entries.top_codes, entries.sampled_codes]) * present
    order = np.argsort(np.where(present, ids, MAX_TOKEN_ID), axis=1, kind="stable")
    return TailList(*(np.take_along_axis(values, order, axis=1) for values in (ids * present, codes, weights)))


def thin_entries(entries: Entries, setting: Setting, top_p: float, uniforms: np.ndarray) -> Entries:
    """The entries thinned to a setting; ``top_p`` is the total that they were cut at, ``uniforms`` (n,)."""
    kept, width = kept_entries(entries, setting, top_p), setting.top_k
    tail = tail_list(entries, kept)
    picked = _systematic(tail.weights, uniforms, setting.num_sampled)
    ids, codes = (np.take_along_axis(values, picked, axis=1) for values in (tail.ids, tail.codes))
    if setting.num_sampled == entries.sampled_codes.shape[1]:  # if nothing is dropped, draws stay the same
        is_whole = (kept == (entries.top_codes > 0)).all(axis=1)[:, None]
        ids, codes = np.where(is_whole, entries.sampled_ids, ids), np.where(is_whole, entries.sampled_codes, codes)
    return Entries((entries.top_ids * kept)[:, :width], (entries.top_codes * kept)[:, :width], ids, codes)


def _systematic(weights: np.ndarray, uniforms: np.ndarray, count: int) -> np.ndarray:
    """The items (n, count) that systematic sampling picks from lists with ``weights`` (n, m); the first of an empty
    list."""
    running = np.cumsum(weights, axis=1)
    thresholds = (uniforms[:, None] + np.arange(count)) / max(1, count) * running[:, -1:]
    picked = np.empty(thresholds.shape, np.int64)
    for j in range(count):
        picked[:, j] = (running <= thresholds[:, j : j + 1]).sum(axis=1)
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)  # thresholds pass it only by rounding
    return np.minimum(picked, np.where(weights.any(axis=1), last, 0)[:, None])


def thin_row(row: dict, setting: Setting, manifest: Manifest) -> dict:
    """A stored row of the dataset with this manifest, thinned to a setting that ``check_setting`` accepts."""
    stream = len(manifest.thinned_from or []) + 1
    uniforms = draw_uniforms(manifest.seed, row["source_index"], row["num_tokens"], stream)
    numbers = {name: np.asarray(row[name], np.float32) for name in ("logsumexp", "token_log_probs")}
    thinned = thin_entries(Entries.of(row), setting, manifest.top_p, uniforms)
    return {**row, **numbers, **thinned.columns(), "mean_entropy": thinned.mean_entropy}


def read_setting(thin: Sequence) -> tuple[Setting, str]:
    """The setting and the folder from (K, S, P, folder), given as numbers or texts. Raises UsageError for anything
    else."""
    words = " ".join(map(str, thin))
    try:
        top_k, num_sampled, top_p, folder = thin
        setting = Setting(int(top_k), int(num_sampled), float(top_p))
    except (TypeError, ValueError) as error:
        raise UsageError(f"`thin` {words}: expected K S P FOLDER, such as 16 8 0.95 outputs/thin") from error
    if not str(folder):
        raise UsageError(f"`thin` {words}: expected the name of a folder")
    return setting, str(folder)


def check_setting(setting: Setting, manifest: Manifest) -> None:
    """Raise UsageError for an invalid setting, and for one that the dataset with this manifest cannot be thinned to."""
    if setting.top_k < 1 or setting.num_sampled < 0 or not 0 < setting.top_p <= 1:
        raise UsageError(f"`thin` {_words(setting)}: expected K of 1 or more, S of 0 or more, P above 0 and up to 1")
    if setting.num_sampled and not manifest.num_sampled:
        raise UsageError(
            f"`thin` {_words(setting)}: the dataset has no draws from the tail, and none can be made from it without "
            "bias; expected S 0, or extract with `num_sampled`"
        )
    stored = stored_setting(manifest)
    for name, value, most in zip("KSP", setting, stored, strict=True):
        if value > most:
            raise UsageError(f"`thin` {_words(setting)}: {name} {value:g} is more than the {most:g} that is stored")


def stored_setting(manifest: Manifest) -> Setting:
    """A dataset's own setting."""
    return Setting(manifest.top_k, manifest.num_sampled, manifest.top_p)


def _words(setting: Setting) -> str:
    return " ".join(f"{value:g}" for value in setting)


# --- a whole dataset ---


@dataclass(frozen=True, repr=False)
class Thinning:
    """A thinned dataset in ``folder``, and the one that it was made from; bytes are those of all shards."""

    dataset_id: str
    folder: str
    top_k: int
    num_sampled: int
    top_p: float
    num_conversations: int
    num_tokens: int
    num_bytes: int
    num_bytes_before: int

    def as_dict(self) -> dict:
        """All of it as plain values."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content}

    def __repr__(self) -> str:
        return f"<Thinning of {self.dataset_id} to {self.folder}: {count_text(self.num_tokens, 'token')}>"


def thin_dataset(dataset: StoredDataset, setting: Setting, folder: str) -> Thinning:
    """Write a thinned dataset to a new or an empty folder.

    Raises UsageError for a folder that is not empty and as ``check_setting`` does, ToolkitError if there are no rows.
    """
    from chat_logits.storage.derived import write_derived  # with the card, imports huggingface_hub

    check_setting(setting, dataset.manifest)
    refuse_filled(Path(folder), "thin")
    dataset.refuse_empty()
    before, manifest = dataset.manifest, dataset.manifest.thinned(setting.top_k, setting.top_p, setting.num_sampled)
    entries = write_derived(dataset, manifest, Path(folder), lambda row: thin_row(row, setting, before))
    return Thinning(
        dataset_id=dataset.dataset_id,
        folder=str(folder),
        **setting._asdict(),
        num_conversations=sum(entry.num_rows for entry in entries),
        num_tokens=sum(entry.num_tokens for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        num_bytes_before=sum(dataset.sizes().values()),
    )
