"""The Hub's repositories by name and commit, and its client; any room may use this."""

import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from chat_logits.errors import ToolkitError
from chat_logits.hub_errors import Failure, HubUnreachable, explain_hub_error
from chat_logits.paths import near_here

COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_WAIT = re.compile(r"[0-9]")  # values of Retry-After, in seconds, that the client may sleep within a request
PATIENCE = (15.0, 300.0, 60.0, 60.0)  # timeouts in seconds: to connect, read, write, and get a pooled connection

logger = logging.getLogger(__name__)

_last_sign = [time.monotonic()]  # when a request to the Hub or a response from it last began


def configure_client() -> Callable[[], None]:
    """Set timeouts on the Hub's client in this process. By default it would wait forever on a dead connection.

    For processes that push. The client's warnings, which contain signed addresses and break progress bars, are not
    shown. Returns a function that restores all of this, and the client's progress bars, which commits disable. Call it
    only when no other thread is in a request, as it closes the connections.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http
    from huggingface_hub.utils import logging as hub_logging

    constants, factory = huggingface_hub.constants, _http._GLOBAL_CLIENT_FACTORY
    xet, verbosity, has_bars = constants.HF_HUB_DISABLE_XET, hub_logging.get_verbosity(), shows_downloads()

    def put_back() -> None:
        huggingface_hub.set_client_factory(factory)
        constants.HF_HUB_DISABLE_XET = xet
        hub_logging.set_verbosity(verbosity)
        if has_bars:
            show_downloads()

    huggingface_hub.set_client_factory(_patient_client)
    constants.HF_HUB_DISABLE_XET = True  # Xet's uploads have no timeout
    hub_logging.set_verbosity_error()
    return put_back


def shows_downloads() -> bool:
    """Whether the Hub's client shows progress bars for downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled()


def show_downloads() -> None:
    """Make the Hub's client show progress bars for downloads."""
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()


def _patient_client():
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = PATIENCE
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _note_sign],
        "response": [*hooks["response"], _note_sign, _refuse_long_waits],
    }
    return client


def _note_sign(_: object) -> None:
    _last_sign[0] = time.monotonic()


def seconds_of_silence() -> float:
    """Seconds since a request of this process to the Hub, or a response, last began (``configure_client``'s client)."""
    return time.monotonic() - _last_sign[0]


def _refuse_long_waits(response) -> None:
    """Raise the Hub client's error instead of letting the client sleep for as long as the response asks: the caller
    decides whether to wait."""
    from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

    if response.status_code != 429 and response.status_code < 500:
        return
    asked, limit = response.headers.get("retry-after", "").strip(), parse_ratelimit_headers(response.headers)
    if (asked and not SHORT_WAIT.fullmatch(asked)) or (limit and not limit.remaining):
        response.read()
        hf_raise_for_status(response)


def is_commit(revision: str) -> bool:
    """Whether a recorded revision is a Hub commit (40 hex digits); that of a local folder is a hash of 64 digits."""
    return bool(COMMIT.fullmatch(revision))


def find_license(repo_id: str, kind: str, commit: str | None) -> str | None:
    """The licence in the card of a model or dataset, None if it states none or cannot be read."""
    import huggingface_hub

    card = {"model": huggingface_hub.ModelCard, "dataset": huggingface_hub.DatasetCard}[kind]
    try:
        if Path(repo_id).exists():
            return card.load(Path(repo_id) / "README.md").data.get("license")
        metadata = huggingface_hub.HfApi().repo_info(repo_id, repo_type=kind, revision=commit).card_data
        return (metadata or {}).get("license")
    except Exception:  # a missing licence on the card is not worth failing a run
        return None


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a Hub repository's id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def resolve_commit(repo_id: str, repo_type: str, revision: str | None) -> str:
    """The commit (40 hex digits) that ``revision`` of a Hub repository names now, or, if the Hub cannot be reached,
    the one in the cache.

    A commit is returned without a request, as a thousand workers may be given one. ``repo_type`` is "model" or
    "dataset". Raises ToolkitError if the Hub refuses.
    """
    import huggingface_hub

    if revision and is_commit(revision):
        return revision
    try:
        return huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha
    except Exception as error:
        explained = explain_hub_error(error, f"{repo_type} {repo_id}{near_here(repo_id)}")
        if Failure(error).is_unreachable:
            return _cached_commit(repo_id, repo_type, revision, explained)
        raise explained from error


def _cached_commit(repo_id: str, repo_type: str, revision: str | None, explained: ToolkitError) -> str:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, local_files_only=True
        )
    except Exception as error:
        raise HubUnreachable(f"{explained}, and it is not in the local cache") from error
    _tell_cached(str(explained), Path(folder).name)
    return Path(folder).name


@functools.cache  # once in a process
def _tell_cached(explained: str, commit: str) -> None:
    logger.warning("%s. The commit in the local cache is used: %s", explained, commit)
