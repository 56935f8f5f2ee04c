"""What the Hub's clients raise, in words: which repository, what the Hub answered, what to do."""

from pathlib import Path

from errors import ToolkitError, UsageError

UNREACHABLE = {"ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"}


class HubUnreachable(ToolkitError):
    """No answer at all: no network, no Hub, or offline mode."""


def explain_hub_error(error: BaseException, what: str, otherwise: type[ToolkitError] = ToolkitError) -> ToolkitError:
    """A ToolkitError for an exception of the Hub's clients, or of type ``otherwise`` if it is not of the Hub.

    ``what`` names the repository as the caller knows it, such as ``dataset user/name``. The clients wrap the
    Hub's answer differently, so the chain of causes is searched.
    """
    chain = _causes(error)
    status = next((status for status in map(_status, chain) if status), None)
    names = {type(cause).__name__ for cause in chain}
    if status is not None:
        return ToolkitError(f"{what}: {_advice(status, names, chain)}")
    if names & UNREACHABLE:
        return HubUnreachable(f"{what}: the Hub cannot be reached, and nothing here serves in its place")
    if "HFValidationError" in names:
        return UsageError(f"{what}: no such file or folder, and no Hub id (USER/NAME) either")
    return otherwise(f"{what}: {error}")


def resolve_commit(repo_id: str, repo_type: str, revision: str | None) -> str:
    """The commit (40 hex digits) that ``revision`` of a Hub repository names now, or named when it was cached.

    ``repo_type`` is "model" or "dataset". Raises ToolkitError where the Hub refuses.
    """
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha
    except Exception as error:
        explained = explain_hub_error(error, f"{repo_type} {repo_id}")
        if UNREACHABLE & {type(cause).__name__ for cause in _causes(error)}:
            return _cached_commit(repo_id, repo_type, revision, explained)
        raise explained from error


def _cached_commit(repo_id: str, repo_type: str, revision: str | None, explained: ToolkitError) -> str:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, local_files_only=True
        )
    except Exception as error:
        raise explained from error
    return Path(folder).name


def _causes(error: BaseException) -> list[BaseException]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _advice(status: int, names: set[str], chain: list[BaseException]) -> str:
    if "GatedRepoError" in names:
        return f"gated ({status}). Ask for access on its page, then set HF_TOKEN to a token that has it."
    if "RevisionNotFoundError" in names:
        return f"no such revision on the Hub ({status})."
    if "EntryNotFoundError" in names or "RemoteEntryNotFoundError" in names:
        return f"a file is missing on the Hub ({status}): {chain[0]}"
    if status in (401, 403, 404):
        return (
            f"not found on the Hub, or not yours to see ({status}). "
            "Check the name; for a private repository set HF_TOKEN to a token that may read or write it."
        )
    return f"the Hub answered {status}: {chain[0]}"
