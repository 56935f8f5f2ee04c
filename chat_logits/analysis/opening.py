"""Opening a logit dataset with the tokenizer that it was extracted with, from its recorded place or from another."""

from pathlib import Path

from chat_logits.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from chat_logits.data.tokenizer_files import read_tokenizer
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import is_commit, resolve_commit
from chat_logits.storage.dataset import StoredDataset, open_dataset


def open_with_tokenizer(
    dataset_id: str,
    revision: str | None = None,
    tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
    model_id: str | None = None,
) -> tuple[StoredDataset, object]:
    """A logit dataset, a folder or a Hub id at ``revision``, and the tokenizer that it was extracted with.

    ``tokenizer_id`` says where that lies now, or ``model_id`` where the whole model does. Raises ToolkitError where it
    is another tokenizer than the one recorded.
    """
    dataset = open_dataset(str(dataset_id), revision)
    return dataset, tokenizer_of(dataset, tokenizer_id, trust_remote_code, model_id)


def open_beside(
    dataset: StoredDataset,
    compare: str,
    compare_revision: str | None = None,
    compare_tokenizer_id: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[StoredDataset, object | None]:
    """The logit dataset to compare an open one with, and its tokenizer, None where that is the open one's.

    Raises UsageError for a ``compare_tokenizer_id`` where one tokenizer is both datasets', ToolkitError as
    ``open_with_tokenizer``.
    """
    other = open_dataset(str(compare), compare_revision)
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
    """The tokenizer that a dataset was extracted with; arguments and errors are ``open_with_tokenizer``'s.

    ``option`` is what could say where it lies.
    """
    source, commit = recorded_place(dataset, tokenizer_id or model_id, option)
    if commit is None and not Path(source).exists():  # noticed before transformers is imported
        commit = resolve_commit(source, "model", None)
    gguf_file = None if tokenizer_id else dataset.manifest.gguf_file
    expected = dataset.manifest.tokenizer_fingerprint
    return _with_fingerprint(expected, source, commit, gguf_file, trust_remote_code, option)


def _with_fingerprint(
    expected: str, source: str, commit: str | None, gguf_file: str | None, trust_remote_code: bool, option: str
):
    """The tokenizer with this fingerprint: from its files alone where they have it, in a tenth of the time."""
    tokenizer = None if gguf_file else read_tokenizer(source, commit)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) == expected:
        return tokenizer
    tokenizer = load_tokenizer(source, commit, gguf_file, trust_remote_code)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != expected:
        raise ToolkitError(
            f"tokenizer of {source}: fingerprint {fingerprint[:12]}, expected {expected[:12]}; "
            f"it is not the tokenizer that the extraction used. Name another with `{option}`."
        )
    return tokenizer


def recorded_place(dataset: StoredDataset, given: str | None, option: str) -> tuple[str, str | None]:
    """Where the recorded model is to be loaded from, ``given`` or as recorded, and the Hub commit, None without one.

    A folder that was recorded relative to where the extraction ran is looked for from here, and from the dataset's
    folder upwards. Raises ToolkitError where it is not there; ``option`` is what could say where it lies.
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
        f"the model was the local folder {source}, which is not here. Say where it lies now: --{option} FOLDER"
    )
