"""What the Hub's clients raise, in words: which repository, what the Hub answered, what to do, whether to try again."""

import functools
import importlib
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from chat_logits.errors import ToolkitError, UsageError

COMMIT = re.compile(r"[0-9a-f]{40}")
STRANGE = 3  # errors of unknown kinds that may pass, too
LONGEST_PAUSE = 60.0  # seconds between attempts that nothing else goes on beside
PASSING = {408, 409, 412, 425, 429}  # and all of 5xx: the same request may be answered otherwise later
PATIENCE = (15.0, 300.0, 60.0, 60.0)  # seconds to connect, for an answer, for a packet to leave, for a connection
Answer = TypeVar("Answer")
# Tokens, and what gives an address the right to be written to.
SECRETS = re.compile(r"hf_\w{8,}|(?<=\?)(?=[^\s'\"]*(?:Signature|sig|token)=)[^\s'\"]+", re.IGNORECASE)


class HubUnreachable(ToolkitError):
    """No answer at all: no network, no Hub, or offline mode."""


class HubRefused(ToolkitError):
    """An answer that only people can change: a token without the right, a repository that is gone."""


def explain_hub_error(error: BaseException, what: str, otherwise: type[ToolkitError] = ToolkitError) -> ToolkitError:
    """A ToolkitError for an exception of the Hub's clients, or of type ``otherwise`` if it is not of the Hub.

    ``what`` names the repository as the caller knows it, such as ``dataset user/name``. The clients wrap the
    Hub's answer differently, so the chain of causes is searched.
    """
    if isinstance(error, ToolkitError):
        return error
    from huggingface_hub.errors import HFValidationError

    failure = _Failure(error)
    if failure.status is not None:
        return ToolkitError(f"{what}: {_advice(failure)}")
    if failure.is_unreachable:
        return HubUnreachable(f"{what}: the Hub cannot be reached")
    if failure.is_broken:
        return HubUnreachable(f"{what}: the connection to the Hub broke ({str(error) or 'no answer in time'})")
    if failure.has(HFValidationError):
        return UsageError(f"{what}: no such file or folder, and no Hub id (USER/NAME) either")
    return otherwise(f"{what}: {error}")


def redact(text: str) -> str:
    """The text without the Hub's tokens and the queries of signed addresses.

    >>> redact("PUT https://x/lfs?X-Amz-Signature=12ab&part=1 with hf_abcdefghij")
    'PUT https://x/lfs?… with …'
    """
    import huggingface_hub

    token = huggingface_hub.get_token()
    return SECRETS.sub("…", text.replace(token, "…") if token else text)


def explain_loading(error: BaseException, what: str) -> ToolkitError:
    """As ``explain_hub_error``, for models and tokenizers, which may bring code of their own."""
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{what}: it brings Python code of its own, which would run here. Read that code first; then allow it with "
            "`trust_remote_code`."
        )
    return explain_hub_error(error, what)


def is_commit(revision: str) -> bool:
    """Whether a recorded revision is a Hub commit; a local folder's is a hash of 64 digits."""
    return bool(COMMIT.fullmatch(revision))


def is_transient(error: BaseException) -> bool:
    """Whether a push that ended so may go well later: all but refusals, which only people can lift."""
    if isinstance(error, ToolkitError):
        return isinstance(error, HubUnreachable)
    from huggingface_hub.errors import HFValidationError

    failure = _Failure(error)
    if failure.has(HFValidationError):
        return False
    status = failure.status
    return status is None or status in PASSING or status >= 500


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: its ``Retry-After``, or until its rate limit starts anew; None if neither."""
    from huggingface_hub.utils import parse_ratelimit_headers

    answer = _Failure(error).answer
    if answer is None:
        return None
    asked, limit = answer.headers.get("retry-after", ""), parse_ratelimit_headers(answer.headers)
    if asked.strip().isdigit():
        return float(asked)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def patiently(step: Callable[[], Answer], what: str, seconds: float) -> Answer:
    """What ``step()`` gives, tried again after longer and longer pauses where the line or the Hub fails.

    Raises ToolkitError, about ``what``, where it is refused (HubRefused) or would take more than ``seconds``.
    """
    until, pause, strange = time.monotonic() + seconds, 1.0, 0
    while True:
        try:
            return step()
        except Exception as error:
            pause = min(2 * pause, LONGEST_PAUSE)
            wait = retry_after(error) or pause * random.uniform(0.5, 1)
            failure = _Failure(error)
            strange += failure.is_strange
            if failure.status and not is_transient(error):
                raise HubRefused(str(explain_hub_error(error, what))) from error
            if not is_transient(error) or strange > STRANGE or time.monotonic() + wait > until:
                raise explain_hub_error(error, what) from error
            time.sleep(wait)


def configure_client() -> None:
    """Give the Hub's client limits to its patience, for this process: its own would wait for a dead line for ever.

    For processes that push. Its warnings, which name signed addresses and break progress bars, are not shown.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging as hub_logging

    huggingface_hub.set_client_factory(_patient_client)
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True  # its uploads have no limit to their patience
    hub_logging.set_verbosity_error()


def _patient_client():
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = PATIENCE
    return client


def find_license(repo_id: str, kind: str, commit: str | None) -> str | None:
    """The licence that a model's or dataset's card states, None where it states none or cannot be read."""
    import huggingface_hub

    card = {"model": huggingface_hub.ModelCard, "dataset": huggingface_hub.DatasetCard}[kind]
    try:
        if Path(repo_id).exists():
            return card.load(Path(repo_id) / "README.md").data.get("license")
        found = huggingface_hub.HfApi().repo_info(repo_id, repo_type=kind, revision=commit).card_data
        return (found or {}).get("license")
    except Exception:  # a note on the card is not worth a run
        return None


def is_hub_id(name: str) -> bool:
    """Whether this may be, by its form, the id of a Hub repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def resolve_commit(repo_id: str, repo_type: str, revision: str | None) -> str:
    """The commit (40 hex digits) that ``revision`` of a Hub repository names now, or named when it was cached.

    A commit is taken as it is: a thousand workers are given one. ``repo_type`` is "model" or "dataset". Raises
    ToolkitError where the Hub refuses.
    """
    import huggingface_hub

    if revision and is_commit(revision):
        return revision
    try:
        return huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha
    except Exception as error:
        explained = explain_hub_error(error, f"{repo_type} {repo_id}")
        if _Failure(error).is_unreachable:
            return _cached_commit(repo_id, repo_type, revision, explained)
        raise explained from error


def _cached_commit(repo_id: str, repo_type: str, revision: str | None, explained: ToolkitError) -> str:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, local_files_only=True
        )
    except Exception as error:
        raise HubUnreachable(f"{explained}, and nothing in the cache here serves in its place") from error
    return Path(folder).name


class _Failure:
    """An exception with all that caused it: the clients wrap the Hub's answer differently."""

    def __init__(self, error: BaseException):
        self.causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in self.causes:
            self.causes.append(cause)
            cause = cause.__cause__ or cause.__context__

    def has(self, *kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in self.causes)

    @property
    def answer(self) -> Any:
        """The Hub's response, None where there was none."""
        responses = (getattr(cause, "response", None) for cause in self.causes)
        return next((response for response in responses if getattr(response, "status_code", None)), None)

    @property
    def status(self) -> int | None:
        """The status of the Hub's answer, None where there was none."""
        return self.answer.status_code if self.answer is not None else None

    @property
    def is_unreachable(self) -> bool:
        """Whether no connection was made."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        return self.has(_client().ConnectError, _client().ConnectTimeout, OfflineModeIsEnabled)

    @property
    def is_broken(self) -> bool:
        """Whether the connection failed, made or not."""
        client = _client()
        return self.has(client.NetworkError, client.TimeoutException, client.RemoteProtocolError)

    @property
    def is_strange(self) -> bool:
        """Whether the Hub did not answer, and no known trouble kept it from that."""
        return self.status is None and not self.is_unreachable and not self.is_broken


@functools.cache
def _client() -> Any:
    """The HTTP client's module: huggingface_hub 1 uses ``httpx``, 2 uses ``httpx2``."""
    from huggingface_hub.errors import HTTPError

    return importlib.import_module(HTTPError.__module__.partition(".")[0])


def _advice(failure: _Failure) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, first = failure.status, failure.causes[0]
    if failure.has(GatedRepoError):
        return f"gated ({status}). Ask for access on its page, then set HF_TOKEN to a token that has it."
    if failure.has(RevisionNotFoundError):
        return f"no such revision on the Hub ({status})."
    if failure.has(EntryNotFoundError):
        return f"a file is missing on the Hub ({status}): {first}"
    if status in (401, 403, 404):
        return (
            f"not found on the Hub, or not yours to see ({status}). "
            "Check the name; for a private repository set HF_TOKEN to a token that may read or write it."
        )
    if status in (409, 412):
        return f"somebody else's commit came first ({status})"
    if status == 429:
        return "too many requests, says the Hub (429)"
    if status is not None and status >= 500:
        return f"the Hub fails ({status})"
    return f"the Hub answered {status}: {str(first).partition(chr(10))[0]}"
