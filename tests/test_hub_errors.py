"""What the Hub's clients raise, in words; with the types of whichever HTTP client huggingface_hub has."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from chat_logits import hub
from chat_logits.errors import ToolkitError, UsageError

client = hub._client()


def wrapped(error: Exception) -> Exception:
    """As a library raises it: something of its own, because of the error."""
    outer = RuntimeError("outer")
    outer.__cause__ = error
    return outer


def answered(kind: type[Exception], status: int, **headers: str) -> Exception:
    request = client.Request("GET", "http://hub/x")
    return wrapped(kind("said the Hub", response=client.Response(status, headers=headers, request=request)))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (client.ConnectError("refused"), "the Hub cannot be reached"),
        (client.ConnectTimeout("late"), "the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the Hub cannot be reached"),
        (client.ReadError("cut"), "the connection to the Hub broke (outer)"),
        (client.WriteError("cut"), "the connection to the Hub broke (outer)"),
        (client.CloseError("cut"), "the connection to the Hub broke (outer)"),
        (client.RemoteProtocolError("cut"), "the connection to the Hub broke (outer)"),
        (client.ReadTimeout("late"), "the connection to the Hub broke (outer)"),
        (client.WriteTimeout("late"), "the connection to the Hub broke (outer)"),
        (client.PoolTimeout("late"), "the connection to the Hub broke (outer)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_an_answer_the_hub_is_unreachable_and_may_be_asked_again(error, words):
    explained = hub.explain_hub_error(wrapped(error), "model user/x")
    assert isinstance(explained, hub.HubUnreachable) and str(explained) == f"model user/x: {words}"
    assert hub.is_transient(wrapped(error)) and hub.retry_after(wrapped(error)) is None


@pytest.mark.parametrize(
    ("error", "words", "passes"),
    [
        (answered(errors.GatedRepoError, 403), "gated (403)", False),
        (answered(errors.RevisionNotFoundError, 404), "no such revision on the Hub (404)", False),
        (answered(errors.RemoteEntryNotFoundError, 404), "a file is missing on the Hub (404)", False),
        (answered(errors.RepositoryNotFoundError, 401), "not found on the Hub, or not yours to see (401)", False),
        (answered(errors.HfHubHTTPError, 412), "somebody else's commit came first (412)", True),
        (answered(errors.HfHubHTTPError, 429), "too many requests", True),
        (answered(errors.HfHubHTTPError, 503), "the Hub fails (503)", True),
        (answered(errors.HfHubHTTPError, 418), "the Hub answered 418", False),
    ],
)
def test_an_answer_is_explained_and_is_final_or_not(error, words, passes):
    explained = hub.explain_hub_error(error, "model user/x")
    assert type(explained) is ToolkitError and words in str(explained)
    assert hub.is_transient(error) == passes


def test_what_is_no_hub_id_is_wrong_use():
    error = wrapped(errors.HFValidationError("a/b/c"))
    assert isinstance(hub.explain_hub_error(error, "model a/b/c"), UsageError) and not hub.is_transient(error)


def test_the_hub_says_how_long_to_wait():
    assert hub.retry_after(answered(errors.HfHubHTTPError, 429, **{"retry-after": "7"})) == 7
    limit = {"ratelimit": '"api";r=0;t=55'}
    assert hub.retry_after(answered(errors.HfHubHTTPError, 429, **limit)) == 55


def test_the_configured_client_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    try:
        hub.configure_client()
        timeout = huggingface_hub.get_session().timeout
        assert (timeout.connect, timeout.read, timeout.write, timeout.pool) == hub.PATIENCE
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
