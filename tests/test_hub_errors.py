"""What the Hub's clients raise, in words, and whether to try again; with the types of the HTTP client at hand."""

import json
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate

import huggingface_hub
import pytest
from conftest import REPO
from huggingface_hub import errors
from huggingface_hub.utils import logging as hub_logging
from loopback_hub import LoopbackHub

from chat_logits import hub, hub_errors
from chat_logits.errors import ToolkitError, UsageError

client = hub_errors._client()


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
def test_without_an_answer_the_hub_is_unreachable_and_may_be_asked_again(monkeypatch, error, words):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    explained = hub_errors.explain_hub_error(wrapped(error), "model user/x")
    assert isinstance(explained, hub_errors.HubUnreachable) and str(explained) == f"model user/x: {words}"
    assert hub_errors.is_transient(wrapped(error)) and hub_errors.retry_after(wrapped(error)) is None
    monkeypatch.setenv("HF_ENDPOINT", "https://me:word@mirror/hf")
    told = hub_errors.redact(str(hub_errors.explain_hub_error(wrapped(error), "model user/x")))
    place = " at HF_ENDPOINT https://…@mirror/hf" if "reached" in words else ""
    assert told == f"model user/x: {words}{place}"


def test_a_hub_that_is_not_to_be_asked_is_not_asked_again():
    error = wrapped(errors.OfflineModeIsEnabled("offline"))
    explained = hub_errors.explain_hub_error(error, "model user/x")
    assert isinstance(explained, UsageError) and not hub_errors.is_transient(error)
    assert str(explained) == "model user/x: offline mode is on (HF_HUB_OFFLINE), so the Hub is not asked"


@pytest.mark.parametrize(
    ("error", "words", "passes"),
    [
        (answered(errors.GatedRepoError, 403), "gated (403)", False),
        (answered(errors.RevisionNotFoundError, 404), "no such revision on the Hub (404)", False),
        (answered(errors.RemoteEntryNotFoundError, 404), "a file is missing on the Hub (404)", False),
        (answered(errors.RepositoryNotFoundError, 401), "not found on the Hub, or not visible to you (401)", False),
        (answered(errors.HfHubHTTPError, 401), "the Hub rejected the token (401). Log in anew", False),
        (
            answered(errors.HfHubHTTPError, 403, **{"x-error-message": "You have exceeded your\tstorage limit."}),
            "the Hub refuses (403: You have exceeded your storage limit.)",
            False,
        ),
        (answered(errors.RemoteEntryNotFoundError, 503), "the Hub fails (503)", True),
        (answered(errors.HfHubHTTPError, 412), "another commit was made in the meantime (412)", True),
        (answered(errors.HfHubHTTPError, 429), "the Hub limits the request rate (429)", True),
        (answered(errors.HfHubHTTPError, 503), "the Hub fails (503)", True),
        (answered(errors.HfHubHTTPError, 418), "the Hub answered 418", False),
    ],
)
def test_an_answer_is_explained_and_is_final_or_not(monkeypatch, error, words, passes):
    monkeypatch.setenv("HF_TOKEN", "hf_dummydummy")
    explained = hub_errors.explain_hub_error(error, "model user/x")
    assert type(explained) is ToolkitError and words in str(explained)
    assert hub_errors.is_transient(error) == passes


@pytest.mark.parametrize("status", [401, 403])
def test_without_a_token_the_login_is_missing(monkeypatch, status):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    error = answered(errors.HfHubHTTPError, status, **{"x-error-message": "Invalid username or password."})
    said = str(hub_errors.explain_hub_error(error, "model user/x"))
    assert f"you are not logged in ({status})" in said and "hf auth login, or set HF_TOKEN" in said


def test_a_page_in_place_of_json_is_told_and_may_pass():
    request = client.Request("GET", "http://hub/x")
    with pytest.raises(ValueError, match="Expecting value") as raised:
        client.Response(200, content=b"\n<!doctype html><title>Log in</title>", request=request).json()
    explained = hub_errors.explain_hub_error(wrapped(raised.value), "model user/x")
    assert str(explained).startswith("model user/x: HTML instead of the Hub's JSON, ")
    assert isinstance(explained, hub_errors.HubUnreachable) and hub_errors.is_transient(wrapped(raised.value))
    broken = json.JSONDecodeError("Expecting value", "{", 1)  # some file's
    assert str(hub_errors.explain_hub_error(wrapped(broken), "model user/x")) == "model user/x: outer"


def test_what_is_no_hub_id_is_wrong_use():
    error = wrapped(errors.HFValidationError("a/b/c"))
    assert isinstance(hub_errors.explain_hub_error(error, "model a/b/c"), UsageError) and not hub_errors.is_transient(
        error
    )


def test_the_hub_says_how_long_to_wait():
    assert hub_errors.retry_after(answered(errors.HfHubHTTPError, 429, **{"retry-after": "7"})) == 7
    limit = {"ratelimit": '"api";r=0;t=55'}
    assert hub_errors.retry_after(answered(errors.HfHubHTTPError, 429, **limit)) == 55


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("3600", 3600, 3600), ("1000000000", 1e8, 1e8), ("9" * 400, 1e8, 1e8), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0)],
)
def test_however_long_the_hub_asks_for_it_is_a_time_that_can_be_waited_for(asked, least, most):
    assert least <= hub_errors.retry_after(answered(errors.HfHubHTTPError, 429, **{"retry-after": asked})) <= most


def test_a_date_is_so_many_seconds_from_now():
    asked = formatdate(time.time() + 1000, usegmt=True)
    assert 900 < hub_errors.retry_after(answered(errors.HfHubHTTPError, 503, **{"retry-after": asked})) <= 1000


@pytest.mark.parametrize("asked", ["²", "soon", "", "-3", "1.5", "Wed, 99 Oct 2015"])
def test_what_is_no_time_asks_for_none(asked):
    response = client.Response(
        429, headers=[(b"retry-after", asked.encode("latin-1"))], request=client.Request("GET", "http://hub/x")
    )
    assert hub_errors.retry_after(errors.HfHubHTTPError("said", response=response)) is None


RETRIES = hub_errors.Retries(passing=6, unknown=2, refused=1, longest=10.0, longest_asked=100.0)
PASSES = answered(errors.HfHubHTTPError, 503)
REFUSES = answered(errors.HfHubHTTPError, 403)


def test_pauses_double_up_to_the_longest_and_end():
    failures = Counter()
    pauses = [RETRIES.pause(PASSES, failures) for _ in range(7)]
    assert pauses.pop() is None
    for pause, most in zip(pauses, [1, 2, 4, 8, 10, 10], strict=True):
        assert most / 2 <= pause <= most


def test_what_the_hub_asks_for_is_waited_for_unless_it_is_too_long():
    def asked(seconds: int) -> Exception:
        return answered(errors.HfHubHTTPError, 429, **{"retry-after": str(seconds)})

    assert 100 <= RETRIES.pause(asked(100), Counter()) <= 101
    assert RETRIES.pause(asked(101), Counter()) is None


@pytest.mark.parametrize("asked", ["0", "2", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_hub_that_asks_for_no_or_a_short_wait_gets_pauses_that_grow_all_the_same(asked):
    """By hand: half to all of 1, 2, 4, 8 and then 10 seconds, or what is asked for with a second of jitter."""
    failures, error = Counter(), answered(errors.HfHubHTTPError, 429, **{"retry-after": asked})
    least = 2 if asked == "2" else 0
    for own in (1, 2, 4, 8, 10, 10):
        assert max(own / 2, least) <= RETRIES.pause(error, failures) <= max(own, least + 1)
    assert RETRIES.pause(error, failures) is None


def test_each_kind_of_failure_has_attempts_of_its_own():
    """A refusal, or an error that nobody knows, in the middle of an outage is no more than the first of its kind."""
    failures = Counter()
    kinds = [PASSES] * 5 + [REFUSES] + [RuntimeError("odd")] * 2 + [PASSES]
    assert all(RETRIES.pause(error, failures) for error in kinds)
    assert all(RETRIES.pause(error, failures.copy()) is None for error in (PASSES, REFUSES, RuntimeError("odd")))


def test_what_is_wrong_by_itself_is_never_tried_again():
    patient = hub_errors.Retries(passing=9, unknown=9, refused=9)
    assert patient.pause(UsageError("another run"), Counter()) is None
    assert patient.pause(wrapped(errors.HFValidationError("a/b/c")), Counter()) is None
    assert patient.pause(hub_errors.HubUnreachable("no answer"), Counter()) is not None


def test_an_outage_of_a_week_has_pauses_too():
    assert 150 <= hub_errors.BESIDE.pause(PASSES, Counter(passing=2000)) <= 300


@pytest.mark.parametrize(
    ("error", "attempts", "kind"),
    [(PASSES, 7, ToolkitError), (REFUSES, 2, hub_errors.HubRefused), (RuntimeError("odd"), 3, ToolkitError)],
)
def test_a_step_is_taken_until_it_goes_well_or_there_is_no_more_attempt(monkeypatch, error, attempts, kind):
    monkeypatch.setattr(hub_errors, "FIRST_PAUSE", 0.0)
    taken = []

    def step(failing: int) -> str:
        taken.append(failing)
        if len(taken) <= failing:
            raise error
        return "done"

    assert RETRIES.call(lambda: step(attempts - 1), "dataset user/x") == "done" and len(taken) == attempts
    taken.clear()
    with pytest.raises(ToolkitError, match="dataset user/x: ") as raised:
        RETRIES.call(lambda: step(attempts), "dataset user/x")
    assert type(raised.value) is kind and len(taken) == attempts


def test_the_configured_client_does_not_wait_for_ever_and_all_is_put_back(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    verbosity, session = hub_logging.get_verbosity(), huggingface_hub.get_session()
    shown, timeout = hub.shows_downloads(), session.timeout
    put_back = hub.configure_client()
    try:
        patient = huggingface_hub.get_session().timeout
        assert (patient.connect, patient.read, patient.write, patient.pool) == hub.PATIENCE
        assert huggingface_hub.constants.HF_HUB_DISABLE_XET and hub_logging.get_verbosity() == hub_logging.ERROR
        huggingface_hub.utils.disable_progress_bars()  # as a commit does
    finally:
        put_back()
    assert huggingface_hub.get_session().timeout == timeout and timeout.connect != hub.PATIENCE[0]
    assert hub_logging.get_verbosity() == verbosity and not huggingface_hub.constants.HF_HUB_DISABLE_XET
    assert hub.shows_downloads() == shown


def test_a_client_factory_of_ones_own_is_put_back():
    own = huggingface_hub.utils._http.default_client_factory()
    huggingface_hub.set_client_factory(lambda: own)
    try:
        put_back = hub.configure_client()
        assert huggingface_hub.get_session() is not own
        put_back()
        assert huggingface_hub.get_session() is own
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


CACHED = """
import logging, sys
logging.basicConfig(format="%(message)s")
from chat_logits.hub import resolve_commit
for _ in range(2):
    print(resolve_commit("user/questions", "dataset", None))
"""


def test_a_commit_from_the_cache_in_place_of_the_hubs_newest_is_told(tmp_path):
    """Cached, then the repository moves on, then the Hub cannot be reached, or is not to be asked."""
    with LoopbackHub() as loopback:
        cached = loopback.add_repo("dataset", "user/questions", files={"train.jsonl": b"{}"})
        env = {**loopback.environment(tmp_path / "home"), "PYTHONPATH": str(REPO)}
        fetch = "import huggingface_hub; huggingface_hub.snapshot_download('user/questions', repo_type='dataset')"
        subprocess.run([sys.executable, "-c", fetch], env=env, check=True, capture_output=True)
        run = {"capture_output": True, "text": True, "check": True}
        online = subprocess.run([sys.executable, "-c", CACHED], env=env, **run)
        assert online.stdout.split() == [cached] * 2 and online.stderr == ""
    unreachable = "the Hub cannot be reached at HF_ENDPOINT http://127.0.0.1:9"
    for away, why in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, unreachable),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is on (HF_HUB_OFFLINE), so the Hub is not asked"),
    ):
        offline = subprocess.run([sys.executable, "-c", CACHED], env={**env, **away}, **run)
        assert offline.stdout.split() == [cached] * 2
        told = f"dataset user/questions: {why}. The commit in the local cache is used: "
        assert offline.stderr == f"{told}{cached}\n"
