"""Open a logit dataset with the tokenizer that it was extracted with, from its recorded place or from another."""

from pathlib import Path

from chat_logits.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from chat_logits.data.tokenizer_files import read_tokenizer
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import is_commit, resolve_commit
from chat_logits.storage.dataset import StoredDataset, open_dataset


class WrongKind(UsageError, TypeError):
    """A value of a type that does not fit."""


def open_given(dataset_id: object, revision: str | None = None) -> StoredDataset:
    """``open_dataset`` for a folder or a Hub id, as text or a Path. Raises WrongKind for anything else."""
    if isinstance(dataset_id, str | Path):
        return open_dataset(str(dataset_id), revision)
    raise WrongKind(
        f"a {type(dataset_id).__name__}: expected the folder or the Hub id of a logit dataset, such as user/logits; "
        "what `datasets` has loaded does not say how it was extracted"
    )


def open_with_tokenizer(
    dataset_id: str | Path,
    revision: str | None = None,
    tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
    model_id: str | None = None,
    option: str = "tokenizer_id",
) -> tuple[StoredDataset, object]:
    """A logit dataset, a folder or a Hub id at ``revision``, and the tokenizer that it was extracted with.

    ``tokenizer_id`` says where the tokenizer is now, or ``model_id`` where the whole model is; errors name ``option``
    as the one to use. Raises ToolkitError if it is not the recorded tokenizer, UsageError if it was given.
    """
    dataset = open_given(dataset_id, revision)
    return dataset, tokenizer_of(dataset, tokenizer_id, trust_remote_code, model_id, option)


def open_beside(
    dataset: StoredDataset,
    compare: str,
    compare_revision: str | None = None,
    compare_tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[StoredDataset, object | None]:
    """The logit dataset to compare an open one with, and its tokenizer, None if both have the same.

    Raises UsageError for a ``compare_tokenizer_id`` if both have the same tokenizer, and as ``open_with_tokenizer``
    does.
    """
    other = open_given(compare, compare_revision)
    if other.manifest.tokenizer_fingerprint != dataset.manifest.tokenizer_fingerprint:
        return other, tokenizer_of(other, compare_tokenizer_id, trust_remote_code, option="compare_tokenizer_id")
    if compare_tokenizer_id is not None:
        raise UsageError(
            f"`compare_tokenizer_id` {compare_tokenizer_id}: {other.dataset_id} has the tokenizer of "
            f"{dataset.dataset_id}, which `tokenizer_id` is for"
        )
    return other, None


def tokenizer_of(
    dataset: StoredDataset,
    tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
    model_id: str | None = None,
    option: str = "tokenizer_id",
):
    """The tokenizer that a dataset was extracted with; arguments and errors are ``open_with_tokenizer``'s."""
    given = tokenizer_id or model_id
    source, commit = recorded_place(dataset, given, option)
    if commit is None and not Path(source).exists():  # fails before transformers is imported
        commit = resolve_commit(source, "model", None)
    gguf_file = None if tokenizer_id else dataset.manifest.gguf_file
    place = source, commit, gguf_file, trust_remote_code
    error = UsageError if given else ToolkitError
    return _with_fingerprint(dataset.manifest.tokenizer_fingerprint, *place, option, error)


def _with_fingerprint(
    expected: str,
    source: str,
    commit: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    option: str,
    error: type[ToolkitError],
):
    """The tokenizer with this fingerprint, if possible from its files alone, which takes a tenth of the time."""
    tokenizer = None if gguf_file else read_tokenizer(source, commit)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) == expected:
        return tokenizer
    tokenizer = load_tokenizer(source, commit, gguf_file, trust_remote_code)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != expected:
        raise error(
            f"tokenizer of {source}: fingerprint {fingerprint[:12]}, expected {expected[:12]}; "
            f"it is not the tokenizer that the extraction used. Name another with `{option}`."
        )
    return tokenizer


def recorded_place(dataset: StoredDataset, given: str | None, option: str) -> tuple[str, str | None]:
    """Where to load the recorded model from, ``given`` or as recorded, and the Hub commit, if any.

    A folder that was recorded relative to where the extraction ran is looked for from the current folder, and from the
    dataset's folder upwards. Raises ToolkitError if it is not found; the message names ``option``.
    """
    source, revision = dataset.manifest.model_id, dataset.manifest.model_revision
    if given is not None:
        return given, None
    if is_commit(revision):
        return source, revision
    above = Path(dataset.dataset_id).resolve().parents if dataset.revision is None else ()
    for place in (Path(source), *(folder / source for folder in above)):
        if place.exists():
            return str(place), None
    raise ToolkitError(
        f"the model was the local folder {source}, which is not here. Say where it lies now: `{option}` FOLDER"
    )
