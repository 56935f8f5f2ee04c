"""Errors of the Hub's clients explained: which repository, what the Hub answered, what to do, whether to retry."""

import errno
import functools
import importlib
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.paths import is_there

FIRST_PAUSE = 1.0  # seconds until the second attempt
SAID, SHOWN = 200, 500  # characters shown of the Hub's error message, and of a library's
FOR_EVER = 10.0**8  # seconds: three years, which a lock can still wait for
# Environment variables that move one cache each, while HF_HOME moves all
CACHES = ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
PASSING = {408, 409, 412, 425, 429}  # and all of 5xx: the same request may succeed later
Answer = TypeVar("Answer")
# Access tokens, in lower case (HF_HOME is not one), the query that lets a signed address be written to, and the user
# and password of an address.
SECRETS = re.compile(
    r"(?-i:hf_)\w{8,}|(?<=\?)(?=[^\s'\"]*(?:Signature|sig|token)=)[^\s'\"]+|(?<=://)[^\s'\"/@]+(?=@)", re.IGNORECASE
)


class HubUnreachable(ToolkitError):
    """The Hub did not answer: no network, the Hub is down, or offline mode."""


class HubRefused(ToolkitError):
    """The Hub refused, and a retry cannot help: the token lacks a permission, or the repository is gone."""


def explain_hub_error(error: BaseException, name: str, otherwise: type[ToolkitError] = ToolkitError) -> ToolkitError:
    """A ToolkitError for an exception of the Hub's clients, or one of type ``otherwise`` for any other exception.

    ``name`` is the repository in the caller's words, such as ``dataset user/name``. The clients wrap the Hub's
    response in different ways, so the chain of causes is searched.
    """
    if isinstance(error, ToolkitError):
        return error
    from huggingface_hub.errors import HFValidationError

    failure = Failure(error)
    if failure.status is not None:
        return ToolkitError(f"{name}: {_advice(failure)}")
    if failure.is_offline:
        return UsageError(f"{name}: offline mode is on (HF_HUB_OFFLINE), so the Hub is not asked")
    if failure.is_unreachable:
        endpoint = os.environ.get("HF_ENDPOINT")
        return HubUnreachable(f"{name}: the Hub cannot be reached{f' at HF_ENDPOINT {endpoint}' if endpoint else ''}")
    if failure.is_html:
        return HubUnreachable(
            f"{name}: HTML instead of the Hub's JSON, perhaps from a proxy or from a network's login page"
        )
    if failure.is_broken:
        return HubUnreachable(f"{name}: the connection to the Hub broke ({str(error) or 'no answer in time'})")
    if failure.has(HFValidationError):
        return UsageError(f"{name}: no such file or folder, and not a Hub id (USER/NAME) either")
    if refused := next(filter(None, map(_refused_cache, failure.causes)), None):
        return refused
    return otherwise(f"{name}: {_in_one_line(error)}")


def _in_one_line(error: BaseException) -> str:
    """The first paragraph of a library's message: some continue with advice that does not apply to the toolkit."""
    said = " ".join(re.split(r"\n\s*\n", str(error).strip())[0].split())
    return (
        said[:SHOWN] if said and not isinstance(error, KeyError) else f"{type(error).__name__} {said[:SHOWN]}".rstrip()
    )


def _refused_cache(error: BaseException) -> UsageError | None:
    """The error for a cache of the libraries that the system does not let us write to or lock; None for any other
    error."""
    from huggingface_hub import constants

    if not isinstance(error, OSError):
        return None
    caches = {name: os.environ[name] for name in CACHES if os.environ.get(name)} | {"HF_HOME": constants.HF_HOME}
    if error.errno == errno.ENOLCK:  # without the name of a file
        places = " or ".join(f"{name} {folder}" for name, folder in caches.items())
        fault = f"{places}: the file system of this cache does not lock files ({error.strerror})"
        return UsageError(f"{fault}. Set it to a folder on a local disk.")
    if not isinstance(error.filename, str):
        return None
    refused = Path(error.filename).resolve()
    for name, folder in caches.items():
        cache = Path(folder).resolve()
        is_denied = refused.is_relative_to(cache) and error.errno in DENIED
        if is_denied or (cache.is_relative_to(refused) and not is_there(cache)):
            fault = f"{folder}: a cache cannot be written there ({error.strerror})"
            return UsageError(f"{fault}. Set {name} to a folder that can be written.")
    return None


def redact(text: str) -> str:
    """The text without the Hub's tokens and the queries of signed addresses.

    >>> redact("PUT https://x/lfs?X-Amz-Signature=12ab&part=1 with hf_abcdefghij")
    'PUT https://x/lfs?… with …'
    """
    import huggingface_hub

    token = None
    with suppress(OSError):  # there is no folder to look for it in
        token = huggingface_hub.get_token()
    return SECRETS.sub("…", text.replace(token, "…") if token else text)


def explain_loading(error: BaseException, name: str) -> ToolkitError:
    """As ``explain_hub_error``, for models and tokenizers, which may come with their own code."""
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{name}: it comes with its own Python code, which would run here. Read that code first; then allow it "
            "with `trust_remote_code`."
        )
    if type(error).__name__ == "SafetensorError":
        return ToolkitError(f"{name}: its safetensors are damaged, or were not fetched ({error}). Copy it again.")
    return explain_hub_error(error, name)


def failure_kind(error: BaseException) -> str:
    """Whether a failed request to the Hub is worth a retry: a field of ``Retries``, or "final".

    "passing" is a temporary failure of the network or the Hub, "refused" a response that a retry cannot change,
    "unknown" any error that is neither the Hub's nor the toolkit's own.
    """
    if isinstance(error, ToolkitError):
        return "passing" if isinstance(error, HubUnreachable) else "final"
    from huggingface_hub.errors import HFValidationError

    failure = Failure(error)
    if failure.has(HFValidationError) or failure.is_offline:
        return "final"
    if failure.status is not None:
        return "passing" if failure.status in PASSING or failure.status >= 500 else "refused"
    return "passing" if failure.is_unreachable or failure.is_broken or failure.is_html else "unknown"


def is_transient(error: BaseException) -> bool:
    """Whether a step that failed with this error may succeed on a retry."""
    return failure_kind(error) in ("passing", "unknown")


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: ``Retry-After``, or the time until its rate limit resets; None if neither."""
    from huggingface_hub.utils import parse_ratelimit_headers

    answer = Failure(error).answer
    if answer is None:
        return None
    asked, limit = answer.headers.get("retry-after", "").strip(), parse_ratelimit_headers(answer.headers)
    seconds = _seconds_of(asked)
    if seconds is None and limit and limit.remaining == 0:
        seconds = float(limit.reset_in_seconds)
    return None if seconds is None else min(seconds, FOR_EVER)


def _seconds_of(asked: str) -> float | None:
    """Seconds to wait by a ``Retry-After``, which is a number or a date; None if it is neither.

    >>> _seconds_of("7"), _seconds_of("Wed, 21 Oct 2015 07:28:00 GMT"), _seconds_of("²")
    (7.0, 0.0, None)
    """
    if asked.isascii() and asked.isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


@dataclass(frozen=True)
class Retries:
    """Whether a failed step at the Hub is retried, and after how long. The caller does the waiting.

    ``passing``, ``unknown`` and ``refused`` are how many failures in a row of each kind (``failure_kind``) are followed
    by another attempt. The pause doubles each time, with jitter, up to ``longest`` seconds; if the Hub asks for a
    longer one, that is used, up to ``longest_asked`` seconds. ``huggingface_hub`` itself repeats single requests,
    including most uploads, for half a minute; these retries are for failures that last longer, and for steps that have
    to look at the repository again.
    """

    passing: float
    unknown: float
    refused: float = 0
    longest: float = 60.0
    longest_asked: float = 600.0

    def pause(self, error: BaseException, failures: Counter[str]) -> float | None:
        """Seconds until the next attempt, None to give up. Counts the error's kind in ``failures``."""
        kind = failure_kind(error)
        failures[kind] += 1
        asked = retry_after(error)
        if kind == "final" or failures[kind] > getattr(self, kind) or (asked or 0) > self.longest_asked:
            return None
        own = min(self.longest, FIRST_PAUSE * 2 ** min(20, failures.total() - 1)) * random.uniform(0.5, 1)
        return own if asked is None else max(own, asked + random.uniform(0, 1))

    def call(self, step: Callable[[], Answer], name: str) -> Answer:
        """The result of ``step()``, retried if need be. Raises ToolkitError about ``name``; HubRefused if refused."""
        failures: Counter[str] = Counter()
        while True:
            try:
                return step()
            except Exception as error:
                wait = self.pause(error, failures)
                if wait is None:
                    explained = explain_hub_error(error, name)
                    is_refused = failure_kind(error) == "refused"
                    raise (HubRefused(str(explained)) if is_refused else explained) from error
                time.sleep(wait)


# For a shard that is stored nowhere else: about half an hour.
UPLOAD = Retries(passing=45, unknown=3, longest_asked=1800.0)
# For a run that cannot begin without the Hub.
START = Retries(passing=6, unknown=3, longest_asked=60.0)
# For a commit during a run.
BESIDE = Retries(passing=math.inf, unknown=math.inf, refused=5, longest=300.0, longest_asked=math.inf)
# For a commit that a finished run waits for.
LAST = Retries(passing=5, unknown=5, refused=5)


class Failure:
    """An exception with its chain of causes: the clients wrap the Hub's response in different ways."""

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
        """The Hub's response, None if there was none."""
        responses = (getattr(cause, "response", None) for cause in self.causes)
        return next((response for response in responses if getattr(response, "status_code", None)), None)

    @property
    def status(self) -> int | None:
        """The status of the Hub's response, None if there was none."""
        return self.answer.status_code if self.answer is not None else None

    @property
    def is_unreachable(self) -> bool:
        """Whether no connection could be made, or none was to be made."""
        return self.is_offline or self.has(_client().ConnectError, _client().ConnectTimeout)

    @property
    def is_offline(self) -> bool:
        """Whether no connection was to be made: offline mode."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        return self.has(OfflineModeIsEnabled)

    @property
    def is_broken(self) -> bool:
        """Whether the connection failed, before or after it was made."""
        client = _client()
        return self.has(client.NetworkError, client.TimeoutException, client.RemoteProtocolError)

    @property
    def is_html(self) -> bool:
        """Whether the response was HTML instead of JSON."""
        documents = [cause.doc for cause in self.causes if isinstance(cause, json.JSONDecodeError)]
        return any(document.lstrip()[:1] == "<" for document in documents)

    @property
    def said(self) -> str:
        """The Hub's own error message in one line; empty without one."""
        if self.answer is None:
            return ""
        try:
            said = self.answer.headers.get("x-error-message") or self.answer.json()["error"]
        except Exception:  # the body was not read, or has another form
            return ""
        return " ".join(said.split())[:SAID] if isinstance(said, str) else ""


@functools.cache
def _client() -> Any:
    """The HTTP client's module: huggingface_hub 1 uses ``httpx``, 2 uses ``httpx2``."""
    from huggingface_hub.errors import HTTPError

    return importlib.import_module(HTTPError.__module__.partition(".")[0])


def _advice(failure: Failure) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, first = failure.status, failure.causes[0]
    if status is not None and status >= 500:
        return f"the Hub fails ({status})"
    if failure.has(GatedRepoError):
        return f"gated ({status}). Ask for access on its page, then set HF_TOKEN to a token that has it."
    if failure.has(RevisionNotFoundError):
        return f"no such revision on the Hub ({status})."
    if failure.has(EntryNotFoundError):
        return f"a file is missing on the Hub ({status}): {first}"
    if status in (401, 403, 404):
        return _refusal(failure)
    if status in (409, 412):
        return f"another commit was made in the meantime ({status})"
    if status == 429:
        return "the Hub limits the request rate (429)"
    return f"the Hub answered {status}: {str(first).partition(chr(10))[0]}"


def _refusal(failure: Failure) -> str:
    """401, 403 and 404: a wrong name, a missing login or a missing permission, as far as the Hub's response shows."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    status, has_token = failure.status, huggingface_hub.get_token() is not None
    said = f": {failure.said}" if failure.said else ""
    if not has_token and status in (401, 403):
        return (
            f"not found on the Hub, or not visible to you: you are not logged in ({status}). Check the name; for a "
            "repository that is private, or to be written to, log in with hf auth login, or set HF_TOKEN to a token."
        )
    if status == 401 and not failure.has(RepositoryNotFoundError):
        return f"the Hub rejected the token ({status}{said}). Log in anew with hf auth login, or set HF_TOKEN."
    if status == 403 and said:
        return f"the Hub refuses ({status}{said}). Fix this there, or set HF_TOKEN to a token with the permission."
    return (
        f"not found on the Hub, or not visible to you ({status}). "
        "Check the name; for a private repository set HF_TOKEN to a token that may read or write it."
    )
